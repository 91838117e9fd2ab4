"""From prompts to a training batch: sample groups, read and verify their steps, credit tokens."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from she_jax.cot import Chain, CotSchema
from she_jax.data.examinations import FULL_MARKS, with_all_truth
from she_jax.rl.advantages import (
    ESTIMATORS,
    informative_groups,
    token_advantages,
)
from she_jax.rl.losses import row_counts, token_weights
from she_jax.rl.rewards import combine_rewards, step_batch, verify
from she_jax.rl.sampling import jit_sample
from she_jax.rl.steps import step_token_counts
from she_jax.rl.update import make_scorer
from she_jax.train.examiner import (
    Examiner,
    chain_examinations,
    contradictions,
    examine_chains,
)
from she_jax.train.report import write_samples
from she_jax.train.scalar import ScalarReward
from she_jax.train.setup import Policy
from she_jax.train.workdir import Config
from she_jax.types import Advantages, Example, Rollout, StepBatch, TrainBatch

STEPWISE = ("srpo", "process", "prorag")  # the estimators that read the steps' rewards


@dataclass(frozen=True, kw_only=True)
class Experience:
    """One step's rollouts, as the update reads them and as people do."""

    batch: TrainBatch
    figures: dict[str, float]
    examples: Sequence[Example]
    texts: Sequence[str]
    chains: Sequence[Chain]
    steps: StepBatch
    outcome: np.ndarray  # reward of each rollout, [B]
    rewards: np.ndarray  # of each step, the hybrid's, [B, S]
    known: np.ndarray  # where there is one, [B, S]
    advantages: np.ndarray  # of each step's tokens, [B, S]
    informative: np.ndarray  # groups that are not known to teach nothing, [N]
    # Groups that were sampled and not taken: prompt, pass rate, whether it was informative.
    dropped: tuple[tuple[Example, float, bool], ...] = ()

    @property
    def pass_rates(self) -> np.ndarray:
        """The share of each group's rollouts that the verifier finds right, [N]."""
        right = np.asarray(self.steps.outcome) >= FULL_MARKS
        return right.reshape(len(self.examples), -1).mean(axis=1)

    @property
    def rates(self) -> tuple[list[Example], list[float]]:
        """All prompts that were sampled, the dropped ones too, and their pass rates.

        Without those that nobody judged: of them no rollout can come out right.
        """
        kept = zip(self.examples, self.pass_rates.tolist(), strict=True)
        every = [*((example, rate) for example, rate, _ in self.dropped), *kept]
        known = [(example, rate) for example, rate in every if example.label is not None]
        return [example for example, _ in known], [rate for _, rate in known]

    def write(
        self,
        path: Path,
        step: int,
        schema: CotSchema,
        examiner: Examiner | None = None,
        groups: int = 2,
    ) -> None:
        """Writes the first few groups as a page one can read, with the examiner's remarks."""
        size = len(self.texts) // len(self.examples)
        rows, remarks = size * groups, {}
        if examiner is not None:
            owners = [example for example in self.examples[:groups] for _ in range(size)]
            where, steps = chain_examinations(self.chains[:rows], owners, schema)
            scores, scored = map(np.asarray, (self.steps.model_score, self.steps.model_known))
            said = zip(where, examiner.remarks(steps), strict=True)
            remarks = {
                place: f"{f'{scores[place]:.2f}' if scored[place] else 'unknown'} {text}"
                for place, text in said
            }
        write_samples(
            path,
            step=step,
            schema=schema,
            examples=self.examples[:groups],
            texts=self.texts[:rows],
            chains=self.chains[:rows],
            rewards=self.rewards[:rows],
            advantages=self.advantages[:rows],
            step_mask=self.known[:rows],
            outcomes=self.outcome[:rows],
            remarks=remarks,
        )


def make_collector(
    config: Config,
    policy: Policy,
    reference: Any,
    examiner: Examiner | None = None,
    scalar: ScalarReward | None = None,
) -> Callable[[Any, Sequence[Example], Array], Experience]:
    """Makes the function that turns examples into experience.

    Args:
      config: of the run; its ``rl`` part is read.
      policy: model, prompts and devices; its parameters are not read.
      reference: parameters of the frozen reference policy.
      examiner: examines every step, beside the verifier.
      scalar: its score takes the place of the verifier's outcome reward in the advantages; which
        groups are informative, and what ``gate`` lets through, stays with the verifier's.

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
    credit = jax.jit(make_creditor(config))

    def collect(params: Any, examples: Sequence[Example], key: Array) -> Experience:
        """Samples, reads, examines, credits."""
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
        owners = [example for example in examples for _ in range(rl.group_size)]
        steps = step_batch(
            chains,
            owners,
            prompts.schema,
            tokens=on_host.tokens,
            completion_mask=on_host.completion_mask,
            newlines=newlines,
            truncated=truncated,
            format_weight=rl.format_weight,
        )
        verified, told = time.perf_counter(), {}
        if examiner is not None:
            # The sampler folds in the numbers of its tokens, so this key is no other's.
            own = jax.random.fold_in(key, prompts.completion_length)
            steps, told = _examined(examiner, steps, chains, owners, prompts.schema, own)
            told["time/examine"] = time.perf_counter() - verified
        outcome = steps.outcome if scalar is None else jnp.asarray(scalar.score(on_host))
        rewards, known = combine_rewards(steps, config.reward.combine, config.reward.model_weight)
        advantages, by_token, weights, informative = credit(
            steps, rewards, known, outcome, rollout.completion_mask
        )
        batch = TrainBatch(
            tokens=rollout.tokens,
            positions=place,
            weights=weights,
            counts=row_counts(len(owners), prompts.completion_length, rl.normalisation),
            advantages=by_token,
            old_logps=rollout.logps,
            ref_logps=ref_logps,
            temperature=jnp.float32(rl.temperature),
            kl_weight=jnp.float32(rl.kl_weight),
            prompt_length=prompts.prompt_length,
            group_size=shared,
        )
        # Where the verifier is silent and an examiner speaks, a group may teach all the same.
        silent = np.array([example.label is None for example in examples])
        judge = examiner is not None or scalar is not None
        teaches = np.asarray(informative) | (silent & judge)
        figures = {
            **_rewards(rewards, known, outcome, prompts.schema),
            **({} if scalar is None else {"outcome": float(jnp.mean(steps.outcome))}),
            **told,
            **exploration(chains, on_host, steps, prompts.schema, len(examples)),
            "zero_variance": 1.0 - float(teaches.mean()),
            "sampled_tokens": int(on_host.completion_mask.sum()),
            "length": float(on_host.completion_mask.sum(axis=1).mean()),
            "truncated": float(truncated.mean()),
            "parse_rate": float(np.mean([chain.well_formed for chain in chains])),
            "cut_prompts": cut,
            "time/sample": sampled - began,
            "time/verify": time.perf_counter() - sampled - told.get("time/examine", 0.0),
        }
        by_step = advantages.step + advantages.outcome[:, None]
        return Experience(
            batch=batch,
            figures=figures,
            examples=examples,
            texts=texts,
            chains=chains,
            steps=steps,
            outcome=np.asarray(outcome),
            rewards=np.asarray(rewards),
            known=np.asarray(known),
            advantages=np.clip(np.asarray(by_step), -rl.clamp, rl.clamp),
            informative=teaches,
        )

    return collect


def refilled(
    collect: Callable[[Any, Sequence[Example], Array], Experience],
    params: Any,
    draw: Callable[[], Sequence[Example]],
    key: Array,
    rounds: int,
) -> Experience:
    """Experience whose groups the verifier tells apart, as far as so many rounds can make it so.

    Groups that teach nothing give way to informative ones of another batch of prompts; those of the
    first batch that are informative stay. After the last round what is left stays too: it has no
    advantage, and only the KL term reads it. Groups that were sampled and not taken are counted,
    ``dropped`` those that teach nothing and ``surplus`` those for which there was no place, and
    they count in the running pass rates. All other figures are of the first batch, which is what
    the policy meets, but ``zero_variance/refilled``, ``sampled_tokens`` and the times. DAPO's
    dynamic sampling (arXiv 2503.14476, section 3.2), with a bound.

    Args:
      collect: from ``make_collector``.
      params: of the policy.
      draw: gives the next batch of prompts.
      key: consumed.
      rounds: further batches at most, >= 0.
    """
    seen = collect(params, draw(), key)
    used = 0
    while used < rounds and not seen.informative.all():
        used += 1
        # Far from the numbers of tokens, which the sampler folds into its own key.
        seen = _replaced(seen, collect(params, draw(), jax.random.fold_in(key, 2**31 - used)))
    if not rounds:
        return seen
    surplus = sum(informative for *_, informative in seen.dropped)
    figures = {
        "refills": used,
        "dropped": len(seen.dropped) - surplus,
        "surplus": surplus,
        "zero_variance/refilled": 1.0 - float(seen.informative.mean()),
    }
    return dataclasses.replace(seen, figures=seen.figures | figures)


def _replaced(seen: Experience, more: Experience) -> Experience:
    """The uninformative groups of one experience exchanged for informative ones of another."""
    gaps, found = np.flatnonzero(~seen.informative), np.flatnonzero(more.informative)
    count, groups = min(len(gaps), len(found)), len(seen.examples)
    source = np.arange(groups)
    source[gaps[:count]] = groups + found[:count]
    size = len(seen.texts) // groups
    rows = (source[:, None] * size + np.arange(size)).reshape(-1)

    def by_row(one: Any, other: Any) -> Any:
        """Rows of arrays of rollouts; what is one for all stays."""
        if not np.ndim(one):
            return one
        module = np if isinstance(one, np.ndarray) else jnp
        return module.concatenate([one, other])[rows]

    both = [*seen.examples, *more.examples]
    rates = np.concatenate([seen.pass_rates, more.pass_rates])
    left = np.setdiff1d(np.arange(len(both)), source)
    arrays = {
        name: jax.tree.map(by_row, getattr(seen, name), getattr(more, name))
        for name in ("batch", "steps", "outcome", "rewards", "known", "advantages")
    }
    informative = np.concatenate([seen.informative, more.informative])
    figures = {
        name: value + more.figures[name] if name.startswith(("time/", "sampled")) else value
        for name, value in seen.figures.items()
    }
    return Experience(
        **arrays,
        figures=figures,
        examples=[both[n] for n in source],
        texts=[[*seen.texts, *more.texts][row] for row in rows],
        chains=[[*seen.chains, *more.chains][row] for row in rows],
        informative=informative[source],
        dropped=(
            *seen.dropped,
            *((both[n], float(rates[n]), bool(informative[n])) for n in left),
        ),
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


def make_creditor(config: Config) -> Callable[..., tuple[Advantages, Array, Array, Array]]:
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
        by_token = token_advantages(advantages, steps.step_ids, completion_mask, clamp=rl.clamp)
        weights = token_weights(completion_mask, steps.step_ids, rl.normalisation)
        # By the verifier's word: a model's scores differ between any two rollouts.
        seen = steps.step_mask & steps.verifier_known & (rl.estimator in STEPWISE)
        informative = informative_groups(
            steps.outcome, steps.verifier, seen, group_size=rl.group_size
        )
        return advantages, by_token, weights, informative

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
