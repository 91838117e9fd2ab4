"""Runs the study: each job in a process, some side by side, none that is done already.

``plan`` lists the jobs, ``summarize`` reads their metrics, ``report`` writes tables and ``plots``
draws plots of them.
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
    Config,
    Job,
    best_rate,
    flatten,
    is_done,
    job_config,
    plan_jobs,
    rate_scores,
    rates_to_try,
    selected_arms,
)
from she_jax.training.files import write_json
from she_jax.training.logging import Progress, log
from she_jax.training.stop import StopSignal
from she_jax.training.workdir import check_local, lock_workdir
from she_jax.types import UserError

GRACE = 60.0  # seconds that a job has to save in, once its parent is gone
TAIL = 5  # lines of a failed job's log to show

RunJob = Callable[[Config, Path], None]  # given a job's config and folder


def run_job(config: Config, folder: Path) -> None:
    """Runs a job as ``launch.py`` would, with its data set prepared under a lock."""
    logging.set_verbosity(logging.WARNING)  # Orbax and TFDS log much
    # Imported here, in the process of the job: the parent does not need it.
    from she_jax.runs.config import parse
    from she_jax.runs.run import run
    from she_jax.training.setup import prepare_dataset

    first = next(iter(config.stages.values())) if config.kind == "curriculum" else config
    if "data" in first:  # reward models inherit theirs, which exists by then
        Path(first.data.dir).mkdir(parents=True, exist_ok=True)
        with Path(first.data.dir, "lock").open("w") as lock:  # two arms may need the same new set
            fcntl.flock(lock, fcntl.LOCK_EX)
            prepare_dataset(parse(first, folder).data)
    run(config, folder)


def run_study(config: Config, workdir: Path, job: RunJob = run_job) -> None:
    """Runs the jobs that are not done yet, then writes the tables and the plots.

    Args:
      config: of ``configs/evidence.py``.
      workdir: the study's folder.
      job: runs one job, given its config and its folder, and writes ``summary.json`` there.

    Raises:
      ValueError: for an invalid plan, for a folder whose runs had other options, and at the end if
        jobs failed.
      SystemExit: when a signal asked to stop, after the jobs have saved.
    """
    # Imported here, since the processes of the jobs import this file and do not need them.
    from benchmarks.evidence.plots import save_plots
    from benchmarks.evidence.report import write_report

    check_local(config.to_dict(), workdir)
    jobs = plan_jobs(config, selected_arms(config))
    if config.workers < 1:
        raise UserError(f"workers={config.workers}: expected at least 1")
    _check_done(config, workdir, plan_jobs(config, config.order))
    with _claimed(workdir, config), _environment(config, workdir), StopSignal() as stop:
        queue = JobQueue(config, workdir, jobs, job)
        try:
            queue.run(stop, lambda: write_report(config, workdir))
        finally:
            queue.kill()
        save_plots(write_report(config, workdir), workdir)
    log(f"tables and plots: {workdir / 'tables.md'}")
    if queue.failed:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in queue.failed.items())
        raise UserError(
            f"{len(queue.failed)} of {len(jobs)} jobs are not done:\n{reasons}\n"
            "The same command tries them again"
        )


class JobQueue:
    """Jobs that wait, run in processes, are done or have failed.

    Args:
      config, workdir, job: as in ``run_study``.
      jobs: in the order in which they are to be started.
    """

    def __init__(self, config: Config, workdir: Path, jobs: list[Job], job: RunJob):
        self._config, self._workdir, self._run_job = config, workdir, job
        self._waiting = list(jobs)
        self._running: dict[int, tuple[Job, str, BaseProcess]] = {}  # by worker
        self._done: set[str] = set()
        self._total = len(jobs)
        self._cpus = _worker_cpus(config.workers)
        self.failed: dict[str, str] = {}  # name of a job to the reason

    def run(self, stop: StopSignal, report: Callable[[], Any]) -> None:
        """Starts one job after the other, until none is left or a signal asks to stop.

        Args:
          stop: the signal.
          report: called when jobs have ended.

        Raises:
          SystemExit: for a signal, when the jobs have saved and ended.
        """
        while self._settle():
            pass
        done = len(self._done)
        with Progress("evidence", total=self._total, done=done, alike=False) as progress:
            while self._waiting or self._running:
                self._start()
                assert self._running, "every job that is left waits for another one"
                if stop:
                    self._stop(stop, progress)
                sentinels = [process.sentinel for *_, process in self._running.values()]
                connection.wait(sentinels, timeout=0.5)  # a signal is noticed that soon
                if self._remove_ended(progress):
                    while self._settle():
                        pass
                    report()
                progress.update(len(self._done), running=len(self._running))

    def kill(self) -> None:
        """Kills the processes that are left."""
        for *_, process in self._running.values():
            process.kill()
            process.join()

    def _settle(self) -> bool:
        """Removes jobs that need no process: done, not worth running, or never possible.

        Returns:
          Whether there was any.
        """
        before = len(self._waiting)
        for job in list(self._waiting):
            name = job.name
            if missing := [need for need in job.needs if need in self.failed]:
                self.failed[name] = f"it needs {missing[0]}"
            elif not self._ready(job):
                continue
            else:
                try:
                    wanted, rated = self._worth_running(job), self._with_rate(job)
                except (OSError, ValueError) as error:
                    self.failed[name] = f"no learning rate for it: {error}"
                else:
                    if wanted and not is_done(self._workdir, rated):
                        continue
                    self._done.add(name)
            self._waiting.remove(job)
        return len(self._waiting) < before

    def _ready(self, job: Job) -> bool:
        ended = self._done | self.failed.keys()
        return self._done.issuperset(job.needs) and ended.issuperset(job.after)

    def _worth_running(self, job: Job) -> bool:
        """False for a learning rate far from the ones that do well."""
        if job.rate is None or not job.after:
            return True
        scores = rate_scores(self._config, self._workdir, job.target)
        return job.rate in rates_to_try(self._config, scores)

    def _with_rate(self, job: Job) -> Job:
        """The job with the learning rate that is chosen by now.

        Raises:
          ValueError: if no run that tries a rate is done.
        """
        if not job.rate_arm:
            return job
        scores = rate_scores(self._config, self._workdir, job.rate_arm)
        if not scores:
            raise UserError(f"none of the runs of {job.rate_arm} that try them is done")
        return replace(job, rate=best_rate(scores))

    def _start(self) -> None:
        """Gives every idle worker the first job that is ready."""
        for worker in range(self._config.workers):
            job = next((job for job in self._waiting if self._ready(job)), None)
            if worker in self._running or job is None:
                continue
            self._waiting.remove(job)
            rated = self._with_rate(job)
            folder = self._workdir / rated.name
            values = job_config(self._config, self._workdir, rated).to_dict()
            write_json(Path(f"{folder}.json"), {"config": values, "code": code_version()})
            process = get_context("spawn").Process(
                target=_run_in_process,
                args=(self._run_job, values, folder, self._cpus[worker]),
            )
            process.start()
            self._running[worker] = job, rated.name, process

    def _remove_ended(self, progress: Progress) -> bool:
        """Notes which running jobs have ended, and how.

        Returns:
          Whether there was any.
        """
        ended = [n for n, (*_, process) in self._running.items() if process.exitcode is not None]
        for worker in ended:
            job, folder, process = self._running.pop(worker)
            process.join()
            summary, log_file = (
                self._workdir / folder / "summary.json",
                self._workdir / f"{folder}.log",
            )
            if process.exitcode == 0 and summary.is_file():
                self._done.add(job.name)
                continue
            self.failed[job.name] = f"{_failure(process.exitcode)}, see {log_file}"
            progress.print(f"{folder}: {self.failed[job.name]}\n{_tail(log_file)}")
        return bool(ended)

    def _stop(self, stop: StopSignal, progress: Progress) -> None:
        """Passes a signal on to the jobs, and exits when they have saved."""
        progress.print(f"{stop.name}: {len(self._running)} jobs are asked to save and leave")
        for *_, process in self._running.values():
            process.terminate()
        for *_, process in self._running.values():
            process.join()
        progress.print("the same command resumes them")
        raise SystemExit(stop.exit_code)


# -------------------------------------------------------------------------- in a job's process


def _run_in_process(
    run_job: RunJob, values: Mapping[str, Any], folder: Path, cpus: set[int]
) -> None:
    os.setsid()  # Ctrl-C is the parent's: it passes one signal on
    log_file = os.open(f"{folder}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(log_file, 1)
    os.dup2(log_file, 2)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)  # before JAX counts them for its threads
    fcntl.flock(log_file, fcntl.LOCK_EX)  # until the same job of a parent that was killed is gone
    run_job(ConfigDict(values).lock(), folder)


def _exit_with_parent() -> None:
    """Stops this process when its parent was killed, and so cannot do it."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


# -------------------------------------------------------------------------- folder and environment


def _check_done(config: Config, workdir: Path, jobs: list[Job]) -> None:
    """Checks that the jobs that are done had the configs that they would have now.

    Jobs that were done with another version of the package are kept, with a message.

    Raises:
      ValueError: listing the keys that differ.
    """
    outdated, version = [], code_version()
    for job in jobs:
        for rate in config.rates if job.rate_arm else (job.rate,):
            rated = replace(job, rate=rate)
            record = Path(f"{workdir / rated.name}.json")
            now = flatten(json.loads(json.dumps(job_config(config, workdir, rated).to_dict())))
            if not is_done(workdir, rated) or not record.is_file():
                continue
            written = json.loads(record.read_text(encoding="utf-8"))
            outdated += [rated.name] if written["code"] != version else []
            then = flatten(written["config"])
            lines = [
                f"  {key}: {then.get(key, 'absent')} then, {now.get(key, 'absent')} now"
                for key in sorted(then.keys() | now.keys())
                if then.get(key, "absent") != now.get(key, "absent")
            ]
            if lines:
                raise UserError(
                    f"{workdir / rated.name} was done with another config:\n"
                    + "\n".join(lines)
                    + "\n"
                    "Give a new folder with --workdir, the old values, or delete that run"
                )
    if names := list(dict.fromkeys(outdated)):
        rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
        log(f"done with another version of she_jax, and kept: {', '.join(names[:5])}{rest}")


def code_version() -> str:
    """A hash of the package's source files."""
    files = sorted(Path(she_jax.__file__).parent.rglob("*.py"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


@contextmanager
def _claimed(workdir: Path, config: Config) -> Iterator[None]:
    """Locks the folder for this command and writes ``config.json``.

    Raises:
      ValueError: if it belongs to another kind of run, or another command is using it.
    """
    path = workdir / "config.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("kind") != config.kind:
        raise UserError(f"{workdir} belongs to a run of another kind: give a new --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    with lock_workdir(workdir):
        write_json(path, config.to_dict())
        yield


@contextmanager
def _environment(config: Config, workdir: Path) -> Iterator[None]:
    """Sets variables that the processes of the jobs read when they start, JAX above all."""
    before = dict(os.environ)
    # All arms run the same few programs: they are compiled once, the small ones too.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str((workdir / "compiled").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    variables = {name: before.get(name, value) for name, value in cache.items()}
    if "xla_force_host_platform_device_count" not in before.get("XLA_FLAGS", ""):
        variables["JAX_NUM_CPU_DEVICES"] = str(config.cpu_devices)
    os.environ |= variables
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
            os.environ |= {name: before[name]} if name in before else {}


def _worker_cpus(workers: int) -> list[set[int]]:
    """The CPUs of each worker; with more workers than CPUs some share one."""
    if not hasattr(os, "sched_getaffinity"):
        return [set() for _ in range(workers)]
    cpus = sorted(os.sched_getaffinity(0))
    return [set(cpus[n::workers]) or {cpus[n % len(cpus)]} for n in range(workers)]


def _failure(exitcode: int | None) -> str:
    if not exitcode:
        return "it left no summary.json"
    if exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exit code {exitcode}"


def _tail(log_file: Path) -> str:
    if not log_file.is_file():
        return "    it wrote no log"
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-TAIL:])
