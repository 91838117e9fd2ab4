"""What a policy learns from after its cold start: the batch source of a run's method."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from she_jax.data.dataset import PreparedDataset, fingerprint, open_split
from she_jax.data.loader import batches
from she_jax.data.rationales import write_chain
from she_jax.filtering.measure import filter_prompts
from she_jax.generate.generator import Generator
from she_jax.generate.language_model import LanguageModel
from she_jax.rewards.hybrid import RewardSources
from she_jax.rewards.orm.model import load_orm
from she_jax.rewards.prm.model import ProcessRewardModel, load_prm
from she_jax.rewards.prm.refresh import Refresher
from she_jax.rewards.verifier import annotation_reward, label_reward
from she_jax.rollouts.collector import Collector
from she_jax.rollouts.offline import PreferencePairs, RejectionSampling, offline_prompts
from she_jax.rollouts.online import OnlineParts, OnlineRL
from she_jax.rollouts.prompt_source import Examples, read_unsolved, unsolved_prompts
from she_jax.rollouts.self_imitation import SelfImitation
from she_jax.runs.config import TrainConfig
from she_jax.training.loop import BatchSource
from she_jax.training.setup import split_mesh
from she_jax.training.stop import StopSignal
from she_jax.types import Example


def make_source(
    config: TrainConfig,
    workdir: Path,
    lm: LanguageModel,
    reference: Any,
    dataset: PreparedDataset,
    generator: Generator,
    stop: StopSignal,
) -> BatchSource:
    """The batches that follow the cold start, as ``method`` says.

    Args:
      reference: the cold start's parameters.
      generator: samples from the policy.
      stop: set by a signal, which ends sampling and filtering.
    """
    data = fingerprint(dataset)

    def stage() -> tuple[Examples, dict[str, float]]:
        return stage_prompts(config, workdir, lm, reference, dataset, stop)

    def online_parts(step: int) -> OnlineParts:
        examples, rates = stage()
        rewards = reward_sources(config, lm)
        return OnlineParts(
            pool=config.prompts.pool(examples, rates),
            collector=Collector(lm, reference, config.rollout, config.credit, rewards),
            refresher=_refresher(config, workdir, rewards.prm, generator, examples, step),
        )

    if config.method == "rl":
        title = config.recipe["rl"]["estimator"].upper().replace("_", " ")
        advantage, stepwise = config.online.self_imitation, config.rollout.stepwise
        return OnlineRL(
            online_parts,
            config.online,
            workdir / "samples",
            title=title,
            fingerprint=data,
            self_imitation=SelfImitation(advantage, config.seed, stepwise=stepwise)
            if advantage
            else None,
        )

    def prompts() -> list[Any]:
        return offline_prompts(config.prompts, config.offline.pairs, stage()[0])

    parts: Any = (lm, reference, prompts, generator, config.offline)
    if config.method == "dpo":
        return PreferencePairs(*parts, fingerprint=data, stop=stop)
    return RejectionSampling(
        *parts,
        fingerprint=data,
        stop=stop,
        workdir=workdir,
        load_prm=(lambda: _load_prm(config)) if config.reward.prm else None,
        earlier=config.init_from if config.prompts.unsolved_share else "",
    )


def reward_sources(config: TrainConfig, lm: LanguageModel) -> RewardSources:
    """The rewards of a run: a user's functions or the verifier's, and the reward models."""
    reward = config.reward
    return RewardSources(
        step=reward.step or annotation_reward(config.schema),
        outcome=reward.outcome or label_reward(reward.format_weight),
        by_label=reward.outcome is None,
        combine=reward.combine,
        prm=_load_prm(config) if reward.prm else None,
        orm=load_orm(Path(reward.orm), lm, reward.batch_size) if reward.orm else None,
    )


def try_rewards(config: TrainConfig, examples: Sequence[Example]) -> str:
    """What a user's reward functions give to chains of the pairs, before anything is trained.

    They are called with some chains as written for the cold start, and with one of which nothing
    can be read, as a policy writes them, too.

    Args:
      config: its ``reward`` has the functions.
      examples: some of the training pairs.

    Returns:
      The mean rewards, a sentence; "" if no function is the user's, or no pair has a chain.

    Raises:
      UserError: if a function raises, or returns other shapes or values than it should.
    """
    schema, reward, chains, rng = config.schema, config.reward, [], np.random.default_rng(0)
    pairs = []
    for example in examples:
        with suppress(ValueError):  # it has neither a label nor a chain
            chains.append(schema.parse(write_chain(example, schema, rng)))
            pairs.append(example)
    if not chains or not (reward.step or reward.outcome):
        return ""
    all_chains, all_pairs = [*chains, schema.parse("")], [*pairs, pairs[0]]
    parts = []
    if reward.step:
        rewards, known = (rows[:-1] for rows in reward.step(all_chains, all_pairs))
        for k, name in enumerate(schema.names):
            mean = f"{rewards[known[:, k], k].mean():.2f}" if known[:, k].any() else "unknown"
            parts.append(f"{name} {mean}")
    if reward.outcome:
        parts.append(f"outcome {reward.outcome(all_chains, all_pairs)[:-1].mean():.2f}")
    return f"mean rewards of {len(chains)} chains of the training pairs: {', '.join(parts)}"


def _load_prm(config: TrainConfig) -> ProcessRewardModel:
    reward = config.reward
    _, mesh = split_mesh(config.mesh, reward.devices)
    return load_prm(
        Path(reward.prm), config.schema, mesh, batch_size=reward.batch_size, votes=reward.votes
    )


def _refresher(
    config: TrainConfig,
    workdir: Path,
    prm: ProcessRewardModel | None,
    generator: Generator,
    examples: Examples,
    step: int,
) -> Refresher | None:
    """What keeps the process reward model up to date, as it was after ``step`` updates."""
    reward = config.reward
    if prm is None or not reward.refresh.every:
        return None
    shown = batches(examples, config.prompts.prompts, seed=config.seed, balance=config.balance)
    folder = workdir / "checkpoints" / "prm"
    refresher = Refresher(reward.refresh, folder, Path(reward.prm), prm, generator, shown)
    refresher.resume(min(step, config.online.steps - 1))  # no refresh after the last update
    return refresher


def stage_prompts(
    config: TrainConfig,
    workdir: Path,
    lm: LanguageModel,
    params: Any,
    dataset: PreparedDataset,
    stop: StopSignal,
) -> tuple[Examples, dict[str, float]]:
    """The prompts of the stage, and their pass rates by uid where they were measured.

    All of the training split; or what a filter keeps of it with the policy as it is now; or what
    an earlier run left unsolved and, where that is not enough, new pairs.
    """
    source = open_split(dataset.path, "train")
    if config.prompts.unsolved_share:
        unsolved, seen = read_unsolved(config.init_from)
        return unsolved_prompts(unsolved, seen, source, config.prompts), {}
    if not config.measure.pairs:
        return source, {}
    kept = filter_prompts(
        workdir / "filter", lm, params, dataset, config.measure, config.filter, stop
    )
    if kept is None:
        raise SystemExit(0)
    return [source[row] for row in kept.rows], dict(kept.rates)
