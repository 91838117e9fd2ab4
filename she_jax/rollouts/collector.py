"""From prompts to a training batch: sample groups, parse and reward their steps, assign credit."""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from she_jax.cot import Chain
from she_jax.generate.language_model import LanguageModel
from she_jax.generate.sampler import jit_sample
from she_jax.rewards.hybrid import RewardSources, combine_rewards
from she_jax.rewards.prm.metrics import prm_diagnostics
from she_jax.rewards.prm.model import score_steps
from she_jax.rewards.verifier import step_batch
from she_jax.rl.advantages import informative_groups
from she_jax.rl.losses import AGGREGATIONS, loss_denominators, token_weights
from she_jax.rl.update import make_scorer
from she_jax.rollouts.batch import RolloutBatch
from she_jax.rollouts.credit import CreditConfig, assign_credit, grpo_credit
from she_jax.rollouts.diagnostics import (
    credit_diagnostics,
    exploration,
    mean_rewards,
    true_step_shares,
)
from she_jax.rollouts.records import PageParts
from she_jax.types import Example, Rollout, StepBatch, TrainBatch


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How rollouts are sampled, and what an update reads of them.

    Attributes:
      prompts: N, prompts a batch.
      group_size: G, rollouts a prompt, at least 2.
      temperature: of the sampling, > 0.
      top_k: sample among the k most probable tokens; 0 for the whole vocabulary.
      top_p: nucleus within the top k, in (0, 1].
      batch_compactions: how often the sampler drops finished rows, >= 0.
      kl_coef: weight of the KL term; at 0 the reference is not evaluated.
      micro_batches: parts in which a batch is worked through.
      loss_aggregation: see ``she_jax.rl.losses.token_weights``.
      stepwise: the estimator reads the rewards of steps, not the outcome alone.

    Raises:
      ValueError: if a value is out of its range.
    """

    prompts: int
    group_size: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    batch_compactions: int = 0
    kl_coef: float = 0.01
    micro_batches: int = 1
    loss_aggregation: str = "token"
    stepwise: bool = True

    def __post_init__(self):
        if self.prompts < 1:
            raise ValueError(f"rl.prompts={self.prompts}: expected at least 1")
        if not self.temperature > 0:
            raise ValueError(f"rl.temperature={self.temperature}: expected a positive number")
        if self.batch_compactions < 0:
            raise ValueError(
                f"rl.batch_compactions={self.batch_compactions}: expected 0 (keep every row) or "
                "more"
            )
        if self.top_p < 1 and not self.top_k:
            raise ValueError(
                f"rl.top_p={self.top_p} narrows the top k: set rl.top_k too, for example 100"
            )
        if self.loss_aggregation not in AGGREGATIONS:
            raise ValueError(
                f"rl.loss_aggregation={self.loss_aggregation!r}: expected one of {AGGREGATIONS}"
            )

    @property
    def rows(self) -> int:
        """B = N * G."""
        return self.prompts * self.group_size


class Collector:
    """Turns examples into a rollout batch.

    Args:
      lm: model, prompts and devices of the policy.
      reference: parameters of the frozen reference policy.
      config: how rollouts are sampled.
      credit: how rewards become advantages.
      rewards: where rewards come from. An outcome reward model's score takes the place of the
        outcome reward in the advantages; which groups are informative, and what ``gate`` lets
        through, is still decided by the outcome reward.
    """

    def __init__(
        self,
        lm: LanguageModel,
        reference: Any,
        config: RolloutConfig,
        credit: CreditConfig,
        rewards: RewardSources,
    ):
        self._prompts, self._reference = lm.prompts, reference
        self._config, self._credit_config, self._rewards = config, credit, rewards
        self._newlines = lm.prompts.newlines(lm.model.config.vocab_size)
        self._sample = jit_sample(
            lm.model,
            group_size=config.group_size,
            max_new_tokens=lm.prompts.completion_length,
            eos_id=lm.prompts.eos_ids,
            pad_id=lm.prompts.pad_id,
            top_k=config.top_k,
            compactions=config.batch_compactions,
            mesh=lm.mesh,
        )
        # Where a micro-batch is smaller than a group, the rows of a part of it share their prompt.
        self._shared = math.gcd(config.group_size, config.rows // config.micro_batches)
        self._score = make_scorer(
            lm.model.forward,
            start=lm.prompts.prompt_length,
            micro_batches=config.micro_batches,
            group_size=self._shared,
        )
        self._credit = jax.jit(self._assign)

    def __call__(self, params: Any, examples: Sequence[Example], key: Array) -> RolloutBatch:
        """Samples groups with ``params``, rewards their steps and assigns credit.

        Args:
          params: of the policy.
          examples: N prompts.
          key: consumed.
        """
        began = time.perf_counter()
        prompts, config = self._prompts, self._config
        batch, cut = prompts.encode_prompts(examples)
        rollout = self._sample(params, batch, key, config.temperature, config.top_p)
        # Dispatched before the host reads the text, so that the device has something to do.
        positions, ref_logps = self._refer(rollout)
        on_host = jax.device_get(rollout)
        sampled = time.perf_counter()
        texts, truncated = prompts.decode(on_host), prompts.truncated(on_host)
        chains = [
            dataclasses.replace(prompts.schema.parse(text), truncated=bool(short))
            for text, short in zip(texts, truncated, strict=True)
        ]
        repeated = [example for example in examples for _ in range(config.group_size)]
        steps = step_batch(
            chains,
            repeated,
            self._rewards.step,
            self._rewards.outcome,
            tokens=on_host.tokens,
            completion_mask=on_host.completion_mask,
            newlines=self._newlines,
        )
        # The sampler folds in the numbers of its tokens, so no other use has this key.
        prm_key = jax.random.fold_in(key, prompts.completion_length)
        steps, scores = self._score_steps(steps, chains, repeated, prm_key)
        outcome = steps.outcome
        if self._rewards.orm is not None:
            outcome = jnp.asarray(self._rewards.orm.score(on_host))
            scores["outcome"] = float(jnp.mean(steps.outcome))
        rewards, known, exact = combine_rewards(steps, self._rewards.combine)
        by_step, by_token, weights, informative = self._credit(
            steps, rewards, known, exact, outcome, rollout.completion_mask
        )
        by_step, groups = np.asarray(by_step), self._informative(informative, examples)
        metrics = {
            **mean_rewards(rewards, known, outcome, prompts.schema),
            **scores,
            **exploration(chains, on_host, steps, prompts.schema, len(examples)),
            **credit_diagnostics(by_step, steps, prompts.schema),
            "zero_variance": 1.0 - float(groups.mean()),
            "sampled_tokens": int(on_host.completion_mask.sum()),
            "length": float(on_host.completion_mask.sum(axis=1).mean()),
            "truncated": float(truncated.mean()),
            "parse_rate": float(np.mean([chain.well_formed for chain in chains])),
            "cut_prompts": cut,
            "time/sample": sampled - began,
            "time/verify": time.perf_counter() - sampled - scores.get("time/score_steps", 0.0),
        }
        return RolloutBatch(
            batch=self._batch(rollout, positions, ref_logps, by_token, weights),
            metrics=metrics,
            examples=examples,
            texts=texts,
            chains=chains,
            steps=steps,
            outcome=np.asarray(outcome),
            rewards=np.asarray(rewards),
            known=np.asarray(known),
            advantages=by_step,
            informative=groups,
            by_label=self._rewards.by_label,
        )

    @property
    def page_parts(self) -> PageParts:
        """What a page of its rollouts needs."""

        def grpo(outcome: np.ndarray) -> np.ndarray:
            return np.asarray(grpo_credit(self._credit_config, jnp.asarray(outcome)))

        prompts, prm = self._prompts, self._rewards.prm
        return PageParts(schema=prompts.schema, pieces=prompts.pieces, grpo=grpo, prm=prm)

    def _refer(self, rollout: Rollout) -> tuple[Array, Array | None]:
        """Positions of the tokens, and their log-probabilities under the reference policy."""
        mask = rollout.prompt_mask | rollout.completion_mask
        positions = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1)
        if not self._config.kl_coef:
            return positions, None
        temperature = jnp.float32(self._config.temperature)
        return positions, self._score(self._reference, rollout.tokens, positions, temperature)

    def _score_steps(
        self, steps: StepBatch, chains: Sequence[Chain], examples: Sequence[Example], key: Array
    ) -> tuple[StepBatch, dict[str, float]]:
        """The steps with the scores of the process reward model, if there is one, and metrics."""
        prm, schema = self._rewards.prm, self._prompts.schema
        if prm is None:
            return steps, {}
        began = time.perf_counter()
        scores = score_steps(prm, chains, examples, schema, key)
        present = np.array([[step is not None for step in chain.steps] for chain in chains])
        verifier, known = np.asarray(steps.verifier), np.asarray(steps.verifier_known) & present
        metrics = {
            "prm/queries": prm.asked,
            "prm/repeated": prm.repeated,
            "prm/unreadable": float((present & ~scores.known).sum() / max(present.sum(), 1)),
            **prm_diagnostics(verifier, known, scores, schema),
            **true_step_shares(chains, examples, schema, scores.known),
            "time/score_steps": time.perf_counter() - began,
        }
        arrays = {
            "model_score": jnp.asarray(scores.score),
            "model_known": jnp.asarray(scores.known),
        }
        return dataclasses.replace(steps, **arrays), metrics

    def _assign(
        self,
        steps: StepBatch,
        rewards: Array,
        known: Array,
        exact: Array,
        outcome: Array,
        completion_mask: Array,
    ) -> tuple[Array, Array, Array, Array]:
        """Advantages of steps and of tokens, loss weights, and which groups are informative."""
        by_step, by_token = assign_credit(
            self._credit_config, rewards, known, exact, outcome, steps.step_ids, completion_mask
        )
        weights = token_weights(completion_mask, steps.step_ids, self._config.loss_aggregation)
        # By the verifier's rewards: a reward model's scores differ between any two rollouts.
        informative = informative_groups(
            steps.outcome,
            steps.verifier,
            steps.step_mask & steps.verifier_known & self._config.stepwise,
            group_size=self._config.group_size,
            min_std=self._credit_config.min_std,
        )
        return by_step, by_token, weights, informative

    def _informative(self, informative: Array, examples: Sequence[Example]) -> np.ndarray:
        """Groups that may carry a learning signal, [N].

        Those whose rollouts the verifier tells apart, and those of unlabeled pairs if there is a
        reward model. Its scores of other pairs' steps do not count here: they differ between any
        two rollouts.
        """
        unlabeled = np.array([example.label is None for example in examples])
        scored = self._rewards.prm is not None or self._rewards.orm is not None
        return np.asarray(informative) | (unlabeled & scored)

    def _batch(
        self,
        rollout: Rollout,
        positions: Array,
        ref_logps: Array | None,
        advantages: Array,
        weights: Array,
    ) -> TrainBatch:
        """The batch that the update reads."""
        prompts, config = self._prompts, self._config
        rows, aggregation = rollout.tokens.shape[0], config.loss_aggregation
        return TrainBatch(
            tokens=rollout.tokens,
            positions=positions,
            loss_weights=weights,
            denominator=loss_denominators(rows, prompts.completion_length, aggregation),
            advantages=advantages,
            old_logps=rollout.logps,
            ref_logps=ref_logps,
            temperature=jnp.float32(config.temperature),
            kl_coef=jnp.float32(config.kl_coef),
            prompt_length=prompts.prompt_length,
            group_size=self._shared,
        )
