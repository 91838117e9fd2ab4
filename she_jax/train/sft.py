"""Supervised fine-tuning with checkpoints and metrics, whatever the batches are made of."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Int

from she_jax.data.chains import write_chain
from she_jax.data.prompts import PromptFormat, positions
from she_jax.models.sharding import shardings
from she_jax.rl.update import jit_update_step, make_sft_step
from she_jax.train.checkpoint import Checkpoints
from she_jax.train.checks import check_data, finite
from she_jax.train.metrics import MetricsWriter, Progress, say
from she_jax.train.setup import Policy, make_optimizer
from she_jax.train.stop import StopSignal
from she_jax.train.workdir import Config
from she_jax.types import Example, OutcomeBatch, SftBatch, TrainState

# Lengths of a row that holds two, in rows that hold one: few, as each takes a compilation.
WIDTHS = (1.0, 1.2, 1.3, 1.4, 2.0)


def sft(
    config: Config,
    workdir: Path,
    policy: Policy,
    batch_at: Callable[[int], tuple[SftBatch | OutcomeBatch, dict[str, int]]],
    data: str,
    stop: StopSignal,
    *,
    lines: int = 0,
    phase: str = "sft",
    title: str = "cold start (SFT)",
    make_step: Callable[..., Any] = make_sft_step,
) -> tuple[Any, int]:
    """Trains on batches by position, or goes on where an earlier run stopped.

    Args:
      config: of the run; its ``sft`` part and seed are read.
      workdir: the run's folder.
      policy: where training starts.
      batch_at: a batch and figures about it, as a function of its position.
      data: names what the batches come from; a checkpoint goes on with no other.
      stop: asks to stop.
      lines: that ``metrics.jsonl`` has before.
      phase: name of the checkpoints and of the lines in ``metrics.jsonl``.
      title: what the screen says.
      make_step: makes the update of these batches, as ``make_sft_step`` does of its own.

    Returns:
      The parameters, and how many lines ``metrics.jsonl`` has by then.
    """
    steps = config.sft.steps
    optimizer = make_optimizer(config.sft)
    state = new_state(policy, optimizer, config.seed)
    saved = Checkpoints(workdir / "checkpoints" / phase, warn=say)
    host = {"position": 0, "lines": lines, "data": data}
    start, state, host = saved.restore(state) or (0, state, host)
    check_data(host, data)
    if start == steps:
        return state.params, host["lines"]
    step_fn = make_step(policy.model.forward, optimizer, micro_batches=config.sft.micro_batches)
    update = jit_update_step(step_fn, policy.mesh, state)
    with (
        MetricsWriter(workdir, lines=host["lines"]) as metrics,
        Progress(title, total=steps, done=start) as progress,
    ):
        for step in range(start, steps):
            began = time.perf_counter()
            batch, about = batch_at(host["position"])
            tokens = int(np.sum(np.asarray(batch.positions) >= 0))
            state, figures = update(state, batch)
            figures = finite(jax.device_get(figures), phase, step, saved)
            seconds = time.perf_counter() - began
            rate = {"time/step": seconds, "time/tokens_per_s": tokens / seconds}
            metrics.write(phase, step + 1, figures | about | rate)
            progress.update(step + 1, loss=figures["loss"])
            host |= {"position": host["position"] + 1, "lines": metrics.lines}
            last = step + 1 == steps
            if last or stop or (step + 1) % config.sft.checkpoint_every == 0:
                saved.save(step + 1, state, host)
            if stop and not last:
                leave(stop, phase, step + 1, steps)
    return state.params, host["lines"]


def sft_batch(
    own: PromptFormat, examples: Sequence[Example], seed: tuple[int, int]
) -> tuple[SftBatch, dict[str, int]]:
    """Examples and their chains as tokens, two a row, and how many of each had to be cut."""
    rng = np.random.default_rng(seed)
    answers, mask, cut_chains = own.chains([write_chain(e, own.schema, rng) for e in examples])
    batch, cut_prompts = completion_batch(own, examples, answers, mask)
    return two_a_row(batch), {"cut_prompts": cut_prompts, "cut_chains": cut_chains}


def two_a_row(batch: SftBatch) -> SftBatch:
    """A batch with half as many rows, the longest of them with the shortest, and so on.

    Neither sees the other: loss and gradient are those of the batch. Rows are seldom full, so there
    are fewer tokens to work through; how long the new rows are is one of ``WIDTHS``.

    Args:
      batch: an even number of rows; where it has no mask, each token sees those before it.
    """
    rows = [np.asarray(x) for x in (batch.tokens, batch.positions, batch.weights)]
    own = None if batch.mask is None else np.asarray(batch.mask)
    real = rows[1] >= 0
    sizes = real.sum(axis=1)
    order = np.argsort(sizes, kind="stable")
    couples = np.stack([order[::-1], order], axis=1)[: len(order) // 2]
    widths = [math.ceil(share * real.shape[1]) for share in WIDTHS]
    shape = len(couples), next(w for w in widths if w >= sizes[couples].sum(axis=1).max())
    packed = [np.full(shape, fill, x.dtype) for x, fill in zip(rows, (0, -1, 0), strict=True)]
    mask = np.zeros((*shape, shape[1]), bool)
    for row, couple in enumerate(couples):
        end = 0
        for one in couple:
            start, end = end, end + sizes[one]
            for x, y in zip(packed, rows, strict=True):
                x[row, start:end] = y[one, real[one]]
            cells = np.ix_(real[one], real[one])
            sees = np.tri(end - start, dtype=bool) if own is None else own[one][cells]
            mask[row, start:end, start:end] = sees
    tokens, positions, weights, mask = map(jnp.asarray, (*packed, mask))
    return SftBatch(tokens=tokens, positions=positions, weights=weights, mask=mask)


def completion_batch(
    own: PromptFormat,
    examples: Sequence[Example],
    answers: Int[np.ndarray, "B C"],
    mask: Bool[np.ndarray, "B C"],
) -> tuple[SftBatch, int]:
    """Completions behind their prompts, to be trained on; and how many prompts had to be cut."""
    asked, cut = own.prompts(examples)
    real = np.concatenate([asked.mask, mask], axis=1)
    trained = np.concatenate([np.zeros_like(asked.mask), mask], axis=1)
    batch = SftBatch(
        tokens=jnp.asarray(np.concatenate([asked.tokens, answers], axis=1)),
        positions=jnp.asarray(positions(real)),
        weights=jnp.asarray(trained, dtype=jnp.float32),
        prompt_length=own.prompt_length,
    )
    return batch, cut


def adopt(config: Config, workdir: Path, policy: Policy) -> Any:
    """The parameters that ``config.start`` names, kept in this run's folder as its cold start.

    Raises:
      FileNotFoundError: if there is no whole checkpoint.
      ValueError: if it is of another model.
    """
    own = Checkpoints(workdir / "checkpoints" / "sft", warn=say)
    if found := own.restore_params(policy.params):
        return found[1]
    found = Checkpoints(config.start, warn=say).restore_params(policy.params)
    if found is None:
        raise FileNotFoundError(f"start={config.start} holds no whole checkpoint")
    step, params = found
    say(f"begins with {config.start}, step {step}")
    # Nothing goes on with the old optimizer, so its moments are not kept.
    state = new_state(Policy(**vars(policy) | {"params": params}), optax.identity(), config.seed)
    own.save(step, state, {})
    return params


def new_state(policy: Policy, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A state at step 0, every array where the mesh wants it."""
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=policy.params,
        opt_state=optimizer.init(policy.params),
        key=jax.random.PRNGKey(seed),
    )
    return jax.device_put(state, shardings(state, policy.mesh))


def leave(stop: StopSignal, phase: str, step: int, steps: int) -> None:
    """Ends the program after a signal, the state being saved."""
    say(f"{stop.name}: saved {phase} at step {step} of {steps}; the same command goes on from it")
    raise SystemExit(stop.exit_code)
