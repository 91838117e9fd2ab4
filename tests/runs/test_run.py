"""Whole runs, small: the files they write, resuming bit for bit, and the errors they report."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from recipes import (
    ROOT,
    Page,
    assert_same_run,
    changed,
    config,
    lines,
    load_checkpoint,
)

from she_jax.annotation.tasks import read_tasks
from she_jax.cot import CotSchema
from she_jax.generate.generator import Generator
from she_jax.models.weights import load_model
from she_jax.recipes import annotate, evaluate, stage1
from she_jax.runs import blocks, predict
from she_jax.runs.annotate_import import import_annotations
from she_jax.runs.config import parse
from she_jax.runs.export import export_run
from she_jax.runs.run import run
from she_jax.runs.validate import validate
from she_jax.training.files import printable, read_json_lines
from she_jax.training.logging import MetricsWriter, log
from she_jax.training.setup import read_tokenizer
from she_jax.training.workdir import lock_workdir
from she_jax.types import Example, UserError


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("done") / "run"
    run(config(), workdir)
    return workdir


def test_a_run_writes_its_metrics_its_samples_and_its_config(done):
    summary = json.loads((done / "summary.json").read_text())
    for metrics in (summary, summary["before"]):
        assert {"macro_f1", "accuracy", "good_f1", "f1", "step_accuracy"} <= metrics.keys()
        assert {"parse_rate", "confusion", "n", "pass_at_2"} <= metrics.keys()
        assert metrics["n"] == 32
    rows = lines(done)
    assert [r["step"] for r in rows if r["phase"] == "sft"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in rows if r["phase"] == "rl"] == [1, 2, 3, 4]
    assert [r["step"] for r in rows if r["phase"] == "eval"] == [0, 2, 4]
    names = "loss reward kl entropy clip_low clip_high length truncated parse_rate zero_variance"
    assert {*names.split(), "logp_gap"} <= next(r for r in rows if r["phase"] == "rl").keys()
    assert (done / "samples" / "step_000001.md").read_text().startswith("# Rollouts of step 1")
    assert list((done / "tensorboard").rglob("events*"))
    assert json.loads((done / "config.json").read_text())["sft"]["steps"] == 6


def test_a_run_ends_with_a_page(done):
    """Of its results, its curves, the chains that changed and its rollouts, token by token."""
    page = Page(done / "report.html")
    titles = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert {"Chart: Entropy of the policy", "Chart: Loss"} <= set(titles)
    for heading in ("Before and after on the same pairs", "Rollouts, token by token"):
        assert heading in page.text
    for when in ("before", "after"):
        chains = read_json_lines(done / "eval" / f"chains_{when}.jsonl")
        assert len(chains) == json.loads((done / "summary.json").read_text())["n"]
    (group, _) = json.loads((done / "samples" / "step_000004.json").read_text())["groups"]
    for rollout in group["rollouts"]:
        assert len(rollout["tokens"]) == len(rollout["token_advantages"]) > 0
        assert "".join(rollout["tokens"]) == rollout["text"]
        by_step = {k: step["advantage"] for k, step in enumerate(rollout["steps"])}
        for k, advantage in zip(rollout["token_steps"], rollout["token_advantages"], strict=True):
            assert k < 0 or advantage == pytest.approx(by_step[k], abs=1e-6)


def test_the_sampler_and_the_trainer_agree_on_the_log_probabilities(done):
    for row in lines(done):
        if row["phase"] == "rl":
            assert row["logp_gap_max"] < 1e-3
            assert row["ratio"] == pytest.approx(1.0, abs=1e-3)


def test_the_same_command_again_reports_that_all_is_done(done, capsys):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    run(config(), done)
    screen = capsys.readouterr().out
    assert "all is done" in screen
    for place in (
        "summary.json",
        "samples",
        f"she-jax predict PAIRS.csv --checkpoint={done}",
        f"she-jax export --checkpoint={done}",
    ):
        assert place in screen
    assert screen.splitlines()[-1].endswith(f"page: {done / 'report.html'}")
    assert {p: p.stat().st_mtime_ns for p in done.rglob("*") if p.is_file()} == before


def test_a_finished_run_can_still_be_exported(done, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    (folder / "report.html").unlink()  # as of an earlier version
    run(config(export=True), folder)
    assert (folder / "report.html").read_bytes() == (done / "report.html").read_bytes()
    assert load_model(folder / "export").config.dim == config().model.dim
    files = {path: path.read_bytes() for path in (folder / "export").iterdir()}
    shutil.rmtree(folder / "export")
    assert export_run(folder) == folder / "export"  # as the command ``export`` does
    assert {path: path.read_bytes() for path in (folder / "export").iterdir()} == files
    for name in ("summary.json", "config.json", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (done / name).read_bytes()
    lm, _, _ = load_checkpoint(folder / "export", chain__label_first=True)
    lengths = lm.prompts.prompt_length, lm.prompts.completion_length
    assert lengths == (config().model.prompt_length, config().model.completion_length)
    assert lm.prompts.schema == CotSchema(), "prompted as it was trained"
    export_run(folder, "bfloat16")
    assert load_model(folder / "export").stored_dtype == "bfloat16"


def test_truncated_pairs_are_reported_once(done, capsys):
    lm, params, _ = load_checkpoint(done)
    long = Example(uid="a", query="mug", product={"title": "mug " * 99})
    generator = Generator(lm, 8, warn=log)
    for _ in range(2):
        generator.greedy(params, [long] * 3, lambda done: None)
    assert capsys.readouterr().out.count("do not fit into model.prompt_length=") == 1


def test_a_folder_is_locked_by_one_command_at_a_time(done):
    with (
        lock_workdir(done),
        pytest.raises(UserError, match=r"another command is running in .*run: wait"),
    ):
        run(config(), done)
    run(config(), done)  # the lock is released


def test_trap_11_a_run_stopped_by_a_signal_and_killed_later_equals_an_uninterrupted_one(
    done, tmp_path, monkeypatch
):
    """SIGTERM in the cold start, through launch.py in another process, then killed in RL."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import recipes\n"
        "from she_jax.training import packing\n"
        "packing.WIDTHS = (2.0,)  # as in all tests\n"
        "def get_config():\n"
        "    return recipes.config().unlock()\n"
    )
    workdir = tmp_path / "run"
    command = [sys.executable, str(ROOT / "launch.py"), f"--config={recipe}"]
    command += [f"--workdir={workdir}"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {})
    deadline = time.monotonic() + 240
    while first.poll() is None and time.monotonic() < deadline:
        metrics = workdir / "metrics.jsonl"
        if metrics.is_file() and metrics.read_bytes().count(b"\n") >= 1:
            first.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    output, _ = first.communicate(timeout=240)
    assert first.returncode == 143, output
    assert "SIGTERM: saved sft at step" in output
    write = MetricsWriter.write

    def die(self, phase, step, values):
        write(self, phase, step, values)
        if (phase, step) == ("rl", 3):  # a step after the last checkpoint
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", die)
        with pytest.raises(KeyboardInterrupt):
            run(config(), workdir)
    run(config(), workdir)
    files = ("report.html", "summary.json", "tokenizer.json", "samples/step_000004.json")
    assert_same_run(done, workdir, files)


def test_a_run_starts_from_another_one_and_keeps_a_copy_of_its_parameters(done, tmp_path):
    """In place of a cold start; the other run may be deleted afterwards."""
    first = tmp_path / "first"
    shutil.copytree(done, first)
    changes = {"rl__steps": 1, "rl__eval_every": 1}
    changes["init_from"] = str(first / "checkpoints" / "policy")
    run(config(**changes), tmp_path / "run")
    assert {row["phase"] for row in lines(tmp_path / "run")} == {"rl", "eval"}
    before = json.loads((tmp_path / "run" / "summary.json").read_text())["before"]
    assert before == json.loads((done / "eval" / "after.json").read_text())
    chains = (tmp_path / "run" / "eval" / "chains_before.jsonl").read_text()
    assert chains == (done / "eval" / "chains_after.jsonl").read_text()
    best = json.loads((done / "summary.json").read_text())["checkpoint"]
    validation = (tmp_path / "run/eval/step_000000_validation.json").read_text()
    assert validation == (done / f"eval/step_{best:06d}_validation.json").read_text()
    assert (tmp_path / "run/tokenizer.json").read_bytes() == (done / "tokenizer.json").read_bytes()
    shutil.rmtree(first / "checkpoints")
    (tmp_path / "run" / "summary.json").unlink()
    (first / "checkpoints" / "policy").mkdir(parents=True)
    run(config(**changes), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="holds no whole checkpoint"):
        run(config(**changes), tmp_path / "another")


@pytest.mark.parametrize(
    ("init_from", "changes", "error", "message"),
    [
        ("nowhere", {}, FileNotFoundError, "expected the checkpoints of a run, such as"),
        ("/nowhere", {}, FileNotFoundError, "expected the checkpoints of a run, such as"),
        ("RUN", {}, FileNotFoundError, "expected the checkpoints of a run, such as"),
        ("RUN/checkpoints/sft", {"chain__label_first": True}, UserError, "writes the chain"),
        ("RUN/checkpoints/sft", {"model__layers": 9}, UserError, "of another model: model.layers"),
    ],
)
def test_unusable_checkpoints_to_start_from_are_reported_at_once(
    done, tmp_path, init_from, changes, error, message
):
    init_from = init_from.replace("RUN", str(done))
    with pytest.raises(error, match=message):
        run(config(init_from=init_from, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_changed_config_over_an_old_workdir_lists_the_keys(done):
    with pytest.raises(UserError, match=r"rl\.steps: 4 in the workdir, 5 now"):
        run(config(rl__steps=5), done)


def test_a_folder_of_an_earlier_version_is_refused(done, tmp_path):
    recipe = json.loads((done / "config.json").read_text())
    assert recipe.pop("schema") == 2
    checkpoints = tmp_path / "old" / "checkpoints" / "policy"
    checkpoints.mkdir(parents=True)
    (tmp_path / "old" / "config.json").write_text(json.dumps(recipe))
    message = r"another version of she_jax \(schema 1, this one reads 2\)"
    with pytest.raises(UserError, match=message):
        run(config(), tmp_path / "old")
    with pytest.raises(UserError, match=message):
        run(config(init_from=str(checkpoints)), tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rl__top_p": 0.5}, "narrows the top k"),
        ({"rl__temperature": 0.0}, "expected a positive number"),
        ({"rl__learning_rate": float("nan")}, "rl.learning_rate=nan: expected a finite number"),
        ({"sft__learning_rate": -1.0}, "learning_rate=-1.0: expected a positive number"),
        ({"rl__advantage_clip": 0.0}, "rl.advantage_clip=0.0: expected > 0"),
        ({"shopworld__pairs": (4, 2.5, 1, 1)}, "pairs=(4, 2.5, 1, 1): expected four counts"),
        ({"rl__batch_compactions": -1}, "rl.batch_compactions=-1: expected 0"),
        ({"rl__eval_every": 0}, "rl.eval_every=0: expected at least 1"),
        (
            {"rl__negative_advantage_weight": -1.0},
            "rl.negative_advantage_weight=-1.0: expected a weight",
        ),
        ({"rl__format_weight": 1.0}, "rl.format_weight=1.0: expected a reward in"),
        ({"rl__dynamic_sampling_rounds": -1}, "rl.dynamic_sampling_rounds=-1: expected 0"),
        ({"rl__self_imitation": -1.0}, "rl.self_imitation=-1.0: expected 0"),
        ({"rl__steps": -1}, "rl.steps=-1: expected 0"),
        ({"rl__min_std": -1.0}, "rl.min_std=-1.0: expected 0"),
        ({"rl__srpo__correct_from": 0.0}, "rl.srpo.correct_from=0.0: expected a number in (0, 1]"),
        ({"rl__srpo__w_step": -1.0}, "rl.srpo.w_step=-1.0: expected a number in [0, inf)"),
        (
            {"method": "dpo", "rl__dynamic_sampling_rounds": 1},
            "method='dpo' samples once, at temperature 1",
        ),
        ({"method": "dpo", "reward__prm": "x"}, "method='dpo' has no use for that reward"),
        ({"method": "sft", "reward__orm": "x"}, "method='sft' has no use for that reward"),
        (
            {"method": "sft", "reward__prm": "x", "reward__combine": "gate"},
            "reward.combine='gate': with method=sft",
        ),
        ({"reward__combine": "mean"}, "reward.combine='mean': expected one of"),
        ({"reward__combine": "model_only"}, "needs a process reward model: set reward.prm"),
        ({"method": "ppo"}, "method='ppo': expected one of"),
        ({"rl__unsolved_share": 1.5}, "rl.unsolved_share=1.5: expected a share"),
        ({"offline__chains": "mine"}, "offline.chains='mine': expected one of"),
        ({"offline__pairs": -1}, "offline.pairs=-1: expected 0"),
        ({"offline__beta": 0.0}, "offline.beta=0.0: expected a positive"),
        ({"rl__patience": -1}, "rl.patience=-1: expected 0"),
        ({"rl__difficulty": "soft"}, "rl.difficulty='soft': expected one of"),
        ({"filter__high": 2.0}, "high=2.0"),
        ({"filter__skip": -1}, "filter.skip=-1: expected 0"),
        ({"chain__checks": 1}, "chain.checks=1"),
        ({"rl__group_size": 1}, "group_size=1: the group baseline needs at least 2"),
        ({"rl__prompts": 3}, "rl.prompts: batch of 3 prompts over data x fsdp = 8 devices"),
        ({"rl__estimator": "ppo"}, "rl.estimator='ppo': expected one of"),
        ({"rl__loss_aggregation": "word"}, "rl.loss_aggregation='word': expected one of"),
        ({"data__name": "amazon"}, "data.name='amazon': expected one of"),
        ({"data__name": "esci"}, "needs --config.data.path"),
        ({"data__eval_split": "dev"}, "no pairs in the split 'dev'"),
        ({"kind": "play"}, "kind='play': expected one of"),
        ({"checkpoint": "s3://b/x"}, "--config.checkpoint=s3://b/x: only local folders"),
    ],
)
def test_a_config_that_cannot_work_is_reported_before_training(tmp_path, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_micro_batches_that_leave_devices_idle_are_reported(tmp_path, capsys):
    validate(parse(config(rl__loss__micro_batches=2), tmp_path))
    assert "4 groups, and so work for 4 of 8 devices" in capsys.readouterr().out
    validate(parse(config(), tmp_path))
    assert "devices" not in capsys.readouterr().out


def test_a_folder_without_results_accepts_another_config(tmp_path):
    """What a command left that failed early, its tokenizer too, is replaced by the next one's."""
    folder, sizes = tmp_path / "run", []
    for split, vocab_size in (("dev", 700), ("other", 600)):
        with pytest.raises(UserError, match=f"no pairs in the split '{split}'"):
            run(config(data__eval_split=split, model__vocab_size=vocab_size), folder)
        sizes.append(read_tokenizer(folder).get_vocab_size())
    assert json.loads((folder / "config.json").read_text())["data"]["eval_split"] == "other"
    assert sizes[1] <= 600 < sizes[0]


def test_a_checkpoint_predicts_the_labels_of_a_users_file(done, tmp_path, capsys):
    pairs = [
        {"uid": "a", "query": "red sofa", "product": {"title": "crimson couch"}, "label": 4},
        {"uid": "b", "query": "オーク 机", "product": {"title": "机"}},
        {"query": "", "product": {"title": "nothing asked"}},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    changes = {
        "checkpoint": str(done),
        "data.name": "jsonl",
        "data.path": str(file),
        "data.eval_split": "test",
        "eval.batch_size": 16,
    }
    run(changed(evaluate.get_config(), changes), tmp_path / "out")
    with (tmp_path / "out" / "predictions.jsonl").open() as written:
        predictions = [json.loads(line) for line in written]
    screen = " ".join(capsys.readouterr().out.split())
    assert [line["uid"] for line in predictions] == ["a", "b"]
    for line in predictions:  # what is no chain is kept as written
        assert line["well_formed"] == (line["text"] is None)
    assert not predictions[0]["well_formed"]
    assert "none of 2 completions can be read as a whole chain" in screen
    assert (
        f'The first that could not be read: "{printable(predictions[0]["text"], 20)[:20]}' in screen
    )
    assert {"label", "probabilities", "well_formed", "steps"} <= predictions[0].keys()
    with (tmp_path / "out" / "labeled" / "pairs.jsonl").open() as written:
        rows = [json.loads(line) for line in written]
    assert [
        {name: row[name] for name in given} for row, given in zip(rows, pairs, strict=True)
    ] == pairs
    assert rows[2]["error"] == "empty query"
    assert [row["she_label"] for row in rows] == [line["label"] for line in predictions] + [None]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["n"] == 1
    # All is done, and stays so after a move of everything, and without the source.
    moved = file.rename(tmp_path / "moved.jsonl")
    changes["data.path"] = str(moved)
    changes["checkpoint"] = str(shutil.copytree(done, tmp_path / "copy"))
    text = moved.read_text()
    for event in (lambda: os.utime(moved, (1, 1)), moved.unlink):
        event()
        run(changed(evaluate.get_config(), changes), tmp_path / "out")
        assert "all is done: the predictions are in" in capsys.readouterr().out
    moved.write_text(text + json.dumps(pairs[0] | {"uid": "c"}) + "\n")
    with pytest.raises(UserError, match="has another content than when the run in"):
        run(changed(evaluate.get_config(), changes), tmp_path / "out")


def test_votes_give_a_confidence_and_a_killed_prediction_goes_on(done, tmp_path, monkeypatch):
    file = tmp_path / "pairs.csv"
    file.write_text("query,title,label\nred mug,Red mug,4\noak desk,Desk,2\nred mug,Blue mug,\n")
    changes = {"checkpoint": str(done), "data.name": "table", "data.path": str(file)}
    changes |= {"eval.batch_size": 6, "decide.samples": 3, "decide.rule": "auto"}
    monkeypatch.setattr(blocks, "BLOCK", 2)
    gather, calls = predict.Decider.gather, []

    def die(self, examples, *rest):
        calls.append(len(examples))
        if calls == [16, 2, 1]:  # validation, the first block, the second one
            raise KeyboardInterrupt
        return gather(self, examples, *rest)

    recipe = changed(evaluate.get_config(), changes)
    with monkeypatch.context() as patch:
        patch.setattr(predict.Decider, "gather", die)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "out")
        with patch.context() as later:  # what is not all written is not done
            later.setattr(predict, "write_agreement", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(recipe, tmp_path / "out")
        run(recipe, tmp_path / "out")
    assert calls == [16, 2, 1, 1]  # nothing twice: what was fitted is kept beside the checkpoint
    run(recipe, tmp_path / "whole")
    written = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    assert written == (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    assert not (tmp_path / "out" / "predictions").exists()
    for line in map(json.loads, written.splitlines()):
        if line["probabilities"] is not None:
            assert sum(line["probabilities"].values()) == pytest.approx(1)
            assert 1 <= line["expected"] <= 4
        assert line["review"] in (True, False)
    report = json.loads((tmp_path / "out" / "agreement.json").read_text())
    assert (report["pairs"], report["labels"]) == (2, ["1", "2", "3", "4"])
    assert report["metrics"].keys() == {"judge", "floor"}
    assert "Agreement report" in (tmp_path / "out" / "agreement.html").read_text()
    with (tmp_path / "out" / "judged.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["query"], row["human"]) for row in rows] == [
        ("red mug", "4"), ("oak desk", "2"), ("red mug", ""),
    ]  # fmt: skip
    (fitted,) = (done / "checkpoints" / "policy").glob("decide_3.json")
    about = json.loads(fitted.read_text())["about"]
    assert about["pairs"] == 16
    assert sum(about["label_mix"].values()) == pytest.approx(1)
    fitted.unlink()


def test_pairs_to_annotate_are_chosen_from_a_table_or_from_predictions(done, tmp_path, capsys):
    file, folder = tmp_path / "pairs.csv", tmp_path / "annotate"
    file.write_text("query,title,label\nred mug,Red mug,4\noak desk,Desk,2\nred mug,Blue mug,\n")
    table = {"checkpoint": str(done), "data.name": "table", "data.path": str(file)}
    table |= {"eval.batch_size": 6, "annotate.samples": 3, "annotate.pairs": 2}
    run(changed(annotate.get_config(), table), folder)
    written = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {"annotate.html", "label_studio.json", "label_studio.xml"} <= written.keys()
    tasks = read_tasks(folder / "pairs.jsonl")
    assert len(tasks) == 2
    assert json.loads(written["choice.json"])["errors"] == "validation"
    uid = next(iter(tasks))
    said = {"uid": uid, "step": "category", "annotator": "ann", "value": "near"}
    (tmp_path / "ann.jsonl").write_text(json.dumps(said))
    import_annotations(folder, [tmp_path / "ann.jsonl"], whole=True)
    rows = [json.loads(line) for line in (folder / "all_pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert {row["uid"]: row.get("steps") for row in rows}[uid] == {"category": "near"}
    run(changed(annotate.get_config(), table), folder)  # nothing that was given out is touched
    assert {name: (folder / name).read_bytes() for name in written} == written
    with pytest.raises(UserError, match=r"annotate\.pairs: 2 in the workdir, 1 now"):
        run(changed(annotate.get_config(), table | {"annotate.pairs": 1}), folder)
    # All steps of the run's own pairs are annotated, and predictions bring their chains.
    with pytest.raises(UserError, match="all steps of all 200 pairs are annotated"):
        run(changed(annotate.get_config(), {"checkpoint": str(done)}), tmp_path / "own")
    judged = table | {"decide.samples": 3, "decide.rule": "majority"}
    judged = {name: value for name, value in judged.items() if not name.startswith("annotate")}
    run(changed(evaluate.get_config(), judged), tmp_path / "out")
    predicted = {"checkpoint": str(tmp_path / "out"), "annotate.pairs": 3}
    run(changed(annotate.get_config(), predicted), tmp_path / "out" / "annotate")
    text = (tmp_path / "out" / "predictions.jsonl").read_text()
    lines_of = {line["uid"]: line for line in map(json.loads, text.splitlines())}
    for task in read_tasks(tmp_path / "out" / "annotate" / "pairs.jsonl").values():
        assert task.confidence == lines_of[task.uid]["confidence"]
    for fitted in (done / "checkpoints" / "policy").glob("decide_3.json"):
        fitted.unlink()


def test_pairs_are_prepared_for_the_chain_of_the_policy(done, tmp_path, monkeypatch):
    """Another number of checks would be another world, and other steps in a user's file."""

    class Prepared(Exception):
        pass

    def prepare(data):
        raise Prepared(f"{data.chain['checks']} checks, {data.world.checks} in the world")

    monkeypatch.setattr(predict, "prepare_dataset", prepare)
    changes = {"checkpoint": str(done), "chain.checks": 2}
    with pytest.raises(Prepared, match="0 checks, 0 in the world"):
        run(changed(evaluate.get_config(), changes), tmp_path / "out")


def test_the_recipe_takes_its_argument():
    recipe = stage1.get_config("model=smollm2,data=esci")
    assert (recipe.model.name, recipe.data.name, recipe.data.balance) == ("smollm2", "esci", None)
    with pytest.raises(ValueError, match=r"expected model=scratch\|smollm2"):
        stage1.get_config("model=gpt")


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="2 processes: a run on several hosts is not supported yet"):
        run(config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
