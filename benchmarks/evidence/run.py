"""Runs the evidence: its jobs in processes of their own, some side by side, none of them twice.

``plan`` has the plan, ``summarize`` what the runs say, ``report`` and ``plots`` what is made of
that.
"""

import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

import she_jax
from benchmarks.evidence.plan import (
    Job,
    arms,
    best_rate,
    done,
    flat,
    job_config,
    plan,
    tried,
    worth_trying,
)
from she_jax.training.files import write_json
from she_jax.training.logging import Progress, say
from she_jax.training.stop import StopSignal
from she_jax.training.workdir import Config, held

GRACE = 60.0  # seconds that a job has to save in, once its parent is gone
TAIL = 5  # lines of a failed job's log to show


def run_job(config: Config, folder: Path) -> None:
    """What a job does: a run like any other."""
    logging.set_verbosity(logging.WARNING)  # Orbax and TFDS tell much
    # Imported here, in the process of the job: what runs the jobs has no use for it.
    from she_jax.runs.run import run
    from she_jax.training.setup import make_data

    first = next(iter(config.stages.values())) if config.kind == "curriculum" else config
    if "data" in first:  # those that inherit their pairs find them made
        Path(first.data.dir).mkdir(parents=True, exist_ok=True)
        with Path(first.data.dir, "lock").open("w") as lock:  # two arms may want the same new set
            fcntl.flock(lock, fcntl.LOCK_EX)
            make_data(first, folder)
    run(config, folder)


def run_evidence(
    config: Config, workdir: Path, job: Callable[[Config, Path], None] = run_job
) -> None:
    """Runs what is not done yet, then writes the tables and the plots.

    Args:
      config: of ``configs/evidence.py``.
      workdir: where all of it goes.
      job: does one job, given its config and its folder, and leaves ``summary.json`` there.

    Raises:
      ValueError: for a plan that cannot be, for a folder whose runs had other options, and at the
        end if jobs failed.
      SystemExit: when a signal asked to stop, after the jobs have saved.
    """
    # Imported here, since the processes of the jobs import this file and have no use for them.
    from benchmarks.evidence.plots import draw
    from benchmarks.evidence.report import write_report

    jobs = plan(config, arms(config))
    if config.workers < 1:
        raise ValueError(f"workers={config.workers}: expected at least 1")
    _check_done(config, workdir, plan(config, config.order))
    with _claimed(workdir, config), _environment(config, workdir), StopSignal() as stop:
        crew = Crew(config, workdir, jobs, job)
        try:
            crew.work(stop, lambda: write_report(config, workdir))
        finally:
            crew.end()
        draw(write_report(config, workdir), workdir)
    say(f"tables and plots: {workdir / 'tables.md'}")
    if crew.failed:
        told = "\n".join(f"  {name}: {reason}" for name, reason in crew.failed.items())
        raise ValueError(
            f"{len(crew.failed)} of {len(jobs)} jobs are not done:\n{told}\n"
            "The same command tries them again"
        )


class Crew:
    """The processes at work, and what is done, failed and still to do.

    Args:
      config, workdir, job: as ``run_evidence`` has them.
      jobs: in the order in which they are to be started.
    """

    def __init__(
        self, config: Config, workdir: Path, jobs: list[Job], job: Callable[[Config, Path], None]
    ):
        self._config, self._workdir, self._job = config, workdir, job
        self._waiting = list(jobs)
        self._running: dict[int, tuple[Job, str, BaseProcess]] = {}  # by worker
        self._done: set[str] = set()
        self._total = len(jobs)
        self._cpus = _shares(config.workers)
        self.failed: dict[str, str] = {}  # name of a job to the reason

    def work(self, stop: StopSignal, report: Callable[[], Any]) -> None:
        """Starts one job after the other, until none is left or a signal asks to stop.

        Args:
          stop: asks to stop.
          report: called when jobs have ended.

        Raises:
          SystemExit: for a signal, when the jobs have saved and left.
        """
        while self._settle():
            pass
        done = len(self._done)
        with Progress("evidence", total=self._total, done=done, alike=False) as progress:
            while self._waiting or self._running:
                self._start()
                assert self._running, "every job that is left waits for another one"
                if stop:
                    self._leave(stop, progress)
                sentinels = [process.sentinel for *_, process in self._running.values()]
                connection.wait(sentinels, timeout=0.5)  # a signal is noticed that soon
                if self._reap(progress):
                    while self._settle():
                        pass
                    report()
                progress.update(len(self._done), running=len(self._running))

    def end(self) -> None:
        """Leaves no process behind, whatever has happened."""
        for *_, process in self._running.values():
            process.kill()
            process.join()

    def _settle(self) -> bool:
        """Sorts out what needs no process: what is done, what can never be. Was there any?"""
        before = len(self._waiting)
        for job in list(self._waiting):
            name = job.name
            if missing := [need for need in job.needs if need in self.failed]:
                self.failed[name] = f"it needs {missing[0]}"
            elif not self._ready(job):
                continue
            else:
                try:
                    needed, rated = self._needed(job), self._rated(job)
                except (OSError, ValueError) as error:
                    self.failed[name] = f"no learning rate for it: {error}"
                else:
                    if needed and not done(self._workdir, rated):
                        continue
                    self._done.add(name)
            self._waiting.remove(job)
        return len(self._waiting) < before

    def _ready(self, job: Job) -> bool:
        ended = self._done | self.failed.keys()
        return self._done.issuperset(job.needs) and ended.issuperset(job.after)

    def _needed(self, job: Job) -> bool:
        """Whether a job is to be run at all: not with a rate far from where rates do well."""
        if job.rate is None or not job.after:
            return True
        return job.rate in worth_trying(self._config, tried(self._config, self._workdir, job.of))

    def _rated(self, job: Job) -> Job:
        """The job with the learning rate that is chosen by now.

        Raises:
          ValueError: if no rate was tried to the end.
        """
        if not job.like:
            return job
        scores = tried(self._config, self._workdir, job.like)
        if not scores:
            raise ValueError(f"none of the runs of {job.like} that try them is done")
        return replace(job, rate=best_rate(scores))

    def _start(self) -> None:
        """Gives every idle worker the first job that is ready."""
        for worker in range(self._config.workers):
            job = next((one for one in self._waiting if self._ready(one)), None)
            if worker in self._running or job is None:
                continue
            self._waiting.remove(job)
            rated = self._rated(job)
            folder = self._workdir / rated.name
            values = job_config(self._config, self._workdir, rated).to_dict()
            write_json(Path(f"{folder}.json"), {"config": values, "code": code()})
            process = get_context("spawn").Process(
                target=_work, args=(self._job, values, folder, self._cpus[worker])
            )
            process.start()
            self._running[worker] = job, rated.name, process

    def _reap(self, progress: Progress) -> bool:
        """Takes note of the jobs that have ended. Were there any?"""
        ended = [n for n, (*_, process) in self._running.items() if process.exitcode is not None]
        for worker in ended:
            job, folder, process = self._running.pop(worker)
            process.join()
            summary, log = self._workdir / folder / "summary.json", self._workdir / f"{folder}.log"
            if process.exitcode == 0 and summary.is_file():
                self._done.add(job.name)
                continue
            self.failed[job.name] = f"{_cause(process.exitcode)}, see {log}"
            progress.print(f"{folder}: {self.failed[job.name]}\n{_tail(log)}")
        return bool(ended)

    def _leave(self, stop: StopSignal, progress: Progress) -> None:
        """Passes a signal on, and leaves when the jobs have saved."""
        progress.print(f"{stop.name}: {len(self._running)} jobs are asked to save and leave")
        for *_, process in self._running.values():
            process.terminate()
        for *_, process in self._running.values():
            process.join()
        progress.print("the same command goes on from here")
        raise SystemExit(stop.exit_code)


# -------------------------------------------------------------------------- in a job's process


def _work(
    job: Callable[[Config, Path], None], values: Mapping[str, Any], folder: Path, cpus: set[int]
) -> None:
    os.setsid()  # Ctrl-C is the parent's: it passes one signal on
    log = os.open(f"{folder}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)  # before JAX counts them for its threads
    fcntl.flock(log, fcntl.LOCK_EX)  # until the same job of a parent that was killed is gone
    job(ConfigDict(values).lock(), folder)


def _leave_with_parent() -> None:
    """Does for a parent that was killed what it can no longer do itself."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


# -------------------------------------------------------------------------- the surroundings


def _check_done(config: Config, workdir: Path, jobs: list[Job]) -> None:
    """Checks that what is done was done with the config that it would have now.

    What was done with another version of the package is said, and stays.

    Raises:
      ValueError: listing the keys that differ.
    """
    other, version = [], code()
    for job in jobs:
        for rate in config.rates if job.like else (job.rate,):
            own = replace(job, rate=rate)
            record = Path(f"{workdir / own.name}.json")
            now = flat(json.loads(json.dumps(job_config(config, workdir, own).to_dict())))
            if not done(workdir, own) or not record.is_file():
                continue
            written = json.loads(record.read_text(encoding="utf-8"))
            other += [own.name] if written["code"] != version else []
            then = flat(written["config"])
            lines = [
                f"  {key}: {then.get(key, 'absent')} then, {now.get(key, 'absent')} now"
                for key in sorted(then.keys() | now.keys())
                if then.get(key, "absent") != now.get(key, "absent")
            ]
            if lines:
                raise ValueError(
                    f"{workdir / own.name} was done with another config:\n"
                    + "\n".join(lines)
                    + "\n"
                    "Give a new folder with --workdir, the old values, or delete that run"
                )
    if names := list(dict.fromkeys(other)):
        rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
        say(f"done with another version of she_jax, and kept: {', '.join(names[:5])}{rest}")


def code() -> str:
    """Tells one version of the package from another."""
    files = sorted(Path(she_jax.__file__).parent.rglob("*.py"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


@contextmanager
def _claimed(workdir: Path, config: Config) -> Iterator[None]:
    """Keeps the folder to this command, and leaves the config for those who read it later.

    Raises:
      ValueError: if it is another kind of run's, or another command is at work in it.
    """
    path = workdir / "config.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("kind") != config.kind:
        raise ValueError(f"{workdir} belongs to a run of another kind: give a new --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    with held(workdir):
        write_json(path, config.to_dict())
        yield


@contextmanager
def _environment(config: Config, workdir: Path) -> Iterator[None]:
    """What a new process reads as it starts, JAX above all."""
    before = dict(os.environ)
    # All arms are the same few programs: they are compiled once, the small ones too.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str((workdir / "compiled").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    own = {name: before.get(name, value) for name, value in cache.items()}
    if "xla_force_host_platform_device_count" not in before.get("XLA_FLAGS", ""):
        own["JAX_NUM_CPU_DEVICES"] = str(config.cpu_devices)
    os.environ |= own
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]
            os.environ |= {name: before[name]} if name in before else {}


def _shares(workers: int) -> list[set[int]]:
    """The CPUs of each worker; where there are more workers, some have one in common."""
    if not hasattr(os, "sched_getaffinity"):
        return [set() for _ in range(workers)]
    cpus = sorted(os.sched_getaffinity(0))
    return [set(cpus[n::workers]) or {cpus[n % len(cpus)]} for n in range(workers)]


def _cause(exitcode: int | None) -> str:
    if not exitcode:
        return "it left no summary.json"
    if exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exit code {exitcode}"


def _tail(log: Path) -> str:
    if not log.is_file():
        return "    it wrote no log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-TAIL:])
