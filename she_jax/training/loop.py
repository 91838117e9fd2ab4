"""The training loop of every model: SFT, RL, DPO and both reward models."""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from she_jax.training.checkpoint import Checkpoints
from she_jax.training.logging import MetricsWriter, Progress, log
from she_jax.training.stop import StopSignal
from she_jax.types import TrainState, UserError


class BatchSource(Protocol):
    """Where the batches of a training run come from: a data set, rollouts, stored chains.

    Attributes:
      title: shown beside the progress bar.
      phase: written into every line of ``metrics.jsonl``.
      shown: metrics of an update that the progress bar shows.
      fingerprint: identifies the data; a checkpoint is resumed with the same data only.
    """

    title: str
    phase: str
    shown: tuple[str, ...]
    fingerprint: str

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the source, as values that JSON returns unchanged."""
        ...

    def begin(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Prepares update ``step``: from a checkpoint's ``state``, or from scratch if None.

        Expensive preparation (sampling, loading reward models) belongs here: it is not called when
        no update is left.
        """
        ...

    def batch(self, state: TrainState, step: int) -> tuple[Any, dict[str, float]]:
        """The batch of update ``step`` (from 0), and metrics about it."""
        ...

    def on_step_end(self, step: int, params: Any, metrics: Mapping[str, float], last: bool) -> bool:
        """Called after ``step`` updates are done; returns True to request a checkpoint."""
        ...


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Periodic evaluation, which selects the best checkpoint.

    Attributes:
      function: (params, step) -> metrics, of which ``metric`` selects; higher is better.
      every: updates between two evaluations, >= 1. The first (step 0) and the last are always made.
      patience: training ends after this many evaluations in a row without improvement; 0 for never.
      metric: name of the metric that selects.
    """

    function: Callable[[Any, int], Mapping[str, float]]
    every: int
    patience: int = 0
    metric: str = "validation/macro_f1"

    def exhausted(self, stale: int) -> bool:
        """Whether ``stale`` evaluations in a row without improvement end the training."""
        return 0 < self.patience <= stale


def fit(
    update: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, Any]]],
    state: TrainState,
    source: BatchSource,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    *,
    steps: int,
    stop: StopSignal,
    evaluate: Evaluation | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """Runs updates 0 to ``steps`` - 1, resuming from the latest checkpoint if there is one.

    A resumed run equals an uninterrupted one, bit for bit, on the same number of threads and
    devices.

    Args:
      update: compiled (state, batch) -> (state, metrics); the state is donated.
      state: the state to start from; also the template that a checkpoint is restored into.
      source: where the batches come from.
      checkpoints: the folder of this phase's checkpoints, with their interval.
      metrics: ``metrics.jsonl``; what an interrupted run wrote after its checkpoint is removed.
      steps: number of updates.
      stop: checked after every update; the state is saved before the program exits.
      evaluate: periodic evaluation, or None.

    Returns:
      The state after the last update, and what the last checkpoint keeps on the host: ``lines`` of
      ``metrics.jsonl``, ``source``, and with ``evaluate`` the ``best`` value and the number of
      ``stale`` evaluations.

    Raises:
      UserError: if the data changed since the checkpoint, or the loss is no longer finite.
      SystemExit: after a signal, once the state is saved.
    """
    host: dict[str, Any] = {"lines": metrics.lines, "data": source.fingerprint}
    host["machine"] = machine()
    host |= {"best": -1.0, "stale": 0} if evaluate else {}
    restored = checkpoints.restore(state)
    start, state, host = restored or (0, state, host)
    check_data(host["data"], source.fingerprint)
    if restored and host["machine"] != machine():
        log(
            f"{source.phase}: this run began on {host['machine']} and is resumed on {machine()}: "
            "from here on it need not equal an uninterrupted one bit for bit"
        )
    if start == steps or (evaluate and evaluate.exhausted(host["stale"])):
        metrics.lines = host["lines"]
        return state, host
    if start:
        log(f"{source.phase}: goes on at step {start:,} of {steps:,}")
    metrics.keep(host["lines"])
    began = time.perf_counter()
    source.begin(host.get("source"), start)
    preparation = time.perf_counter() - began
    if evaluate and not restored:
        values = evaluate.function(state.params, 0)
        metrics.write("eval", 0, values)
        host |= {"best": values.get(evaluate.metric, 0.0)}
        host |= {"lines": metrics.lines, "source": source.state}
        checkpoints.save(0, state, host, best=True)
        if stop:
            leave(stop, source.phase, 0, steps)
    with Progress(source.title, total=steps, done=start) as progress:
        for step in range(start, steps):
            began = time.perf_counter()
            batch, about = source.batch(state, step)
            state, raw = update(state, batch)
            values = finite(jax.device_get(raw), source.phase, step, checkpoints) | about
            seconds = time.perf_counter() - began
            timing = {"time/step": seconds, "time/tokens_per_s": values["tokens"] / seconds}
            timing |= {"time/preparation": preparation} if step == start else {}
            metrics.write(source.phase, step + 1, values | timing)
            progress.update(step + 1, **{name: values[name] for name in source.shown})
            last, best = step + 1 == steps, False
            if evaluate and (last or (step + 1) % evaluate.every == 0):
                scores = evaluate.function(state.params, step + 1)
                metrics.write("eval", step + 1, scores)
                score = scores.get(evaluate.metric, 0.0)
                best = score > host["best"]
                host |= {"best": max(host["best"], score), "stale": host["stale"] + 1}
                host |= {"stale": 0} if best else {}
                last |= evaluate.exhausted(host["stale"])
            due = source.on_step_end(step + 1, state.params, values, last)
            host |= {"lines": metrics.lines, "source": source.state}
            if last or best or stop or due or (step + 1) % checkpoints.every == 0:
                checkpoints.save(step + 1, state, host, best=best)
            if last:
                break
            if stop:
                leave(stop, source.phase, step + 1, steps)
    return state, host


def machine() -> str:
    """What the last bits of a result depend on: the kind and number of devices, CPU threads."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{jax.device_count()} {jax.default_backend()} devices with {count} CPU threads"


def check_data(saved: str, current: str) -> None:
    """Checks that a checkpoint is resumed with the data it began with.

    Raises:
      UserError: if the data changed, since the position in them would mean nothing.
    """
    if saved != current:
        raise UserError(
            f"the pairs changed since the last checkpoint (data set {saved} then, {current} now): "
            "put the old files back, or start anew in another --workdir"
        )


def finite(
    metrics: Mapping[str, Any], phase: str, step: int, checkpoints: Checkpoints
) -> dict[str, float]:
    """The metrics of an update as Python numbers.

    Raises:
      UserError: if the loss or the gradient norm is not finite; nothing is saved after that.
    """
    values = {name: float(value) for name, value in metrics.items()}
    if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
        raise UserError(
            f"{phase} step {step + 1}: loss {values['loss']}, gradient norm "
            f"{values['grad_norm']}. Stopped; the last good checkpoint is step "
            f"{checkpoints.latest_step} in {checkpoints.directory}. A lower learning rate usually "
            "helps, in another --workdir"
        )
    return values


def leave(stop: StopSignal, phase: str, step: int, steps: int) -> None:
    """Exits the program after a signal, once the state is saved."""
    log(f"{stop.name}: saved {phase} at step {step} of {steps}; the same command resumes it")
    raise SystemExit(stop.exit_code)
