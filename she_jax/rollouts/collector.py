"""From prompts to a training batch: sample groups, read and verify their steps, credit tokens."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from she_jax.cot import Chain, CotSchema
from she_jax.generate.language_model import Policy
from she_jax.generate.sampler import jit_sample
from she_jax.rewards.hybrid import combine_rewards
from she_jax.rewards.orm.model import ScalarReward
from she_jax.rewards.prm.metrics import contradictions
from she_jax.rewards.prm.model import Examiner, examine_chains
from she_jax.rewards.verifier import step_batch
from she_jax.rl.losses import row_counts
from she_jax.rl.update import make_scorer
from she_jax.rollouts.batch import Experience
from she_jax.rollouts.credit import make_creditor
from she_jax.rollouts.diagnostics import _rewards, _truth, assignment, exploration
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
