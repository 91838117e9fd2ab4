"""Whole runs, small: what they leave, that they resume bit for bit, that they say what is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from recipes import ROOT, assert_same_run, config, lines

from configs import evaluate, stage1
from she_jax.cot import CotSchema
from she_jax.generate import generator as predict
from she_jax.generate.generator import Generator
from she_jax.models.weights import load_model
from she_jax.runs.run import run
from she_jax.runs.validate import check
from she_jax.training.checkpoint import Checkpoints
from she_jax.training.loop import finite
from she_jax.training.setup import load_policy
from she_jax.training.workdir import lock_workdir
from she_jax.types import Example


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("done") / "run"
    run(config(), workdir)
    return workdir


def test_a_run_leaves_what_it_should(done):
    summary = json.loads((done / "summary.json").read_text())
    for figures in (summary, summary["before"]):
        assert {"macro_f1", "accuracy", "good_f1", "f1", "step_accuracy"} <= figures.keys()
        assert {"parse_rate", "confusion", "n", "pass_at_2"} <= figures.keys()
        assert figures["n"] == 32
    rows = lines(done)
    assert [r["step"] for r in rows if r["phase"] == "sft"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in rows if r["phase"] == "srpo"] == [1, 2, 3, 4]
    assert [r["step"] for r in rows if r["phase"] == "eval"] == [0, 2, 4]
    wanted = "loss reward kl entropy clip_low clip_high length truncated parse_rate zero_variance"
    assert {*wanted.split(), "logp_gap"} <= next(r for r in rows if r["phase"] == "srpo").keys()
    assert (done / "samples" / "step_000001.md").read_text().startswith("# Rollouts of step 1")
    assert list((done / "tensorboard").rglob("events*"))
    assert json.loads((done / "config.json").read_text())["sft"]["steps"] == 6


def test_the_sampler_and_the_trainer_agree_on_the_log_probabilities(done):
    for row in lines(done):
        if row["phase"] == "srpo":
            assert row["logp_gap_max"] < 1e-3
            assert row["ratio"] == pytest.approx(1.0, abs=1e-3)


def test_the_same_run_again_says_that_all_is_done(done, capsys):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    run(config(), done)
    assert "all is done" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in done.rglob("*") if p.is_file()} == before


def test_a_finished_run_can_still_be_exported(done, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    run(config(export=True), folder)
    assert load_model(folder / "export").config.dim == config().model.dim
    for name in ("summary.json", "config.json", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (done / name).read_bytes()
    asked = evaluate.get_config()
    asked.checkpoint, asked.chain.label_first = str(folder / "export"), True
    policy, _ = load_policy(asked.lock())  # is asked as it was trained
    lengths = policy.format.prompt_length, policy.format.completion_length
    assert lengths == (config().model.prompt_length, config().model.completion_length)
    assert policy.format.schema == CotSchema()
    told = json.loads((folder / "export" / "she_jax.json").read_text())
    prompt = told["prompt"].format(query="mug", field="title", text="red mug")
    assert prompt == "query: mug\ntitle: red mug\ntitle: red mug\n\n"


def test_that_pairs_are_cut_is_said_once(done, capsys):
    asked = evaluate.get_config()
    asked.checkpoint = str(done)
    policy, _ = load_policy(asked.lock())
    long = Example(uid="a", query="mug", product={"title": "mug " * 99})
    judge = Generator(policy, 8)
    for _ in range(2):
        judge.chains(policy.params, [long] * 3, lambda done: None)
    assert capsys.readouterr().out.count("do not fit into model.prompt_length=") == 1


def test_a_folder_is_of_one_command_at_a_time(done):
    with (
        lock_workdir(done),
        pytest.raises(ValueError, match=r"another command is running in .*run: wait"),
    ):
        run(config(), done)
    run(config(), done)  # and is free again


def test_trap_11_a_resumed_run_equals_the_uninterrupted_one(done, tmp_path, monkeypatch):
    """Killed twice, a step or more after the last checkpoint, then started again."""
    from she_jax.training import logging

    written = logging.MetricsWriter.write
    for dies_after in (("sft", 3), ("srpo", 3)):

        def die(self, phase, step, values, dies_after=dies_after):
            written(self, phase, step, values)
            if (phase, step) == dies_after:
                raise KeyboardInterrupt

        monkeypatch.setattr(logging.MetricsWriter, "write", die)
        with pytest.raises(KeyboardInterrupt):
            run(config(), tmp_path / "run")
        monkeypatch.undo()
    run(config(), tmp_path / "run")
    assert_same_run(done, tmp_path / "run")


def test_sigterm_saves_and_the_same_command_goes_on(done, tmp_path):
    """Through launch.py, in a process of its own."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import test_run\n"
        "from she_jax.training import packing\n"
        "packing.WIDTHS = (2.0,)  # as all tests have it\n"
        "def get_config():\n"
        "    made = test_run.config()\n"
        "    return made.unlock()\n"
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
    said, _ = first.communicate(timeout=240)
    assert first.returncode == 143, said
    assert "SIGTERM: saved sft at step" in said
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert again.returncode == 0, again.stderr
    assert "macro F1" in again.stdout
    assert lines(done) == lines(workdir)


def test_a_run_begins_where_another_ended_and_keeps_what_it_began_with(done, tmp_path):
    """In place of a cold start; the other run may then go."""
    first = tmp_path / "first"
    shutil.copytree(done, first)
    changes = {"start": str(first / "checkpoints" / "srpo"), "rl__steps": 1, "rl__eval_every": 1}
    run(config(**changes), tmp_path / "run")
    assert {row["phase"] for row in lines(tmp_path / "run")} == {"srpo", "eval"}
    before = json.loads((tmp_path / "run" / "summary.json").read_text())["before"]
    assert before == json.loads((done / "eval" / "after.json").read_text())
    best = json.loads((done / "summary.json").read_text())["checkpoint"]
    validation = (tmp_path / "run/eval/step_000000_validation.json").read_text()
    assert validation == (done / f"eval/step_{best:06d}_validation.json").read_text()
    assert (tmp_path / "run/tokenizer.json").read_bytes() == (done / "tokenizer.json").read_bytes()
    shutil.rmtree(first / "checkpoints")
    (tmp_path / "run" / "summary.json").unlink()
    (first / "checkpoints" / "srpo").mkdir(parents=True)
    run(config(**changes), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="holds no whole checkpoint"):
        run(config(**changes), tmp_path / "another")


@pytest.mark.parametrize(
    ("start", "changes", "error", "message"),
    [
        ("nowhere", {}, FileNotFoundError, "expected the checkpoints of a run, such as"),
        ("/nowhere", {}, FileNotFoundError, "expected the checkpoints of a run, such as"),
        ("RUN", {}, FileNotFoundError, "expected the checkpoints of a run, such as"),
        ("RUN/checkpoints/sft", {"chain__label_first": True}, ValueError, "writes the chain"),
        ("RUN/checkpoints/sft", {"model__layers": 9}, ValueError, "of another model: model.layers"),
    ],
)
def test_a_start_that_cannot_be_is_said_at_once(done, tmp_path, start, changes, error, message):
    with pytest.raises(error, match=message):
        run(config(start=start.replace("RUN", str(done)), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_changed_config_over_an_old_workdir_lists_the_keys(done):
    with pytest.raises(ValueError, match=r"rl\.steps: 4 in the workdir, 5 now"):
        run(config(rl__steps=5), done)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rl__top_p": 0.5}, "narrows the top k"),
        ({"rl__temperature": 0.0}, "expected a positive number"),
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
        ({"rl__srpo__correct_from": 0.0}, "rl.srpo.correct_from=0.0: expected a reward"),
        (
            {"method": "dpo", "rl__dynamic_sampling_rounds": 1},
            "method='dpo' samples once, at temperature 1",
        ),
        ({"method": "dpo", "reward__prm": "x"}, "method='dpo' has no use for that reward"),
        ({"method": "sft", "reward__orm": "x"}, "method='sft' has no use for that reward"),
        (
            {"method": "sft", "reward__prm": "x", "reward__combine": "mean"},
            "reward.combine='mean': with method=sft",
        ),
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
        ({"rl__loss_aggregation": "word"}, "normalisation='word': expected one of"),
        ({"data__name": "amazon"}, "data.name='amazon': expected one of"),
        ({"data__name": "esci"}, "needs --config.data.path"),
        ({"data__eval_split": "dev"}, "no pairs in the split 'dev'"),
        ({"kind": "play"}, "kind='play': expected one of"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_trained(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        run(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_that_micro_batches_leave_devices_without_work_is_said(tmp_path, capsys):
    check(config(rl__loss__micro_batches=2), tmp_path)
    assert "4 groups, and so work for 4 of 8 devices" in capsys.readouterr().out
    check(config(), tmp_path)
    assert "devices" not in capsys.readouterr().out


def test_a_folder_in_which_nothing_was_made_takes_another_config(tmp_path):
    """A command that failed early does not stand in the way of the corrected one."""
    few = {"sft__steps": 1, "rl__steps": 0, "eval__pass_k": 0}
    with pytest.raises(ValueError, match="no pairs in the split"):
        run(config(data__eval_split="dev", **few), tmp_path / "run")
    run(config(**few), tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(tmp_path):
    saved = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="srpo step 8: loss nan"):
        finite({"loss": np.float32("nan"), "grad_norm": 1.0}, "srpo", 7, saved)
    assert finite({"loss": 1, "grad_norm": 2}, "srpo", 7, saved) == {"loss": 1.0, "grad_norm": 2.0}


def test_a_checkpoint_judges_a_users_file(done, tmp_path):
    pairs = [
        {"uid": "a", "query": "red sofa", "product": {"title": "crimson couch"}, "label": 4},
        {"uid": "b", "query": "オーク 机", "product": {"title": "机"}},
        {"query": "", "product": {"title": "nothing asked"}},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    changes = {
        "kind": "evaluate",
        "checkpoint": str(done),
        "data__name": "jsonl",
        "data__path": str(file),
        "data__max_bad_share": 0.5,
    }
    run(config(**changes), tmp_path / "out")
    with (tmp_path / "out" / "predictions.jsonl").open() as told:
        judged = [json.loads(line) for line in told]
    assert [line["uid"] for line in judged] == ["a", "b"]
    assert {"label", "probabilities", "well_formed", "steps"} <= judged[0].keys()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["n"] == 1
    run(config(**changes), tmp_path / "out")  # all is done
    with file.open("a") as more:
        more.write(json.dumps(pairs[0] | {"uid": "c"}) + "\n")
    with pytest.raises(ValueError, match="other pairs or of another checkpoint"):
        run(config(**changes), tmp_path / "out")


def test_pairs_are_made_for_the_chain_of_the_policy(done, tmp_path, monkeypatch):
    """Another number of checks would be another world, and other steps in a user's file."""

    class Made(Exception):
        pass

    def made(own, workdir):
        raise Made(own.chain.to_dict())

    monkeypatch.setattr(predict, "make_data", made)
    asked = {"kind": "evaluate", "checkpoint": str(done), "chain__checks": 2}
    with pytest.raises(Made, match="'checks': 0"):
        run(config(**asked), tmp_path / "out")


def test_the_recipe_takes_its_argument():
    made = stage1.get_config("model=smollm2,data=esci")
    assert (made.model.name, made.data.name, made.data.balance) == ("smollm2", "esci", True)
    with pytest.raises(ValueError, match=r"expected model=scratch\|smollm2"):
        stage1.get_config("model=gpt")
