"""The curriculum: its stages in a row, interrupted anywhere, alone, and stopped by a plateau."""

import json
import os
import signal

import pytest
from recipes import SMALL, assert_same_run, changed, config, lines, load_checkpoint

from she_jax.filtering import measure
from she_jax.recipes import curriculum, stage2, stage3
from she_jax.rollouts import collector
from she_jax.runs import policy
from she_jax.runs.run import run
from she_jax.types import UserError

STAGES = ("stage1", "stage2", "stage3")
STAGE = {
    "rl.learning_rate": 3e-4,  # the same in all stages, which then share one compiled update
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


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Blocks of the filter that are smaller than what a stage measures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "BLOCK", 16)
        yield


def recipe(**changes):
    """The curriculum in seconds."""
    values = {k: v for k, v in SMALL.items() if k not in TRAINING} | {"eval.pass_k": 0}
    for name in STAGES:
        skip = {"filter.skip": 40 * (int(name[-1]) - 1)}
        values |= {f"stages.{name}.{k}": v for k, v in (TRAINING | STAGE | skip).items()}
    return changed(curriculum.get_config(), values, **changes)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """An uninterrupted curriculum."""
    workdir = tmp_path_factory.mktemp("stages") / "run"
    run(recipe(), workdir)
    return workdir


def assert_same(expected, actual):
    for stage in STAGES:
        files = ("summary.json", "filter/kept.json")
        assert_same_run(expected / stage, actual / stage, files)
    assert (actual / "summary.json").read_bytes() == (expected / "summary.json").read_bytes()


def test_each_stage_starts_where_the_last_one_ended(done):
    summary = json.loads((done / "summary.json").read_text())
    stages = summary["stages"]
    assert list(stages) == list(STAGES)
    for before, after in (("stage1", "stage2"), ("stage2", "stage3")):
        assert stages[after]["before"]["confusion"] == stages[before]["confusion"]
    assert summary["before"] == stages["stage1"]["before"]
    assert "macro_f1" in summary["longtail"]
    assert [p.name for p in (done / "data").iterdir()] == ["shop_world"]
    for stage in stages:
        rows = [row for row in lines(done / stage) if row["phase"] == "rl"]
        names = {"entropy", "paths", "zero_variance"}
        names |= {f"dynamic_sampling/{name}" for name in ("rounds", "dropped", "surplus")}
        assert names <= rows[-1].keys()
        assert (done / stage / "filter" / "report.html").is_file()


def test_a_curriculum_needs_a_folder_without_a_stages_run(done):
    """And its policy is that of a stage, as the error says."""
    before = (done / "stage1" / "config.json").read_bytes()
    with pytest.raises(UserError, match="belongs to a run with another config"):
        run(recipe(), done / "stage1")
    assert (done / "stage1" / "config.json").read_bytes() == before
    with pytest.raises(UserError, match=r"has stages: give one of them, .*stage3$"):
        load_checkpoint(done)


@pytest.mark.slow  # tests/runs/test_run.py stops a single run
@pytest.mark.parametrize("places", ["evaluation", "start filter evaluation"])
def test_trap_11_a_curriculum_stopped_anywhere_equals_the_uninterrupted_one(
    done, tmp_path, monkeypatch, places
):
    """A signal in stage 1's last moments keeps stage 2 from starting.

    Then stage 2 is killed right before it begins, inside filtering, and inside SRPO.
    """
    workdir = tmp_path / "run"

    def signal_at_the_end(*arguments):
        if arguments[-1] == "after":
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_policy(*arguments)

    evaluate_policy = policy.evaluate_policy
    monkeypatch.setattr(policy, "evaluate_policy", signal_at_the_end)
    with pytest.raises(SystemExit) as stopped:
        run(recipe(), workdir)
    assert stopped.value.code == 143
    assert (workdir / "stage1" / "summary.json").is_file()
    assert not (workdir / "stage2").exists()
    monkeypatch.undo()

    def before_the_stage(*_):
        return (workdir / "stage2").exists()

    def in_the_second_block(path, *_):
        return "stage2" in str(path) and "00001" in str(path)

    def at_an_evaluation(generator, dataset, evaluation, folder, params, step):
        return folder.name == "stage2" and step > 0

    killed = {
        "start": (policy, "adopt", before_the_stage),
        "filter": (measure, "write_records", in_the_second_block),
        "evaluation": (policy, "evaluate_validation", at_an_evaluation),
    }
    for module, name, dies in map(killed.get, places.split()):
        original = getattr(module, name)

        def dying(*arguments, original=original, dies=dies):
            if dies(*arguments):
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(module, name, dying)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(), workdir)
        monkeypatch.undo()
        assert not (workdir / "stage2" / "summary.json").exists()
    run(recipe(), workdir)
    assert_same(done, workdir)


@pytest.mark.slow
def test_a_stage_alone_runs_its_prerequisite_first_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changes = {"rl.steps": 2, "rl.dynamic_sampling_rounds": 0, "filter.pairs": 0}
    values = SMALL | changes | {"eval.pass_k": 0}
    values |= {f"prerequisite.{k}": v for k, v in (TRAINING | changes).items()}
    alone = changed(stage2.get_config(), values, seed=3)

    def output():
        return " ".join(capsys.readouterr().out.split())

    run(alone, tmp_path / "alone")
    start = "init_from=runs/stage1/checkpoints/policy"
    assert f"{start} does not exist yet: first its own run" in output()
    stage1 = tmp_path / "runs" / "stage1"
    first = json.loads((stage1 / "config.json").read_text())
    assert first["seed"] == 3  # what the stages share is set once
    second = json.loads((tmp_path / "alone" / "summary.json").read_text())
    summary = (stage1 / "summary.json").read_bytes()
    assert second["before"]["confusion"] == json.loads(summary)["confusion"]
    # The next command finds it.
    run(alone, tmp_path / "alone")
    assert start not in output()
    # One that was interrupted is finished.
    (stage1 / "summary.json").unlink()
    run(alone, tmp_path / "alone")
    assert f"{start} does not exist yet" in output()
    assert (stage1 / "summary.json").read_bytes() == summary
    # One with other options is taken as it is.
    with pytest.raises(UserError, match=r"prerequisite\.rl\.steps: 2 in the workdir, 9 now"):
        run(changed(alone, {"prerequisite.rl.steps": 9}), tmp_path / "alone")
    assert f"{start}: taken as it is, though its options are not the recipe's" in output()
    assert (stage1 / "summary.json").read_bytes() == summary


def test_the_recipes_of_the_stages_share_what_they_share():
    last = stage3.get_config("data=jsonl")
    last.seed, last.data.path = 5, "pairs.jsonl"
    middle = last.prerequisite
    first = middle.prerequisite
    assert [stage.seed for stage in (first, middle, last)] == [5, 5, 5]
    assert [stage.data.path for stage in (first, middle, last)] == ["pairs.jsonl"] * 3
    assert last.init_from == "runs/stage2-data-jsonl/checkpoints/policy"
    assert middle.init_from == "runs/stage1-data-jsonl/checkpoints/policy"
    first.rl.steps = 7
    assert middle.rl.steps != 7
    whole = curriculum.get_config()
    whole.seed, whole.shopworld.seed = 2, 9
    assert {stage.seed for stage in whole.stages.values()} == {2}
    assert {stage.shopworld.seed for stage in whole.stages.values()} == {9}


def better_at_once(*args):
    """In place of ``evaluate_validation``."""
    *_, step = args
    return {"validation/macro_f1": 0.5 if step else 0.4}


@pytest.mark.slow  # tests/training/test_loop.py has the plateau itself
def test_a_plateau_ends_the_stage_which_is_not_resumed(done, tmp_path, monkeypatch, capsys):
    """No evaluation is better than that of update 1: with a patience of 2 that of 3 is the last.

    Then it is killed between its last checkpoint and its summary.
    """
    monkeypatch.setattr(policy, "evaluate_validation", better_at_once)
    more = {"rl__steps": 12, "rl__eval_every": 1, "rl__patience": 2, "eval__pass_k": 0}
    more |= {"init_from": str(done / "stage1/checkpoints/sft"), "data__dir": str(done / "data")}
    run(config(**more), tmp_path / "run")
    before = lines(tmp_path / "run")
    assert [row["step"] for row in before if row["phase"] == "rl"] == [1, 2, 3]
    assert "no better evaluation for 2 in a row" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["checkpoint"] == 1
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.setattr(collector, "step_batch", None)  # no further rollout is sampled
    run(config(**more), tmp_path / "run")
    assert lines(tmp_path / "run") == before


def test_errors_in_a_later_stage_are_reported_before_the_first(tmp_path):
    with pytest.raises(UserError, match=r"low=2\.0"):
        run(recipe(**{"stages__stage3__filter__low": 2.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    wrong = changed(stage2.get_config(), SMALL | STAGE, rl__difficulty="medum")
    with pytest.raises(UserError, match=r"rl\.difficulty='medum'"):
        run(wrong, tmp_path / "alone")
    assert not (tmp_path / "alone").exists()
