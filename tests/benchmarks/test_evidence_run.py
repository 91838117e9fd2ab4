"""The study's jobs in processes: failures, interruptions, and what is resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_study import small_config
from stand_in import stand_in, write_metrics

from benchmarks.evidence.plan import job_config, plan_jobs
from benchmarks.evidence.run import _environment, run_study

ROOT = Path(__file__).parents[2]


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
def test_an_invalid_arm_is_reported_before_anything_runs(tmp_path, arm, message):
    with pytest.raises(ValueError, match=message):
        run_study(small_config({"arm": arm}), tmp_path / "run", stand_in)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": "grpo, nobody"}, "only: no arm is named 'nobody'"),
        ({"order": ()}, "order: 'grpo' is missing"),
        ({"workers": 0}, "workers=0: expected at least 1"),
        ({"rates": (1e-4, 1e-4)}, "expected some learning rates, all different"),
    ],
)
def test_invalid_names_and_numbers_are_reported(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_study(small_config({"grpo": {}}, **changes), tmp_path / "run", stand_in)


def test_jobs_share_what_they_compile_and_the_users_environment_comes_back(tmp_path, monkeypatch):
    cache, least = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    monkeypatch.delenv(cache, raising=False)
    monkeypatch.setenv(least, "3")
    with _environment(small_config({"grpo": {}}, cpu_devices=2), tmp_path):
        assert os.environ[cache] == str(tmp_path / "compiled")
        assert os.environ[least] == "3"  # what the user set
    assert cache not in os.environ
    assert os.environ[least] == "3"
    monkeypatch.delenv(least)
    with _environment(small_config({"grpo": {}}), tmp_path):
        assert os.environ[least] == "0"
    assert least not in os.environ


@pytest.mark.slow
def test_failed_jobs_stop_no_others_and_are_tried_again(tmp_path, capfd):
    arms = {
        "grpo": {"seeds": 2, "settings": {"rl.estimator": "grpo"}},
        "fails": {"settings": {"data.path": "fails"}},
        "heir": {"tuned": "fails"},
        "killed": {"tuned": False, "settings": {"data.path": "killed"}},
    }
    config = small_config(arms, rates=(1e-4,))
    with pytest.raises(ValueError, match="3 of 7 jobs are not done") as error:
        run_study(config, tmp_path, stand_in)
    message = str(error.value)
    assert "seed0/fails-0.0001: exit code 1, see" in message
    assert "seed0/killed-0.0003: killed by SIGTERM" in message
    assert "seed0/heir-rate: no learning rate for it: none of the runs of fails" in message
    output = capfd.readouterr().out
    assert "ValueError: a rate that is too high" in output  # the end of its log
    assert "evidence: 4/7" in output
    started = (tmp_path / "started").read_text().split()
    assert set(started[:2]) == {"seed0/start-main", "seed1/start-main"}
    assert started.count("seed1/grpo-0.0001") == 1  # with the rate that was chosen
    assert (tmp_path / "seed0/grpo-0.0001.log").read_text() == "all went well\n"
    results = json.loads((tmp_path / "evidence.json").read_text())
    assert list(results["arms"]["grpo"]["seeds"]) == ["0", "1"]

    (tmp_path / "started").unlink()
    with pytest.raises(ValueError, match="jobs are not done"):
        run_study(config, tmp_path, stand_in)  # tries again what failed, and that alone
    again = (tmp_path / "started").read_text().split()
    assert sorted(again) == ["seed0/fails-0.0001", "seed0/killed-0.0003"]

    (tmp_path / "started").unlink()
    capfd.readouterr()
    run_study(small_config(arms, rates=(1e-4,), only="grpo"), tmp_path, stand_in)
    assert not (tmp_path / "started").exists()
    assert "another version" not in capfd.readouterr().out
    record = tmp_path / "seed0" / "grpo-0.0001.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"code": "older"}))
    run_study(small_config(arms, rates=(1e-4,), only="grpo"), tmp_path, stand_in)
    output = " ".join(capfd.readouterr().out.split())
    assert "with another version of she_jax, and kept: seed0/grpo-0.0001 " in output + " "
    other = small_config(arms | {"grpo": {"seeds": 2, "settings": {"rl.estimator": "rloo"}}})
    with pytest.raises(ValueError, match=r"rl\.estimator: grpo then, rloo now"):
        run_study(other, tmp_path, stand_in)


def test_many_runs_of_another_version_are_counted_after_the_first_five(tmp_path, capfd):
    rates = tuple(float(f"{n}e-4") for n in range(1, 8))
    config = small_config({"grpo": {}}, rates=rates)
    jobs = plan_jobs(config, ["grpo"])
    for job in jobs:
        write_metrics(tmp_path / job.name, 0.5)
        record = {"config": job_config(config, tmp_path, job).to_dict(), "code": "older"}
        Path(f"{tmp_path / job.name}.json").write_text(json.dumps(record))
    run_study(config, tmp_path, stand_in)
    output = " ".join(capfd.readouterr().out.split())
    assert len(jobs) == 8
    assert f"and kept: {', '.join(job.name for job in jobs[:5])} and 3 more " in output + " "
    assert not (tmp_path / "started").exists()


def test_rates_not_worth_trying_are_left_out(tmp_path, capfd):
    """The stand-in does best with the lowest."""
    grpo = {"seeds": 2, "settings": {"rl.estimator": "grpo"}}
    config = small_config({"grpo": grpo}, rates=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3))
    run_study(config, tmp_path, stand_in)
    started = (tmp_path / "started").read_text().split()
    assert set(started[2:5]) == {f"seed0/grpo-{rate}" for rate in ("3e-05", "0.0001", "0.0003")}
    assert started[5:] == ["seed0/grpo-1e-05", "seed1/grpo-1e-05"]
    assert "evidence: 8/8" in capfd.readouterr().out
    arm = json.loads((tmp_path / "evidence.json").read_text())["arms"]["grpo"]
    assert (arm["rates"], len(arm["tried"]), arm["rate"]) == (4, 4, 1e-5)


@pytest.fixture
def waiting(tmp_path):
    """A running command: two jobs that wait for a signal, each in its process."""
    script = tmp_path / "command.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "if __name__ == '__main__':\n"
        "    from pathlib import Path\n"
        "    from stand_in import stand_in\n"
        "    from small_study import small_config\n"
        "    from benchmarks.evidence.run import run_study\n"
        "    waits = {'trained': False, 'seeds': 2}\n"
        "    config = small_config({'base': waits}).unlock()\n"
        "    config.recipe.data.path = 'waits'\n"
        f"    run_study(config, Path({str(tmp_path / 'run')!r}), stand_in)\n"
    )
    files = [tmp_path / f"run/seed{seed}/start-main.pid" for seed in (0, 1)]
    deadline = time.monotonic() + 120
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as command:
        try:
            while not all(file.is_file() and file.read_text() for file in files):
                assert command.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield command, [int(file.read_text()) for file in files], tmp_path / "run"
        finally:
            command.kill()


def has_ended(pid):
    """Whether a process has ended; a zombie has, too."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def test_a_signal_reaches_the_jobs_which_save_and_exit(waiting):
    command, pids, folder = waiting
    shares = [os.sched_getaffinity(pid) for pid in pids]
    assert shares[0] | shares[1] == os.sched_getaffinity(0)
    assert len(os.sched_getaffinity(0)) < 2 or not shares[0] & shares[1]
    with pytest.raises(ValueError, match="another command is running"):
        run_study(small_config({"base": {"trained": False}}), folder, stand_in)
    command.send_signal(signal.SIGTERM)
    output, _ = command.communicate(timeout=60)
    assert command.returncode == 143
    assert "SIGTERM: 2 jobs are asked to save and leave" in output
    assert all((folder / f"seed{seed}/start-main.saved").is_file() for seed in (0, 1))
    assert all(has_ended(pid) for pid in pids)


def test_no_job_outlives_a_parent_that_was_killed(waiting):
    command, pids, folder = waiting
    command.kill()
    command.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while not all(has_ended(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert all((folder / f"seed{seed}/start-main.saved").is_file() for seed in (0, 1))
