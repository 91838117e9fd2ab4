"""The curriculum: stages in a row, killed anywhere, alone, and stopped by a plateau."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from recipes import SMALL, changed, last_state, lines
from recipes import config as small

from configs import curriculum, stage2, stage3
from she_jax.filtering import measure as filter_run
from she_jax.rollouts import collector as rollouts
from she_jax.runs import policy as learn
from she_jax.runs import run as runs
from she_jax.runs.run import run
from she_jax.training.setup import load_policy

STAGE = {
    "rl.learning_rate": 3e-4,  # a stage with a rate of its own would compile an update of its own
    "rl.steps": 2,
    "rl.dynamic_sampling_rounds": 1,
    "rl.difficulty": "medium",
    "filter.pairs": 40,
    "filter.rollouts": 2,
    "filter.low": 0.0,
    "filter.high": 1.0,
    "filter.clusters": 2,
    "filter.size": 24,
}
TRAINING = {k: v for k, v in SMALL.items() if k.startswith(("rl.", "sft."))}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(filter_run, "BLOCK", 16)


def recipe(**changes):
    """The curriculum in seconds."""
    own = {k: v for k, v in SMALL.items() if k not in TRAINING} | {"eval.pass_k": 0}
    for name in ("stage1", "stage2", "stage3"):
        skip = {"filter.skip": 40 * (int(name[-1]) - 1)}
        own |= {f"stages.{name}.{k}": v for k, v in (TRAINING | STAGE | skip).items()}
    return changed(curriculum.get_config(), own, **changes)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """An uninterrupted curriculum."""
    workdir = tmp_path_factory.mktemp("stages") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filter_run, "BLOCK", 16)
        run(recipe(), workdir)
    return workdir


def assert_same(one, other):
    for stage in ("stage1", "stage2", "stage3"):
        assert lines(one / stage) == lines(other / stage)
        (step, state, host), (other_step, other_state, other_host) = (
            last_state(run / stage) for run in (one, other)
        )
        assert (step, host) == (other_step, other_host)
        jax.tree.map(np.testing.assert_array_equal, state, other_state)
        for name in ("summary.json", "filter/kept.json"):
            assert (one / stage / name).read_bytes() == (other / stage / name).read_bytes()
    assert (one / "summary.json").read_bytes() == (other / "summary.json").read_bytes()


def test_each_stage_starts_where_the_last_one_ended(done):
    summary = json.loads((done / "summary.json").read_text())
    stages = summary["stages"]
    assert list(stages) == ["stage1", "stage2", "stage3"]
    for before, after in (("stage1", "stage2"), ("stage2", "stage3")):
        assert stages[after]["before"]["confusion"] == stages[before]["confusion"]
    assert summary["before"] == stages["stage1"]["before"]
    assert "macro_f1" in summary["longtail"]
    assert [p.name for p in (done / "data").iterdir()] == ["shop_world"]
    for stage in stages:
        rows = [row for row in lines(done / stage) if row["phase"] == "srpo"]
        wanted = {"entropy", "paths", "zero_variance", "refills", "dropped"}
        assert wanted <= rows[-1].keys()
        assert (done / stage / "filter" / "report.html").is_file()


def test_a_curriculum_has_a_folder_of_its_own(done):
    """Not that of a run of one stage; and who asks for its policy is told of the stages'."""
    before = (done / "stage1" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="belongs to a run with another config"):
        run(recipe(), done / "stage1")
    assert (done / "stage1" / "config.json").read_bytes() == before
    asked = ConfigDict({"checkpoint": str(done)})
    with pytest.raises(ValueError, match=r"has stages: give one, .*stage3 say"):
        load_policy(asked)


def test_trap_11_a_curriculum_killed_anywhere_equals_the_uninterrupted_one(
    done, tmp_path, monkeypatch
):
    """In stage 2, one after the other: right before it begins, inside filtering, inside SRPO."""
    workdir = tmp_path / "run"
    for module, name, dies in (
        (runs, "adopt", lambda *_: (workdir / "stage2").exists()),
        (
            filter_run,
            "write_records",
            lambda path, *_: "stage2" in str(path) and "00001" in str(path),
        ),
        (learn, "judge_validation", lambda _, to, *rest: to.name == "stage2" and rest[-1] > 0),
    ):
        whole = getattr(module, name)

        def dying(*arguments, whole=whole, dies=dies):
            if dies(*arguments):
                raise KeyboardInterrupt
            return whole(*arguments)

        monkeypatch.setattr(module, name, dying)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(), workdir)
        monkeypatch.setattr(module, name, whole)
        assert not (workdir / "stage2" / "summary.json").exists()
    run(recipe(), workdir)
    assert_same(done, workdir)


def test_a_stage_alone_makes_the_one_before_after_saying_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plain = {"rl.steps": 2, "rl.dynamic_sampling_rounds": 0, "filter.pairs": 0}
    first = TRAINING | plain
    own = SMALL | plain | {"eval.pass_k": 0} | {f"before.{k}": v for k, v in first.items()}
    config = changed(stage2.get_config(), own, seed=3)
    run(config, tmp_path / "alone")
    said = " ".join(capsys.readouterr().out.split())
    assert "start=runs/stage1/checkpoints/srpo is not there yet: first the stage before" in said
    first = json.loads((tmp_path / "runs" / "stage1" / "config.json").read_text())
    assert first["seed"] == 3  # what the stages share is set once
    second = json.loads((tmp_path / "alone" / "summary.json").read_text())
    one = json.loads((tmp_path / "runs" / "stage1" / "summary.json").read_text())
    assert second["before"]["confusion"] == one["confusion"]
    # The next command finds it.
    run(config, tmp_path / "alone")
    assert "not there yet" not in capsys.readouterr().out


def test_the_recipes_of_the_stages_share_what_they_share():
    last = stage3.get_config("data=jsonl")
    last.seed, last.data.path = 5, "pairs.jsonl"
    middle, first = last.before, last.before.before
    assert [one.seed for one in (first, middle, last)] == [5, 5, 5]
    assert [one.data.path for one in (first, middle, last)] == ["pairs.jsonl"] * 3
    assert last.start == "runs/stage2-data-jsonl/checkpoints/srpo"
    assert middle.start == "runs/stage1-data-jsonl/checkpoints/srpo"
    first.rl.steps = 7
    assert middle.rl.steps != 7
    whole = curriculum.get_config()
    whole.seed, whole.shopworld.seed = 2, 9
    assert {stage.seed for stage in whole.stages.values()} == {2}
    assert {stage.shopworld.seed for stage in whole.stages.values()} == {9}


def better_at_once(*args):
    """A judging in the place of ``evaluate_validation``."""
    *_, step = args
    return {"validation/macro_f1": 0.5 if step else 0.4}


def test_a_plateau_ends_the_stage_and_it_is_not_taken_up_again(tmp_path, monkeypatch, capsys):
    """No judging is better than that of update 1: with a patience of 2 that of 3 is the last.

    Then it was killed between its last checkpoint and its summary.
    """
    monkeypatch.setattr(learn, "judge_validation", better_at_once)
    more = {"rl__steps": 12, "rl__eval_every": 1, "rl__patience": 2, "eval__pass_k": 0}
    run(small(**more), tmp_path / "run")
    before = lines(tmp_path / "run")
    assert [row["step"] for row in before if row["phase"] == "srpo"] == [1, 2, 3]
    assert "no better judging for 2 in a row" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["checkpoint"] == 1
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.setattr(rollouts, "step_batch", None)  # no further rollout may be made
    run(small(**more), tmp_path / "run")
    assert lines(tmp_path / "run") == before


def test_a_signal_in_a_stages_last_moments_keeps_the_next_one_from_starting(tmp_path, monkeypatch):
    whole = learn.judged

    def signalled(*arguments):
        if arguments[-1] == "after":
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments)

    monkeypatch.setattr(learn, "judged", signalled)
    with pytest.raises(SystemExit) as left:
        run(recipe(stages__stage1__filter__pairs=0), tmp_path / "run")
    assert left.value.code == 143
    assert (tmp_path / "run" / "stage1" / "summary.json").is_file()
    assert not (tmp_path / "run" / "stage2").exists()


def test_what_is_wrong_with_a_later_stage_is_said_before_the_first(tmp_path):
    with pytest.raises(ValueError, match=r"low=2\.0"):
        run(recipe(**{"stages__stage3__filter__low": 2.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    wrong = changed(stage2.get_config(), SMALL | STAGE, rl__difficulty="medum")
    with pytest.raises(ValueError, match=r"rl\.aim='medum'"):
        run(wrong, tmp_path / "alone")
    assert not (tmp_path / "alone").exists()
