"""Supervised fine-tuning (SFT) with checkpoints and metrics, and its batches."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from she_jax.data.rationales import write_chain
from she_jax.generate.language_model import Policy
from she_jax.generate.prompts import PromptFormat
from she_jax.models.sharding import shardings
from she_jax.rl.update import jit_update_step, make_sft_step
from she_jax.training.checkpoint import Checkpoints
from she_jax.training.logging import MetricsWriter, Progress, say
from she_jax.training.loop import check_data, finite
from she_jax.training.packing import completion_batch, two_a_row
from she_jax.training.setup import make_optimizer
from she_jax.training.stop import StopSignal
from she_jax.training.workdir import Config
from she_jax.types import Example, OutcomeBatch, SftBatch, TrainState


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
    """Trains on batches addressed by position, resuming from a checkpoint if there is one.

    Args:
      config: of the run; its ``sft`` section and seed are used.
      workdir: the run's folder.
      policy: the initial policy.
      batch_at: maps a position to a batch and metrics about it.
      data: identifies the data of the batches; a checkpoint resumes with the same data only.
      stop: set by a signal; training then saves and exits.
      lines: number of lines that ``metrics.jsonl`` has before.
      phase: name of the checkpoints and of the lines in ``metrics.jsonl``.
      title: title of the progress bar.
      make_step: makes the update function, with the signature of ``make_sft_step``.

    Returns:
      The parameters, and the number of lines that ``metrics.jsonl`` has afterwards.
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
            batch, batch_figures = batch_at(host["position"])
            tokens = int(np.sum(np.asarray(batch.positions) >= 0))
            state, figures = update(state, batch)
            figures = finite(jax.device_get(figures), phase, step, saved)
            seconds = time.perf_counter() - began
            rate = {"time/step": seconds, "time/tokens_per_s": tokens / seconds}
            metrics.write(phase, step + 1, figures | batch_figures | rate)
            progress.update(step + 1, loss=figures["loss"])
            host |= {"position": host["position"] + 1, "lines": metrics.lines}
            last = step + 1 == steps
            if last or stop or (step + 1) % config.sft.checkpoint_every == 0:
                saved.save(step + 1, state, host)
            if stop and not last:
                leave(stop, phase, step + 1, steps)
    return state.params, host["lines"]


def sft_batch(
    prompts: PromptFormat, examples: Sequence[Example], seed: tuple[int, int]
) -> tuple[SftBatch, dict[str, int]]:
    """A packed batch of examples with their chains, and the numbers of truncated texts."""
    rng = np.random.default_rng(seed)
    texts = [write_chain(example, prompts.schema, rng) for example in examples]
    completions, mask, cut_chains = prompts.chains(texts)
    batch, cut_prompts = completion_batch(prompts, examples, completions, mask)
    return two_a_row(batch), {"cut_prompts": cut_prompts, "cut_chains": cut_chains}


def adopt(config: Config, workdir: Path, policy: Policy) -> Any:
    """Loads the parameters of ``config.start`` and saves them as this run's cold start.

    Raises:
      FileNotFoundError: if there is no complete checkpoint.
      ValueError: if the checkpoint is of another model.
    """
    saved = Checkpoints(workdir / "checkpoints" / "sft", warn=say)
    if restored := saved.restore_params(policy.params):
        return restored[1]
    restored = Checkpoints(config.start, warn=say).restore_params(policy.params)
    if restored is None:
        raise FileNotFoundError(f"start={config.start} holds no whole checkpoint")
    step, params = restored
    say(f"starting from {config.start}, step {step}")
    # Training starts with a new optimizer, so the old moments are not kept.
    state = new_state(Policy(**vars(policy) | {"params": params}), optax.identity(), config.seed)
    saved.save(step, state, {})
    return params


def new_state(policy: Policy, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A training state at step 0, sharded over the policy's mesh."""
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=policy.params,
        opt_state=optimizer.init(policy.params),
        key=jax.random.PRNGKey(seed),
    )
    return jax.device_put(state, shardings(state, policy.mesh))


def leave(stop: StopSignal, phase: str, step: int, steps: int) -> None:
    """Exits the program after a signal, once the state is saved."""
    say(f"{stop.name}: saved {phase} at step {step} of {steps}; the same command resumes from it")
    raise SystemExit(stop.exit_code)
