"""From prompts to a training batch: sample groups, read and verify their steps, credit tokens."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from she_jax.cot import Chain, CotSchema
from she_jax.rl.advantages import (
    grpo_advantages,
    informative_groups,
    srpo_advantages,
    token_advantages,
)
from she_jax.rl.losses import token_weights
from she_jax.rl.rewards import step_batch
from she_jax.rl.sampling import jit_sample
from she_jax.rl.update import make_scorer
from she_jax.train.report import write_samples
from she_jax.train.setup import Policy
from she_jax.train.workdir import Config
from she_jax.types import Advantages, Example, StepBatch, TrainBatch

ESTIMATORS = ("srpo", "grpo")


@dataclass(frozen=True, kw_only=True)
class Experience:
    """One step's rollouts, as the update reads them and as people do."""

    batch: TrainBatch
    figures: dict[str, float]
    examples: Sequence[Example]
    texts: Sequence[str]
    chains: Sequence[Chain]
    steps: StepBatch
    advantages: np.ndarray  # of each step's tokens, [B, S]

    def write(self, path: Path, step: int, schema: CotSchema, groups: int = 2) -> None:
        """Writes the first few groups as a page one can read."""
        rows = len(self.texts) // len(self.examples) * groups
        known = np.asarray(self.steps.verifier_known & self.steps.step_mask)
        write_samples(
            path,
            step=step,
            schema=schema,
            examples=self.examples[:groups],
            texts=self.texts[:rows],
            chains=self.chains[:rows],
            rewards=np.asarray(self.steps.verifier)[:rows],
            advantages=self.advantages[:rows],
            step_mask=known[:rows],
            outcomes=np.asarray(self.steps.outcome)[:rows],
        )


def make_collector(
    config: Config, policy: Policy, reference: Any
) -> Callable[[Any, Sequence[Example], Array], Experience]:
    """Makes the function that turns examples into experience.

    Args:
      config: of the run; its ``rl`` part is read.
      policy: model, prompts and devices; its parameters are not read.
      reference: parameters of the frozen reference policy.

    Returns:
      ``collect(params, examples, key)``: samples with ``params``, the key consumed.
    """
    rl, prompts = config.rl, policy.format
    newlines = prompts.newlines(policy.model.config.vocab_size)
    sampler = jit_sample(
        policy.model,
        group_size=rl.group_size,
        max_new_tokens=prompts.completion_length,
        eos_id=prompts.eos_ids,
        pad_id=prompts.pad_id,
        top_k=rl.top_k,
        halvings=rl.halvings,
        mesh=policy.mesh,
    )
    # Where a micro-batch is smaller than a group, the rows of a part of it share their prompt.
    rows = rl.prompts * rl.group_size // rl.loss.micro_batches
    shared = math.gcd(rl.group_size, rows)
    score = make_scorer(
        policy.model.forward,
        start=prompts.prompt_length,
        micro_batches=rl.loss.micro_batches,
        group_size=shared,
    )
    credit = jax.jit(_creditor(config))

    def collect(params: Any, examples: Sequence[Example], key: Array) -> Experience:
        began = time.perf_counter()
        asked, cut = prompts.prompts(examples)
        rollout = sampler(params, asked, key, rl.temperature, rl.top_p)
        # Dispatched before the host reads the text, so that the device has something to do.
        mask = rollout.prompt_mask | rollout.completion_mask
        place = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1)
        ref_logps = None
        if rl.kl_weight:
            ref_logps = score(reference, rollout.tokens, place, jnp.float32(rl.temperature))
        on_host = jax.device_get(rollout)
        sampled = time.perf_counter()
        texts = prompts.texts(on_host)
        chains = [prompts.schema.parse(text) for text in texts]
        truncated = prompts.truncated(on_host)
        steps = step_batch(
            chains,
            [example for example in examples for _ in range(rl.group_size)],
            prompts.schema,
            tokens=on_host.tokens,
            completion_mask=on_host.completion_mask,
            newlines=newlines,
            truncated=truncated,
            format_weight=rl.format_weight,
        )
        advantages, by_token, weights, informative = credit(steps, rollout.completion_mask)
        batch = TrainBatch(
            tokens=rollout.tokens,
            positions=place,
            weights=weights,
            advantages=by_token,
            old_logps=rollout.logps,
            ref_logps=ref_logps,
            temperature=jnp.float32(rl.temperature),
            kl_weight=jnp.float32(rl.kl_weight),
            prompt_length=prompts.prompt_length,
            group_size=shared,
        )
        figures = {
            **_rewards(steps, prompts.schema),
            "zero_variance": 1.0 - float(jnp.mean(informative)),
            "length": float(on_host.completion_mask.sum(axis=1).mean()),
            "truncated": float(truncated.mean()),
            "parse_rate": float(np.mean([chain.well_formed for chain in chains])),
            "cut_prompts": cut,
            "time/sample": sampled - began,
            "time/verify": time.perf_counter() - sampled,
        }
        by_step = advantages.step + advantages.outcome[:, None]
        return Experience(
            batch=batch,
            figures=figures,
            examples=examples,
            texts=texts,
            chains=chains,
            steps=steps,
            advantages=np.clip(np.asarray(by_step), -rl.clamp, rl.clamp),
        )

    return collect


def _creditor(config: Config) -> Callable[..., tuple[Advantages, Array, Array, Array]]:
    """Advantages by step and by token, token weights, and which groups carry signal."""
    rl = config.rl

    def credit(steps: StepBatch, completion_mask: Bool[Array, "B T"]):
        rewards = steps.verifier, steps.step_mask & steps.verifier_known, steps.outcome
        if rl.estimator == "srpo":
            advantages = srpo_advantages(*rewards, group_size=rl.group_size, **rl.srpo)
        else:
            advantages = grpo_advantages(*rewards, group_size=rl.group_size)
        by_token = token_advantages(advantages, steps.step_ids, completion_mask, clamp=rl.clamp)
        weights = token_weights(completion_mask, steps.step_ids, rl.normalisation)
        seen = rewards[1] & (rl.estimator == "srpo")
        informative = informative_groups(
            steps.outcome, steps.verifier, seen, group_size=rl.group_size
        )
        return advantages, by_token, weights, informative

    return credit


def _rewards(steps: StepBatch, schema: CotSchema) -> dict[str, float]:
    """Mean outcome reward, and the mean of each step's rewards where they are known."""
    known = np.asarray(steps.step_mask & steps.verifier_known)
    totals = (np.asarray(steps.verifier) * known).sum(axis=0)
    means = totals / np.maximum(known.sum(axis=0), 1)
    by_step = {
        f"reward/{name}": float(mean)
        for name, mean, count in zip(schema.names, means, known.sum(axis=0), strict=True)
        if count
    }
    return {"reward": float(jnp.mean(steps.outcome)), **by_step}
