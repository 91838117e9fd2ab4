"""The evidence's jobs: their order, what they need, the choice of a rate, and their processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from small_study import small
from stand_in import leave, stand_in

from benchmarks.evidence.plan import (
    Job,
    arms,
    best_rate,
    job_config,
    plan,
    row,
    tried,
    worth_trying,
)
from benchmarks.evidence.run import _environment, run_evidence
from configs import evidence as recipe
from configs import stage1

ROOT = Path(__file__).parents[2]


def names(config):
    return [job.name for job in plan(config, config.order)]


# ---------------------------------------------------------------------- the plan


def test_starts_come_first_then_the_rates_of_the_first_seed_then_the_other_seeds():
    config = small({"base": {"trained": False, "seeds": 2}, "grpo": {"seeds": 2}})
    assert names(config) == [
        "seed0/start-main",
        "seed1/start-main",
        "seed0/grpo-0.0001",
        "seed0/grpo-0.0003",
        "seed1/grpo-rate",
    ]
    last = plan(config, config.order)[-1]
    assert last.needs == ("seed1/start-main",)
    assert last.after == ("seed0/grpo-0.0001", "seed0/grpo-0.0003")


def test_an_arm_that_takes_anothers_rate_brings_its_runs_along():
    """Also where it is asked for alone; and its own cold start besides."""
    config = small(
        {"grpo": {}, "other": {"start": "checks_2", "tuned": "grpo"}},
    )
    jobs = plan(config, ["other"])
    assert [job.name for job in jobs] == [
        "seed0/start-main",
        "seed0/grpo-0.0001",
        "seed0/grpo-0.0003",
        "seed0/start-checks_2",
        "seed0/other-rate",
    ]
    assert (jobs[-1].like, jobs[-1].needs) == ("grpo", ("seed0/start-checks_2",))


def test_reward_models_come_before_the_arms_that_ask_for_them():
    """The examiner once, of the first seed; a scalar one a seed, since it reads tokens."""
    settings = {"reward.model": recipe.EXAMINER, "reward.scalar": recipe.SCALAR}
    config = small({"arm": {"seeds": 2, "tuned": False, "settings": settings}})
    jobs = plan(config, config.order)
    assert [job.name for job in jobs] == [
        "seed0/start-main",
        "examiner-main",
        "seed0/scalar-main",
        "seed0/arm-0.0003",
        "seed1/start-main",
        "seed1/scalar-main",
        "seed1/arm-0.0003",
    ]
    assert jobs[-1].needs == (
        "seed1/start-main",
        "seed0/start-main",
        "examiner-main",
        "seed1/scalar-main",
    )
    own = job_config(config, Path("runs/x"), jobs[-1])
    assert own.reward.model == "runs/x/examiner-main"
    assert own.reward.scalar == "runs/x/seed1/scalar-main"
    examiner = job_config(config, Path("runs/x"), jobs[1])
    assert (examiner.kind, examiner.checkpoint) == ("reward_model", "runs/x/seed0/start-main")


def test_a_job_is_the_recipe_with_what_its_arm_changes():
    config = small({"arm": {"start": "checks_2", "settings": {"rl.srpo.w_step": 0.5}, "seeds": 2}})
    job = Job(kind="arm", of="arm", seed=1, rate=1e-3)
    own = job_config(config, Path("w"), job)
    assert (own.rl.srpo.w_step, own.rl.learning_rate, own.chain.checks) == (0.5, 1e-3, 2)
    assert (own.seed, own.shopworld.seed, own.data.dir) == (1, 1, "w/data")
    assert own.start == "w/seed1/start-checks_2/checkpoints/sft"
    start = job_config(config, Path("w"), Job(kind="start", of="checks_2", seed=1))
    assert (start.start, start.rl.steps, start.data.dir) == ("", 0, own.data.dir)
    assert own.sft == start.sft
    assert config.recipe.rl.srpo.w_step == 1.0  # the recipe itself is as it was


@pytest.mark.parametrize("stages", [{}, {"a": {}}])
def test_a_jobs_seed_is_added_to_those_of_the_config(stages):
    """None is ignored: another one of the examiner is another examiner, of the same pairs."""
    config = small({"arm": {"stages": stages}}).unlock()
    config.update_from_flattened_dict({"examiner.seed": 30, "scalar.seed": 40})
    arm, examiner, scalar = (
        job_config(config, Path("w"), Job(kind=kind, of=of, seed=1, rate=1e-4))
        for kind, of in (("arm", "arm"), ("examiner", "main"), ("scalar", "main"))
    )
    first = arm.stages.a if stages else arm
    assert (arm.seed, first.seed, first.shopworld.seed) == (1, 1, 1)
    assert (examiner.seed, scalar.seed) == (31, 41)
    config.recipe.shopworld.seed = 2
    with pytest.raises(ValueError, match=r"shopworld\.seed=2: expected 0, they are those of seeds"):
        job_config(config, Path("w"), Job(kind="start", of="main", seed=1))


def test_an_arm_without_seeds_is_run_where_more_are_asked_for():
    config = small({"base": {"trained": False}, "grpo": {"seeds": 0}})
    assert [job.of for job in plan(config, arms(config))] == ["main"]
    with pytest.raises(ValueError, match=r"'grpo' has no seeds .*; set --config.arms.grpo.seeds"):
        arms(small({"grpo": {"seeds": 0}}, only="grpo"))


def test_the_stages_of_a_curriculum_keep_the_proportions_of_their_rates():
    stages = {"a": {"rl.steps": 40}, "b": {"rl.steps": 20, "rl.learning_rate": 1e-4}}
    config = small({"she": {"stages": stages}})
    own = job_config(config, Path("w"), Job(kind="arm", of="she", seed=0, rate=6e-4))
    assert own.kind == "curriculum"
    assert [stage.rl.learning_rate for stage in own.stages.values()] == pytest.approx([6e-4, 2e-4])
    assert [stage.rl.steps for stage in own.stages.values()] == [40, 20]
    assert own.stages.a.start == "w/seed0/start-main/checkpoints/sft"
    assert own.stages.b.start == ""


def test_a_stage_may_have_a_reward_model_of_its_own():
    """Which is trained before the arm, as one of the settings is."""
    stages = {"a": {}, "b": {"reward.model": recipe.EXAMINER}}
    config = small({"she": {"stages": stages, "tuned": False}})
    job = plan(config, config.order)[-1]
    assert job.needs == ("seed0/start-main", "examiner-main")
    own = job_config(config, Path("w"), job)
    assert [stage.reward.model for stage in own.stages.values()] == ["", "w/examiner-main"]


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"settings": {"rl.speed": 3}}, r"arms.arm.settings.*speed"),
        ({"settings": {"rl.steps": "many"}}, r"arms.arm.settings.*many"),
        ({"start": "moon"}, "arms.arm.start='moon': expected one of"),
        ({"seeds": 3}, "arms.arm.seeds=3: expected 0 to 2"),
        ({"tuned": "nobody"}, "tuned='nobody': expected an arm that is tuned itself"),
        ({"against": ("nobody",)}, "against: no arm is named 'nobody'"),
    ],
)
def test_a_plan_that_cannot_be_is_said_before_anything_runs(tmp_path, arm, message):
    with pytest.raises(ValueError, match=message):
        run_evidence(small({"arm": arm}), tmp_path / "run", stand_in)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": "grpo, nobody"}, "only: no arm is named 'nobody'"),
        ({"order": ()}, "order: 'grpo' is missing"),
        ({"workers": 0}, "workers=0: expected at least 1"),
        ({"rates": (1e-4, 1e-4)}, "expected some learning rates, each another one"),
    ],
)
def test_names_and_numbers_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_evidence(small({"grpo": {}}, **changes), tmp_path / "run", stand_in)


@pytest.mark.parametrize("pairs", ["", "model=smollm2,data=esci", "data=jsonl"])
def test_every_job_of_the_real_recipe_has_a_config(pairs):
    """No arm changes a key that the recipe does not have."""
    config = recipe.get_config(pairs)
    assert arms(config) == list(config.order)
    jobs = plan(config, config.order)
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        before = {one.name for one in jobs[: jobs.index(job)]}
        assert before.issuperset(job.needs + job.after)
        own = job_config(config, Path("w"), replace(job, rate=job.rate or 1e-4))
        assert own.is_locked


def test_other_pairs_are_learnt_from_in_four_ways_at_the_sizes_of_stage_1():
    arg = "model=smollm2,data=esci"
    config, single = recipe.get_config(arg), stage1.get_config(arg)
    assert config.order == ("cold_start", "grpo", "srpo", "sft", "dpo")
    assert {arm.seeds for arm in config.arms.values()} == {3}
    for name in config.order[1:]:
        own = job_config(config, Path("w"), Job(kind="arm", of=name, seed=1, rate=1e-5))
        assert (own.model, own.sft, own.data.name) == (single.model, single.sft, "esci")
        assert (own.rl.prompts, own.rl.steps) == (single.rl.prompts, single.rl.steps)
        assert (own.rl.aim, own.rl.refill, own.filter.pairs) == ("even", 0, 0)


def test_no_arm_is_given_more_rows_or_rollouts_than_another():
    config = recipe.get_config()
    for name, arm in config.arms.items():
        if not arm.trained:
            continue
        job = Job(kind="arm", of=name, seed=0, rate=1e-4)
        own = job_config(config, Path("w"), job)
        stages = list(own.stages.values()) if arm.stages else [own]
        whole = arm.table in ("main", "a fifth annotated", "checks")
        updates = config.recipe.rl.steps // (1 if whole else 4)
        assert sum(stage.rl.steps for stage in stages) == updates, name
        assert {stage.rl.prompts * stage.rl.group_size for stage in stages} == {64}, name
        sampled = [s for s in stages if s.method != "sft" or s.offline.chains == "rejection"]
        assert not any(s.offline.pairs or s.rl.refill or s.filter.pairs for s in sampled), name


def test_srpo_leaves_alone_what_did_worse_and_other_estimators_do_not():
    config = recipe.get_config()
    for name, arm in config.arms.items():
        own = job_config(config, Path("w"), Job(kind="arm", of=name, seed=0, rate=1e-4))
        for stage in list(own.stages.values()) if arm.stages else [own]:
            if arm.trained and stage.method == "online":
                one_sign = (stage.rl.estimator == "srpo") != name.endswith(("_sign", "_signs"))
                assert stage.rl.negative == (0 if one_sign else 1), name


def test_jobs_share_what_they_compile_and_the_users_environment_comes_back(tmp_path, monkeypatch):
    cache, least = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    monkeypatch.delenv(cache, raising=False)
    monkeypatch.setenv(least, "3")
    with _environment(small({"grpo": {}}, cpu_devices=2), tmp_path):
        assert os.environ[cache] == str(tmp_path / "compiled")
        assert os.environ[least] == "3"  # the user's own
    assert cache not in os.environ
    assert os.environ[least] == "3"
    monkeypatch.delenv(least)
    with _environment(small({"grpo": {}}), tmp_path):
        assert os.environ[least] == "0"
    assert least not in os.environ


# ---------------------------------------------------------------------- the rates


def test_the_rate_that_reached_most_on_validation_is_taken(tmp_path):
    config = small({"grpo": {"seeds": 2}}, rates=(1e-3, 3e-4, 1e-4))
    assert row(config, "grpo", {}).rate is None
    for rate, score in ((1e-3, 0.5), (3e-4, 0.7), (1e-4, 0.6)):
        leave(tmp_path / f"seed0/grpo-{rate:g}", score)
    scores = tried(config, tmp_path, "grpo")
    assert scores == {1e-4: 0.6, 3e-4: 0.7, 1e-3: 0.5}
    assert row(config, "grpo", scores).name == "seed0/grpo-0.0003"


def test_a_rate_that_reached_nothing_was_tried_too(tmp_path):
    config = small({"grpo": {}}, rates=(1e-4,))
    leave(tmp_path / "seed0/grpo-0.0001", 0.0)
    assert tried(config, tmp_path, "grpo") == {1e-4: 0.0}


def test_of_rates_that_reached_the_same_the_lowest_is_taken():
    assert best_rate({3e-4: 0.7, 1e-4: 0.7, 1e-3: 0.6}) == 1e-4


@pytest.mark.parametrize(
    ("reached", "rates"),
    [
        ((), (2, 3, 4)),
        ((0, 0, 7, 8, 7, 0, 0), (2, 3, 4)),
        ((0, 0, 0, 0, 1, 2, 1), (2, 3, 4, 5, 6)),  # 5 is best, and 6 shows that it is
        ((9, 8, 7, 6, 5, 4, 3), (0, 1, 2, 3, 4)),
        ((9, 3, 7, 6, 5, 4, 3), (1, 2, 3, 4)),  # 0 was not to be known of
        ((8, 8, 8, 8, 8, 8, 8), (0, 1, 2, 3, 4)),
        ((None, None, None, None, 1, 0, 0), (2, 3, 4, 5)),
    ],
)
def test_rates_are_tried_outwards_as_long_as_the_outermost_is_best(reached, rates):
    config = small({"grpo": {}}, rates=(6.0, 5.0, 0.0, 1.0, 2.0, 3.0, 4.0))
    scores = {float(n): score for n, score in enumerate(reached) if score is not None}
    assert worth_trying(config, scores) == list(rates)


def test_few_rates_are_all_tried():
    for rates in ((1e-4,), (1e-4, 3e-4), (3e-5, 1e-4, 3e-4)):
        config = small({"grpo": {}}, rates=rates)
        assert worth_trying(config, {}) == list(rates)
        assert [job.after for job in plan(config, ["grpo"])] == [()] * (1 + len(rates))


def test_the_best_of_all_judgings_counts_those_of_all_stages(tmp_path):
    config = small({"she": {}}, rates=(1e-4,))
    folder = tmp_path / "seed0/she-0.0001"
    for stage, score in (("stage1", 0.8), ("stage2", 0.7)):
        leave(folder / stage, score)
    (folder / "summary.json").write_text("{}")
    assert tried(config, tmp_path, "she") == {1e-4: 0.8}


# ---------------------------------------------------------------------- the processes


def test_a_run_in_processes_survives_what_fails_and_goes_on(tmp_path, capfd):
    arms = {
        "grpo": {"seeds": 2, "settings": {"rl.estimator": "grpo"}},
        "fails": {"settings": {"data.path": "fails"}},
        "heir": {"tuned": "fails"},
        "killed": {"tuned": False, "settings": {"data.path": "killed"}},
    }
    config = small(arms, rates=(1e-4,))
    with pytest.raises(ValueError, match="3 of 7 jobs are not done") as error:
        run_evidence(config, tmp_path, stand_in)
    said = str(error.value)
    assert "seed0/fails-0.0001: exit code 1, see" in said
    assert "seed0/killed-0.0003: killed by SIGTERM" in said
    assert "seed0/heir-rate: no learning rate for it: none of the runs of fails" in said
    shown = capfd.readouterr().out
    assert "ValueError: a rate that is too high" in shown  # the end of its log
    assert "evidence: 4/7" in shown
    started = (tmp_path / "started").read_text().split()
    assert set(started[:2]) == {"seed0/start-main", "seed1/start-main"}
    assert started.count("seed1/grpo-0.0001") == 1  # with the rate that was chosen
    assert (tmp_path / "seed0/grpo-0.0001.log").read_text() == "all went well\n"
    found = json.loads((tmp_path / "evidence.json").read_text())
    assert list(found["arms"]["grpo"]["seeds"]) == ["0", "1"]

    (tmp_path / "started").unlink()
    with pytest.raises(ValueError, match="jobs are not done"):
        run_evidence(config, tmp_path, stand_in)  # tries again what failed, and that alone
    again = (tmp_path / "started").read_text().split()
    assert sorted(again) == ["seed0/fails-0.0001", "seed0/killed-0.0003"]

    (tmp_path / "started").unlink()
    capfd.readouterr()
    run_evidence(small(arms, rates=(1e-4,), only="grpo"), tmp_path, stand_in)
    assert not (tmp_path / "started").exists()
    assert "another version" not in capfd.readouterr().out
    record = tmp_path / "seed0" / "grpo-0.0001.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"code": "older"}))
    run_evidence(small(arms, rates=(1e-4,), only="grpo"), tmp_path, stand_in)
    said = " ".join(capfd.readouterr().out.split())
    assert "with another version of she_jax, and kept: seed0/grpo-0.0001 " in said + " "
    other = small(arms | {"grpo": {"seeds": 2, "settings": {"rl.estimator": "rloo"}}})
    with pytest.raises(ValueError, match=r"rl\.estimator: grpo then, rloo now"):
        run_evidence(other, tmp_path, stand_in)


def test_many_runs_of_another_version_are_counted_after_the_first_five(tmp_path, capfd):
    rates = tuple(float(f"{n}e-4") for n in range(1, 8))
    config = small({"grpo": {}}, rates=rates)
    jobs = plan(config, ["grpo"])
    for job in jobs:
        leave(tmp_path / job.name, 0.5)
        own = job_config(config, tmp_path, job).to_dict()
        Path(f"{tmp_path / job.name}.json").write_text(json.dumps({"config": own, "code": "older"}))
    run_evidence(config, tmp_path, stand_in)
    said = " ".join(capfd.readouterr().out.split())
    assert len(jobs) == 8
    assert f"and kept: {', '.join(job.name for job in jobs[:5])} and 3 more " in said + " "
    assert not (tmp_path / "started").exists()


def test_rates_that_need_not_be_tried_are_left_out(tmp_path, capfd):
    """The stand-in does best with the lowest."""
    grpo = {"seeds": 2, "settings": {"rl.estimator": "grpo"}}
    config = small({"grpo": grpo}, rates=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3))
    run_evidence(config, tmp_path, stand_in)
    started = (tmp_path / "started").read_text().split()
    assert set(started[2:5]) == {f"seed0/grpo-{rate}" for rate in ("3e-05", "0.0001", "0.0003")}
    assert started[5:] == ["seed0/grpo-1e-05", "seed1/grpo-1e-05"]
    assert "evidence: 8/8" in capfd.readouterr().out
    arm = json.loads((tmp_path / "evidence.json").read_text())["arms"]["grpo"]
    assert (arm["rates"], len(arm["tried"]), arm["rate"]) == (4, 4, 1e-5)


@pytest.fixture
def waiting(tmp_path):
    """A command at work: two jobs that wait for a signal, in processes of their own."""
    script = tmp_path / "command.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "if __name__ == '__main__':\n"
        "    from pathlib import Path\n"
        "    from stand_in import stand_in\n"
        "    from small_study import small\n"
        "    from benchmarks.evidence.run import run_evidence\n"
        "    waits = {'trained': False, 'seeds': 2}\n"
        "    config = small({'base': waits}).unlock()\n"
        "    config.recipe.data.path = 'waits'\n"
        f"    run_evidence(config, Path({str(tmp_path / 'run')!r}), stand_in)\n"
    )
    command = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    files = [tmp_path / f"run/seed{seed}/start-main.pid" for seed in (0, 1)]
    deadline = time.monotonic() + 120
    while not all(file.is_file() and file.read_text() for file in files):
        assert command.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield command, [int(file.read_text()) for file in files], tmp_path / "run"
    command.kill()


def gone(pid):
    """Whether a process has ended; one that nobody waits for has, too."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def test_a_signal_reaches_the_jobs_which_save_and_leave(waiting):
    command, pids, folder = waiting
    shares = [os.sched_getaffinity(pid) for pid in pids]
    assert shares[0] | shares[1] == os.sched_getaffinity(0)
    assert len(os.sched_getaffinity(0)) < 2 or not shares[0] & shares[1]
    with pytest.raises(ValueError, match="another command is running"):
        run_evidence(small({"base": {"trained": False}}), folder, stand_in)
    command.send_signal(signal.SIGTERM)
    said, _ = command.communicate(timeout=60)
    assert command.returncode == 143
    assert "SIGTERM: 2 jobs are asked to save and leave" in said
    assert all((folder / f"seed{seed}/start-main.saved").is_file() for seed in (0, 1))
    assert all(gone(pid) for pid in pids)


def test_no_job_outlives_a_parent_that_was_killed(waiting):
    command, pids, folder = waiting
    command.kill()
    command.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert all((folder / f"seed{seed}/start-main.saved").is_file() for seed in (0, 1))
