"""How long a run will take here: two updates of each phase, the second of which is timed."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from she_jax.data.dataset import PreparedDataset, open_split
from she_jax.data.loader import batches
from she_jax.generate.generator import Generator
from she_jax.rl.update import jit_update_step, make_sft_step
from she_jax.rollouts.collector import Collector
from she_jax.runs.config import TrainConfig
from she_jax.runs.load import new_policy
from she_jax.runs.policy import make_step
from she_jax.runs.sources import reward_sources
from she_jax.training.logging import log
from she_jax.training.optimizer import make_optimizer
from she_jax.training.sft import new_state, sft_batch


def log_minutes(config: TrainConfig, workdir: Path, dataset: PreparedDataset) -> None:
    """Logs the minutes of the cold start, filter, RL and evaluations, without compilation.

    Rollouts of a policy before its cold start rarely end, so those of RL take their whole length:
    its figure is an upper bound. Nothing is kept.
    """
    lm, params = new_policy(config, workdir, dataset)
    source = open_split(dataset.path, "train")
    copy = jax.tree.map(jnp.copy, params)  # an update takes over its state
    state = new_state(copy, lm.mesh, make_optimizer(config.sft.optimizer, 2), config.seed)
    step = make_sft_step(
        lm.model.forward,
        make_optimizer(config.sft.optimizer, 2),
        micro_batches=config.sft.micro_batches,
    )
    update = jit_update_step(step, lm.mesh, state)
    data = batches(source, config.sft.batch_size, seed=config.seed, balance=config.balance)

    def cold_start(n: int) -> None:
        nonlocal state
        examples: Any = data[n]
        batch, _ = sft_batch(lm.prompts, examples, (config.seed, n))
        state, metrics = update(state, batch)
        jax.block_until_ready(metrics)

    parts = [("cold start", config.sft.steps * (not config.init_from), _second(cold_start))]
    if config.method == "rl":
        parts.append(
            (config.method, config.online.steps, _second(_online(config, lm, params, source)))
        )
    size, split = config.evaluation.batch_size, config.evaluation.split
    examples = open_split(dataset.path, split)
    rows = range(min(size, len(examples)))
    generator = Generator(lm, size, warn=log)
    seconds = _second(lambda n: list(generator.greedy_rollouts(params, examples, rows)))
    if config.method != "rl":
        rollouts = config.offline.pairs * config.rollout.group_size
        parts.append(
            (f"{config.method}: {rollouts:,} rollouts, in batches", -(-rollouts // size), seconds)
        )
        parts.append((f"{config.method}: updates", config.online.steps, parts[0][2]))
    count = min(config.evaluation.pairs or len(examples), len(examples))
    measured = min(config.measure.pairs, len(source)) * config.measure.rollouts
    if measured:
        parts.append(
            (f"the filter's {measured:,} rollouts, in batches", -(-measured // size), seconds)
        )
    parts.append((f"{split}, before and after, in batches", 2 * -(-count // size), seconds))
    for name, steps, each in parts:
        log(f"time: {name}, {steps:,} x {each:.2f} s = {steps * each / 60:.1f} min")
    total = sum(steps * each for _, steps, each in parts) / 60
    log(
        f"time: about {total:.0f} min in all, besides compilation and validation; sft.steps, "
        "rl.steps, filter.pairs and data.eval_pairs shorten it"
    )


def _online(config: TrainConfig, lm: Any, params: Any, source: Any) -> Callable[[int], None]:
    rewards = reward_sources(config, lm)
    collect = Collector(lm, params, config.rollout, config.credit, rewards)
    optimizer = make_optimizer(config.online.optimizer, 2)
    state = new_state(jax.tree.map(jnp.copy, params), lm.mesh, optimizer, config.seed)
    update = jit_update_step(make_step(config, lm, optimizer), lm.mesh, state)
    data = batches(source, config.rollout.prompts, seed=config.seed, balance=config.balance)

    def online(n: int) -> None:
        nonlocal state
        examples: Any = data[n]
        rollouts = collect(state.params, examples, jax.random.key(n))
        state, metrics = update(state, rollouts.batch)
        jax.block_until_ready(metrics)

    return online


def _second(function: Callable[[int], Any]) -> float:
    """Seconds of the second of two calls: the first compiles."""
    function(0)
    began = time.perf_counter()
    function(1)
    return time.perf_counter() - began
