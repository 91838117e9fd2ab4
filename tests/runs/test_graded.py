"""Pairs graded 0 to 3 in a user's tables, from training to predictions in the user's values."""

import csv
import json

import pytest
from recipes import FOUR_STEPS, SMALL, changed, config, lines

import she_jax
from she_jax.recipes import evaluate, reward_model
from she_jax.recipes import filter as filter_recipe
from she_jax.runs.config import plain
from she_jax.runs.export import export_run
from she_jax.runs.resolve import resolve
from she_jax.runs.run import run
from she_jax.training.logging import MetricsWriter
from she_jax.training.workdir import claim_workdir

COLORS = ("red", "blue", "green", "black")
THINGS = ("mug", "lamp", "chair", "sofa", "kettle")
TINY = {k: v for k, v in SMALL.items() if not k.startswith("shopworld")} | {
    "model.prompt_length": 0,
    "model.completion_length": 0,
    "model.vocab_size": 400,
    "rl.steps": 2,
    "rl.eval_every": 2,
    "eval.pass_k": 0,
    "filter.pairs": 0,
}


def pairs():
    """Grade 3 for the thing in its color, 2 for its color alone, 1 for the thing, 0 for neither."""
    for n in range(120):
        color, thing = COLORS[n % 4], THINGS[n % 5]
        other = COLORS[(n + 1) % 4] if n % 3 else color
        product = THINGS[(n + 1) % 5] if n % 2 else thing
        grade = (2 if other == color else 0) + (1 if product == thing else 0)
        yield f"{color} {thing} {n // 4}", f"p{n}", f"{other.title()} {product}", grade


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Judgments with three raters, and products that ``sku`` finds."""
    folder = tmp_path_factory.mktemp("tables")
    with (folder / "judgments.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(("query", "docid", "rating", "a", "b", "comment"))
        for query, key, _, grade in pairs():
            writer.writerow((query, key, grade, grade, max(grade - 1, 0), "secret"))
    with (folder / "products.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("sku", "name", "supplier"))
        writer.writerows((key, title, "Acme") for _, key, title, _ in pairs())
    return folder


def settings(tables):
    return TINY | {
        "data.name": "table",
        "data.path": str(tables / "judgments.csv"),
        "data.products": str(tables / "products.csv"),
        "data.columns": "docid=docid+sku,title=name,brand=supplier,raters=a+b",
        "data.labels": "0-3",
    }


def test_a_check_shows_what_a_run_would_read_see_and_have_to_beat(tables, tmp_path, capsys):
    workdir = tmp_path / "run"
    run(changed(config(kind="check").unlock(), settings(tables)), workdir)
    screen = " ".join(capsys.readouterr().out.split())
    for part in (
        "label from rating; raters from a, b",
        "brand from supplier",
        "not read: comment",
        "3 (good)",
        "raters: 120 pairs have two or more; two give the same label to",
        "tokens 50% 90% 95% length longer",
        "brand: Acme",
        "word overlap",
        "outlook: 89 training pairs are few",
    ):
        assert part in screen, part
    assert not (workdir / "checkpoints").exists()
    # The same folder can then be trained in.
    recipe = json.loads((workdir / "config.json").read_text())
    assert recipe["kind"] == "check"
    run(changed(config(kind="check").unlock(), settings(tables) | {"seed": 3}), workdir)


@pytest.mark.slow
def test_a_timed_check_says_the_minutes_of_each_phase(tables, tmp_path, capsys):
    run(changed(config(kind="time").unlock(), settings(tables)), tmp_path / "run")
    screen = capsys.readouterr().out
    for phase in ("cold start, 6 x", "rl, 2 x", "test, before and after", "about"):
        assert f"time: {phase}" in screen
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture(scope="module")
def done(tables, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("graded") / "run"
    run(changed(config().unlock(), settings(tables)), workdir)
    return workdir


def test_a_run_measures_its_lengths_and_keeps_them(done):
    recipe = json.loads((done / "config.json").read_text())
    assert recipe["data"]["labels"] == "0-3"
    assert recipe["model"]["prompt_length"] in (32, 64)
    assert recipe["model"]["completion_length"] % 32 == 0
    summary = json.loads((done / "summary.json").read_text())
    assert set(summary["f1"]) == {"0", "1", "2", "3"}
    assert all(row["cut_chains"] == 0 for row in lines(done) if row["phase"] == "sft")


def test_the_columns_of_a_run_are_those_of_its_evaluation(done, tables, tmp_path):
    given = {k: v for k, v in settings(tables).items() if k in ("data.path", "data.products")}
    given |= {"data.name": "table", "checkpoint": str(done)}
    resolved = resolve(changed(evaluate.get_config(), given), tmp_path)
    assert resolved.data.columns == "docid=docid+sku,title=name,brand=supplier,raters=a+b"
    claim_workdir(tmp_path, plain(resolved))
    gone = given | {"data.path": str(tmp_path / "gone.csv")}
    assert resolve(changed(evaluate.get_config(), gone), tmp_path).data == (
        changed(resolved.unlock(), gone).data
    )


@pytest.mark.slow  # tests/runs/test_run.py stops a run, too
def test_a_resumed_run_equals_the_uninterrupted_one(done, tables, tmp_path, monkeypatch):
    write = MetricsWriter.write

    def die(self, phase, step, values):
        write(self, phase, step, values)
        if (phase, step) == ("rl", 1):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", die)
        with pytest.raises(KeyboardInterrupt):
            run(changed(config().unlock(), settings(tables)), tmp_path / "run")
    run(changed(config().unlock(), settings(tables)), tmp_path / "run")
    assert lines(tmp_path / "run") == lines(done)


def test_the_filter_and_the_reward_model_take_the_labels_of_the_policy(done, tmp_path):
    small = {"filter.pairs": 24, "filter.rollouts": 2, "filter.high": 1.0, "filter.low": 0.0}
    small |= {"eval.batch_size": 16, "checkpoint": str(done), "mesh.data": 1, "mesh.fsdp": -1}
    run(changed(filter_recipe.get_config(), small), tmp_path / "filter")
    report = json.loads((tmp_path / "filter" / "filter" / "report.json").read_text())
    assert set(report["by_class"]) == {"0", "1", "2", "3"}
    prm = FOUR_STEPS | {"reference_sft.steps": 0, "prm.pairs": 16, "prm.policy_pairs": 8}
    prm |= {"prm.eval_pairs": 4, "prm.batch_size": 16, "prm.votes": 0, "checkpoint": str(done)}
    run(changed(reward_model.get_config(), prm), tmp_path / "prm")
    queries = (tmp_path / "prm" / "step_queries" / "train.jsonl").read_text()
    assert '"label"' in queries


def test_an_exported_judge_predicts_in_the_users_values(done):
    rows = [{"query": q, "title": title} for q, _, title, _ in pairs()][:6]
    rows[2] = {"query": ""}
    judge = she_jax.load_judge(done)
    predictions = judge.predict(rows)
    assert [p.get("error") for p in predictions] == [None, None, "empty query", None, None, None]
    # The columns of the run's tables are known.
    first = rows[0] | {"brand": "Acme"}
    named = {"query": rows[0]["query"], "name": rows[0]["title"], "supplier": "Acme"}
    again, (same,) = judge.predict([first, first]), judge.predict([named])
    assert again[0] == same | {"uid": "line-1"}, (again, same)
    bad = {"query": "", "title": "mug"}
    (unread,) = judge.predict([bad])
    assert unread.keys() == predictions[0].keys()
    assert (unread["label"], unread["steps"], unread["error"]) == (None, [], "empty query")
    assert judge.metrics["n"]
    exported = she_jax.load_judge(export_run(done)).predict(rows)
    assert exported == predictions
    for prediction in predictions:
        assert prediction["label"] in (None, 0, 1, 2, 3)
        assert set(prediction.get("probabilities") or "0123") == set("0123")
