"""From prompts to a training batch: sample groups, read and verify their steps, credit tokens."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from she_jax.cot import Chain, CotSchema
from she_jax.rewards.prm.dataset import FULL_MARKS, with_all_truth
from she_jax.rl.advantages import (
    ESTIMATORS,
    STEPWISE,
    informative_groups,
    limited,
    token_advantages,
)
from she_jax.rl.losses import row_counts, token_weights
from she_jax.rewards.verifier import combine_rewards, step_batch, verify
from she_jax.generate.sampler import jit_sample
from she_jax.rl.steps import step_token_counts
from she_jax.rl.update import make_scorer
from she_jax.rewards.prm.model import Examiner, contradictions, examine_chains
from she_jax.rollouts.batch import Experience
from she_jax.rewards.orm.model import ScalarReward
from she_jax.training.setup import Policy
from she_jax.training.workdir import Config
from she_jax.types import Example, Rollout, StepBatch, TrainBatch


class Collector:
    """Turns examples into experience.

    Args:
      config: of the run; its ``rl`` and ``reward`` parts are read.
      policy: model, prompts and devices; its parameters are not read.
      reference: parameters of the frozen reference policy.
      examiner: examines every step, beside the verifier.
      scalar: its score takes the place of the verifier's outcome reward in the advantages; which
        groups are informative, and what ``gate`` lets through, stays with the verifier's.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        reference: Any,
        examiner: Examiner | None = None,
        scalar: ScalarReward | None = None,
    ):
        self._config, self._prompts, self._reference = config, policy.format, reference
        self._examiner, self._scalar = examiner, scalar
        self._newlines = self._prompts.newlines(policy.model.config.vocab_size)
        rl = config.rl
        self._sample = jit_sample(
            policy.model,
            group_size=rl.group_size,
            max_new_tokens=self._prompts.completion_length,
            eos_id=self._prompts.eos_ids,
            pad_id=self._prompts.pad_id,
            top_k=rl.top_k,
            halvings=rl.halvings,
            mesh=policy.mesh,
        )
        # Where a micro-batch is smaller than a group, the rows of a part of it share their prompt.
        rows = rl.prompts * rl.group_size // rl.loss.micro_batches
        self._shared = math.gcd(rl.group_size, rows)
        self._score = make_scorer(
            policy.model.forward,
            start=self._prompts.prompt_length,
            micro_batches=rl.loss.micro_batches,
            group_size=self._shared,
        )
        self._credit = jax.jit(make_creditor(config))

    def __call__(self, params: Any, examples: Sequence[Example], key: Array) -> Experience:
        """Samples with ``params``, the key consumed; reads, examines, credits."""
        began = time.perf_counter()
        config, prompts, rl = self._config, self._prompts, self._config.rl
        asked, cut = prompts.prompts(examples)
        rollout = self._sample(params, asked, key, rl.temperature, rl.top_p)
        # Dispatched before the host reads the text, so that the device has something to do.
        places, ref_logps = self._refer(rollout)
        on_host = jax.device_get(rollout)
        sampled = time.perf_counter()
        texts = prompts.texts(on_host)
        chains = [prompts.schema.parse(text) for text in texts]
        owners = [example for example in examples for _ in range(rl.group_size)]
        steps = self._verify(on_host, chains, owners)
        verified, told = time.perf_counter(), {}
        if self._examiner is not None:
            # The sampler folds in the numbers of its tokens, so this key is no other's.
            own = jax.random.fold_in(key, prompts.completion_length)
            steps, told = _examined(self._examiner, steps, chains, owners, prompts.schema, own)
            told["time/examine"] = time.perf_counter() - verified
        outcome = steps.outcome
        if self._scalar is not None:
            outcome = jnp.asarray(self._scalar.score(on_host))
            told["outcome"] = float(jnp.mean(steps.outcome))
        rewards, known = combine_rewards(steps, config.reward.combine, config.reward.model_weight)
        by_step, by_token, weights, informative = self._credit(
            steps, rewards, known, outcome, rollout.completion_mask
        )
        by_step = np.asarray(by_step)
        teaches = self._teaches(informative, examples)
        figures = {
            **_rewards(rewards, known, outcome, prompts.schema),
            **told,
            **exploration(chains, on_host, steps, prompts.schema, len(examples)),
            **assignment(by_step, steps, prompts.schema),
            "zero_variance": 1.0 - float(teaches.mean()),
            "sampled_tokens": int(on_host.completion_mask.sum()),
            "length": float(on_host.completion_mask.sum(axis=1).mean()),
            "truncated": float(prompts.truncated(on_host).mean()),
            "parse_rate": float(np.mean([chain.well_formed for chain in chains])),
            "cut_prompts": cut,
            "time/sample": sampled - began,
            "time/verify": time.perf_counter() - sampled - told.get("time/examine", 0.0),
        }
        return Experience(
            batch=self._batch(rollout, places, ref_logps, by_token, weights),
            figures=figures,
            examples=examples,
            texts=texts,
            chains=chains,
            steps=steps,
            outcome=np.asarray(outcome),
            rewards=np.asarray(rewards),
            known=np.asarray(known),
            advantages=by_step,
            informative=teaches,
        )

    def _refer(self, rollout: Rollout) -> tuple[Array, Array | None]:
        """Where each token stands in its row, and what the reference policy makes of it."""
        mask = rollout.prompt_mask | rollout.completion_mask
        places = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1)
        rl = self._config.rl
        if not rl.kl_weight:
            return places, None
        temperature = jnp.float32(rl.temperature)
        return places, self._score(self._reference, rollout.tokens, places, temperature)

    def _verify(
        self, rollout: Rollout, chains: Sequence[Chain], owners: Sequence[Example]
    ) -> StepBatch:
        """The steps of chains and the verifier's word on them."""
        return step_batch(
            chains,
            owners,
            self._prompts.schema,
            tokens=rollout.tokens,
            completion_mask=rollout.completion_mask,
            newlines=self._newlines,
            truncated=self._prompts.truncated(rollout),
            format_weight=self._config.rl.format_weight,
        )

    def _teaches(self, informative: Array, examples: Sequence[Example]) -> np.ndarray:
        """Groups that are not known to teach nothing.

        Those whose rollouts the verifier tells apart, and those of pairs without a label where a
        reward model speaks. What it says of single steps of other pairs does not count here: its
        scores differ between any two rollouts.
        """
        silent = np.array([example.label is None for example in examples])
        judged = self._examiner is not None or self._scalar is not None
        return np.asarray(informative) | (silent & judged)

    def _batch(
        self,
        rollout: Rollout,
        places: Array,
        ref_logps: Array | None,
        by_token: Array,
        weights: Array,
    ) -> TrainBatch:
        """What the update reads."""
        prompts, rl = self._prompts, self._config.rl
        rows = rollout.tokens.shape[0]
        return TrainBatch(
            tokens=rollout.tokens,
            positions=places,
            weights=weights,
            counts=row_counts(rows, prompts.completion_length, rl.normalisation),
            advantages=by_token,
            old_logps=rollout.logps,
            ref_logps=ref_logps,
            temperature=jnp.float32(rl.temperature),
            kl_weight=jnp.float32(rl.kl_weight),
            prompt_length=prompts.prompt_length,
            group_size=self._shared,
        )


def exploration(
    chains: Sequence[Chain], rollout: Rollout, steps: StepBatch, schema: CotSchema, groups: int
) -> dict[str, float]:
    """How far the policy still explores.

    Returns:
      ``paths``, the mean number of different paths (tuples of the steps' verdicts) in a group;
      ``entropy/<step>``, the mean of -log p over the tokens sampled in a step, in nats: an estimate
      of the policy's entropy there, at the sampling temperature.
    """
    taken = np.array([schema.path(chain) for chain in chains]).reshape(groups, -1)
    figures = {"paths": float(np.mean([len(set(own)) for own in taken.tolist()]))}
    surprise, ids = -np.asarray(rollout.logps), np.asarray(steps.step_ids)
    for k, name in enumerate(schema.names):
        if (own := ids == k).any():
            figures[f"entropy/{name}"] = float(surprise[own].mean())
    return figures


def assignment(
    advantages: Float[np.ndarray, "B S"], steps: StepBatch, schema: CotSchema
) -> dict[str, float]:
    """Whether credit goes to the steps that earn it, whatever estimator gave it.

    Returns:
      Of the written steps whose verdict the verifier knows: ``credit/<step>``, the share that has
      an advantage, and ``astray/<step>``, the share whose advantage is of the wrong sign, that of a
      right step below 0 or that of a wrong one above.
    """
    sizes = step_token_counts(steps.step_ids, steps.step_ids >= 0, len(schema.names))
    judged = np.asarray(steps.step_mask & steps.verifier_known & (sizes > 0))
    right = np.asarray(steps.verifier) >= FULL_MARKS
    wrong_way = np.where(right, advantages < 0, advantages > 0)
    figures = {}
    for k, name in enumerate(schema.names):
        if (own := judged[:, k]).any():
            figures[f"credit/{name}"] = float((advantages[own, k] != 0).mean())
            figures[f"astray/{name}"] = float(wrong_way[own, k].mean())
    return figures


def make_creditor(config: Config) -> Callable[..., tuple[Array, Array, Array, Array]]:
    """Advantages by step and by token, token weights, and which groups carry signal."""
    rl = config.rl

    def credit(
        steps: StepBatch,
        rewards: Float[Array, "B S"],
        known: Bool[Array, "B S"],
        outcome: Float[Array, "B"],
        completion_mask: Bool[Array, "B T"],
    ):
        """Credits ``rewards`` and ``outcome`` of steps that stand where ``steps`` says."""
        told = rewards, known, outcome
        sizes = step_token_counts(steps.step_ids, completion_mask, rewards.shape[1])
        own: dict[str, Any] = {}
        if rl.estimator == "srpo":
            # The threshold is for the verifier's word; an examiner's is a probability.
            mixed = config.reward.combine == "mean"
            exact = steps.verifier_known & ~(mixed & steps.model_known)
            exact &= config.reward.combine != "model_only"
            own = rl.srpo.to_dict()
            own["correct_from"] = jnp.where(exact, min(rl.srpo.correct_from, FULL_MARKS), 0.5)
        advantages = ESTIMATORS[rl.estimator](
            *told, group_size=rl.group_size, step_tokens=sizes, tol=rl.tol, **own
        )
        bounds = {"clamp": rl.clamp, "negative": rl.negative}
        by_step = limited(advantages.step + advantages.outcome[:, None], **bounds)
        by_token = token_advantages(advantages, steps.step_ids, completion_mask, **bounds)
        weights = token_weights(completion_mask, steps.step_ids, rl.normalisation)
        # By the verifier's word: a model's scores differ between any two rollouts.
        seen = steps.step_mask & steps.verifier_known & (rl.estimator in STEPWISE)
        informative = informative_groups(
            steps.outcome, steps.verifier, seen, group_size=rl.group_size, tol=rl.tol
        )
        return by_step, by_token, weights, informative

    return credit


def _rewards(
    rewards: Float[Array, "B S"],
    known: Bool[Array, "B S"],
    outcome: Float[Array, "B"],
    schema: CotSchema,
) -> dict[str, float]:
    """Mean outcome reward, and the mean of each step's rewards where they are known."""
    counts = np.asarray(known).sum(axis=0)
    means = np.asarray(rewards).sum(axis=0) / np.maximum(counts, 1)  # unknown rewards are 0
    by_step = {
        f"reward/{name}": float(mean)
        for name, mean, count in zip(schema.names, means, counts, strict=True)
        if count
    }
    return {"reward": float(jnp.mean(outcome)), **by_step}


def _examined(
    examiner: Examiner,
    steps: StepBatch,
    chains: Sequence[Chain],
    examples: Sequence[Example],
    schema: CotSchema,
    key: Array,
) -> tuple[StepBatch, dict[str, float]]:
    """The steps with the examiner's word beside the verifier's, and how the two get on."""
    told = examine_chains(examiner, chains, examples, schema, key)
    mask = np.array([[step is not None for step in chain.steps] for chain in chains])
    verifier, known = np.asarray(steps.verifier), np.asarray(steps.verifier_known) & mask
    figures = {
        "examiner/asked": examiner.asked,
        "examiner/repeated": examiner.repeated,
        "examiner/unreadable": float((mask & ~told.known).sum() / max(mask.sum(), 1)),
        **contradictions(verifier, known, told, schema),
        **_truth(chains, examples, schema, told.known),
    }
    scores = {"model_score": jnp.asarray(told.score), "model_known": jnp.asarray(told.known)}
    return dataclasses.replace(steps, **scores), figures


def _truth(
    chains: Sequence[Chain],
    examples: Sequence[Example],
    schema: CotSchema,
    examined: Bool[np.ndarray, "B S"],
) -> dict[str, float]:
    """The share of steps that are truly right among those that were examined.

    Beside the examiner's mean score it tells whether the score can be trusted. A data set that
    knows no more than its annotation says the same as the verifier.
    """
    told = [
        verify(chain, with_all_truth(example), schema)
        for chain, example in zip(chains, examples, strict=True)
    ]
    right = np.stack([rewards for rewards, _ in told]) >= FULL_MARKS
    both = np.stack([known for _, known in told]) & examined
    return {
        f"truth/{name}": float((right & both)[:, k].sum() / count)
        for k, name in enumerate(schema.names)
        if (count := both[:, k].sum())
    }
