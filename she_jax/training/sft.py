"""Supervised fine-tuning: the cold start, and the training of reward models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from she_jax.data.rationales import write_chain
from she_jax.generate.language_model import LanguageModel
from she_jax.generate.prompts import PromptFormat
from she_jax.models.sharding import shardings
from she_jax.rl.update import jit_update_step, make_sft_step
from she_jax.training.checkpoint import Checkpoints
from she_jax.training.logging import MetricsWriter, log
from she_jax.training.loop import BatchSource, fit
from she_jax.training.optimizer import OptimizerConfig, make_optimizer
from she_jax.training.packing import completion_batch, pack_pairs
from she_jax.training.stop import StopSignal
from she_jax.types import Example, SftBatch, TrainState


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """How long and in what portions supervised fine-tuning runs.

    Attributes:
      optimizer: see ``OptimizerConfig``.
      steps: updates.
      batch_size: examples a batch.
      micro_batches: parts in which a batch is worked through.
      checkpoint_every: updates between two checkpoints.
      seed: of the training state's key.
      section: of the recipe, for error messages.

    Raises:
      ValueError: if a number is below 1; ``steps`` may be 0 in ``reference_sft``.
    """

    optimizer: OptimizerConfig
    steps: int
    batch_size: int
    micro_batches: int
    checkpoint_every: int
    seed: int
    section: str = "sft"

    def __post_init__(self):
        for name in ("steps", "batch_size", "micro_batches", "checkpoint_every"):
            least = int(name != "steps" or self.section == "sft")
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise ValueError(f"{self.section}.{name}={value}: expected at least {least}")


class BatchSeries:
    """A batch source whose batches are a function of their position alone.

    Args:
      batch_at: the batch at a position (from 0), and metrics about it.
      title: shown beside the progress bar.
      fingerprint: identifies the data.
      phase: written into ``metrics.jsonl``.
    """

    shown: tuple[str, ...] = ("loss",)

    def __init__(
        self,
        batch_at: Callable[[int], tuple[Any, dict[str, float]]],
        *,
        title: str,
        fingerprint: str,
        phase: str = "sft",
    ):
        self._batch_at = batch_at
        self.title, self.fingerprint, self.phase = title, fingerprint, phase

    @property
    def state(self) -> dict[str, Any]:
        """Nothing: the position is the step."""
        return {}

    def begin(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Nothing to prepare."""

    def batch(self, state: TrainState, step: int) -> tuple[Any, dict[str, float]]:
        """The batch at position ``step``."""
        return self._batch_at(step)

    def on_step_end(self, step: int, params: Any, metrics: Mapping[str, float], last: bool) -> bool:
        """Nothing to do."""
        return False


def sft(
    config: SftConfig,
    lm: LanguageModel,
    params: Any,
    source: BatchSource,
    folder: Path,
    metrics: MetricsWriter,
    stop: StopSignal,
    make_step: Callable[..., Any] = make_sft_step,
) -> Any:
    """Trains on the batches of a source, resuming from a checkpoint if there is one.

    Args:
      config: how long.
      lm: the model.
      params: where training starts.
      source: the batches.
      folder: of the checkpoints.
      metrics: ``metrics.jsonl``.
      stop: set by a signal; training then saves and exits.
      make_step: makes the update function, with the signature of ``make_sft_step``.

    Returns:
      The parameters after the last update.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = new_state(params, lm.mesh, optimizer, config.seed)
    step = make_step(lm.model.forward, optimizer, micro_batches=config.micro_batches)
    checkpoints = Checkpoints(folder, every=config.checkpoint_every, warn=log)
    update = jit_update_step(step, lm.mesh, state)
    state, _ = fit(update, state, source, checkpoints, metrics, steps=config.steps, stop=stop)
    return state.params


def sft_batch(
    prompts: PromptFormat, examples: Sequence[Example], seed: tuple[int, int]
) -> tuple[SftBatch, dict[str, float]]:
    """A packed batch of examples with their chains, and the numbers of truncated texts."""
    rng = np.random.default_rng(seed)
    texts = [write_chain(example, prompts.schema, rng) for example in examples]
    completions, mask, cut_chains = prompts.encode_chains(texts)
    batch, cut_prompts = completion_batch(prompts, examples, completions, mask)
    return pack_pairs(batch), {"cut_prompts": cut_prompts, "cut_chains": cut_chains}


def adopt(init_from: Path, folder: Path, params: Any, mesh: Mesh) -> Any:
    """Loads the parameters of another run and saves them as this run's cold start.

    Args:
      init_from: the checkpoints of the other run.
      folder: of this run's cold start.
      params: of the right shape and sharding.
      mesh: the devices.

    Raises:
      FileNotFoundError: if there is no complete checkpoint.
      UserError: if the checkpoint is of another model.
    """
    saved = Checkpoints(folder, warn=log)
    if restored := saved.restore_params(params):
        return restored[1]
    restored = Checkpoints(init_from, warn=log).restore_params(params)
    if restored is None:
        raise FileNotFoundError(f"init_from={init_from} holds no whole checkpoint")
    step, params = restored
    log(f"starting from {init_from}, step {step}")
    # Training starts with a new optimizer, so the old moments are not kept.
    saved.save(step, new_state(params, mesh, optax.identity(), 0), {})
    return params


def new_state(
    params: Any, mesh: Mesh, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """A training state at step 0, sharded over the mesh."""
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.PRNGKey(seed),
    )
    return jax.device_put(state, shardings(state, mesh))
