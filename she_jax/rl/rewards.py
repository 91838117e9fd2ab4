"""Rewards: the offline verifier on the host, which compares a chain with human annotation, and the
hybrid of its word and an examiner's.

Everything here is a pure function.
"""

import re
from collections import Counter
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from she_jax.cot import Chain, CotSchema, ParsedStep, Step
from she_jax.rl.steps import step_ids
from she_jax.types import Example, StepBatch

COMBINATIONS = ("precedence", "mean", "gate", "verifier_only", "model_only")


def verify(
    chain: Chain, example: Example, schema: CotSchema
) -> tuple[Float32[np.ndarray, "S"], Bool[np.ndarray, "S"]]:
    """Compares each step of a chain with what humans said of it.

    - The label is known where the example has one, any other step where its name is among the
      example's ``annotations``. A step that the chain lacks is not known: there is nothing to
      credit.
    - A step with a verdict earns 1 if the verdict is the true one, else 0; an unreadable one 0.
    - A free step, whose truth is ``;``-separated items, earns the number of those items found among
      its own over the larger of the two numbers of items, so that what is missing and what is too
      much both cost. Case does not count, and the first item (the true first one) may have words
      before it, such as "asks for".
    - An optional step that the truth does not have (a ``check_3`` where two attributes were asked)
      earns 0, and is known if humans annotated all steps of its family (``check_1``, ...) here.

    Reconstruction: the paper's annotation verifier (arXiv 2510.07972) is not described in what
    could be obtained.

    Args:
      chain: as parsed by ``schema``.
      example: the pair the chain is about.
      schema: the steps.

    Returns:
      Rewards in [0, 1], and where they are known; the reward is 0 where they are not.
    """
    judged = [
        None if parsed is None else _judge(step, parsed, example)
        for step, parsed in zip(schema.steps, chain.steps, strict=True)
    ]
    rewards = np.array([reward or 0.0 for reward in judged], dtype=np.float32)
    return rewards, np.array([reward is not None for reward in judged])


def left_out(chain: Chain, example: Example, schema: CotSchema) -> Bool[np.ndarray, "S"]:
    """The optional steps that humans annotated and the chain does not have."""
    return np.array(
        [
            parsed is None and step.optional and _truth(step, example) is not None
            for step, parsed in zip(schema.steps, chain.steps, strict=True)
        ]
    )


def outcome_reward(
    chain: Chain, example: Example, *, truncated: bool = False, format_weight: float = 0.1
) -> float:
    """Reward of a whole chain.

    1 for the right label in a well-formed chain, ``format_weight`` for any other well-formed chain,
    0 for the rest. A truncated rollout earns 0 whatever it says. Where the example has no label, no
    label is right.

    Args:
      chain: the parsed chain.
      example: the pair it is about.
      truncated: True where the rollout ran out of tokens before its end.
      format_weight: what good form alone is worth, in [0, 1), 1 being that of a right label.
    """
    if truncated or not chain.well_formed:
        return 0.0
    return 1.0 if example.label is not None and chain.label == example.label else format_weight


def step_batch(
    chains: Sequence[Chain],
    examples: Sequence[Example],
    schema: CotSchema,
    *,
    tokens: Int[Array | np.ndarray, "B T"],
    completion_mask: Bool[Array | np.ndarray, "B T"],
    newlines: Int[np.ndarray, "V"],
    truncated: Bool[np.ndarray, "B"],
    format_weight: float = 0.1,
) -> StepBatch:
    """Sees a batch of rollouts as steps with the verifier's rewards; no examiner has spoken yet.

    An optional step that humans annotated and a rollout leaves out counts as one that it has and
    got wrong, though it has no tokens: else leaving out what is hard would cost nothing.

    Args:
      chains: one a rollout, parsed from exactly what the completion decodes to.
      examples: one a rollout, so each prompt's example G times over.
      schema: the steps.
      tokens: token ids.
      completion_mask: True on the sampled tokens, the end-of-sequence token included.
      newlines: how many newlines each token id holds; see ``she_jax.rl.steps.step_ids``.
      truncated: True where a rollout ran out of tokens before its end.
      format_weight: see ``outcome_reward``.

    Raises:
      ValueError: if the numbers of chains, examples and rows of tokens differ.
    """
    if not len(chains) == len(examples) == len(tokens):
        raise ValueError(
            f"{len(chains)} chains, {len(examples)} examples, {len(tokens)} rows of tokens: "
            "expected one of each a rollout"
        )
    lines = np.full((len(chains), max(len(c.line_steps) for c in chains)), -1, dtype=np.int32)
    for row, chain in zip(lines, chains, strict=True):
        row[: len(chain.line_steps)] = chain.line_steps
    owed = np.stack([left_out(c, ex, schema) for c, ex in zip(chains, examples, strict=True)])
    has = np.array([[step is not None for step in chain.steps] for chain in chains])
    verified = [verify(chain, ex, schema) for chain, ex in zip(chains, examples, strict=True)]
    outcome = [
        outcome_reward(chain, example, truncated=bool(cut), format_weight=format_weight)
        for chain, example, cut in zip(chains, examples, truncated, strict=True)
    ]
    shape = len(chains), len(schema.steps)
    return StepBatch(
        step_ids=jnp.asarray(step_ids(tokens, completion_mask, newlines, lines)),
        step_mask=jnp.asarray(has | owed),
        verifier=jnp.asarray(np.stack([rewards for rewards, _ in verified])),
        verifier_known=jnp.asarray(np.stack([known for _, known in verified]) | owed),
        model_score=jnp.zeros(shape, jnp.float32),
        model_known=jnp.zeros(shape, bool),
        outcome=jnp.asarray(outcome, dtype=jnp.float32),
    )


def combine_rewards(
    steps: StepBatch, how: str, model_weight: float | Float[Array | np.ndarray, "S"] = 0.5
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """The hybrid examination: one reward a step from the verifier's word v and the examiner's m.

    - ``precedence``: v where humans said something, else m.
    - ``mean``: (1 - w) v + w m where both are known, else the one that is.
    - ``gate``: v where it is known, else m, but only in rollouts whose label is right (outcome 1):
      elsewhere nobody knows.
    - ``verifier_only``, ``model_only``: the other is not listened to.

    A step that the rollout lacks is known only if it was left out (see ``step_batch``). A reward is
    0 where it is not known, and takes no part in its group's statistics if the mask goes to the
    estimator beside it.

    Reconstruction: the abstract of SHE (arXiv 2510.07972) names both parts of the hybrid; how they
    are put together could not be obtained. That a gated step is unknown, not wrong, is a guess.

    Args:
      steps: the rollouts' steps with what both say of them.
      how: one of the above.
      model_weight: w in [0, 1], one for all steps or one a step; read by ``mean`` only.

    Returns:
      Rewards in [0, 1], and where they are known.

    Raises:
      ValueError: if ``how`` is unknown.
    """
    human = steps.step_mask & steps.verifier_known
    model = steps.step_mask & steps.model_known
    if how == "verifier_only":
        weight, known = jnp.zeros(human.shape), human
    elif how == "model_only":
        weight, known = jnp.ones(human.shape), model
    elif how == "mean":
        both = jnp.broadcast_to(jnp.asarray(model_weight, jnp.float32), human.shape[1:])[None]
        weight, known = jnp.where(human & model, both, model * 1.0), human | model
    elif how in ("precedence", "gate"):
        if how == "gate":
            model = model & (steps.outcome >= 1)[:, None]
        weight, known = jnp.where(human, 0.0, 1.0), human | model
    else:
        raise ValueError(f"combine={how!r}: expected one of {COMBINATIONS}")
    # Each word is silenced where it is not known, whatever number stands there.
    verifier = jnp.where(human, steps.verifier, 0.0)
    score = jnp.where(model, steps.model_score, 0.0)
    return jnp.where(known, (1 - weight) * verifier + weight * score, 0.0), known


def _judge(step: Step, parsed: ParsedStep, example: Example) -> float | None:
    """The verifier's reward of a step that the chain has; None where humans said nothing of it."""
    truth = _truth(step, example)
    if truth is None:
        return 0.0 if step.optional and _too_much(step, example) else None
    if step.verdicts:
        return float(parsed.verdict == truth)
    return _items_found(truth, parsed.text) if parsed.valid else 0.0


def _truth(step: Step, example: Example) -> str | None:
    if step.name == "label":
        return None if example.label is None else str(example.label)
    if example.steps is None or step.name not in example.annotations:
        return None
    return example.steps.get(step.name)


def _too_much(step: Step, example: Example) -> bool:
    """Whether humans annotated all steps of this one's family, of which the truth has fewer."""
    family, number = _numbered(step.name)
    told = {name: _numbered(name) for name in example.steps or ()}
    own = {name: n for name, (kind, n) in told.items() if kind == family}
    return bool(own) and own.keys() <= set(example.annotations) and number > max(own.values())


def _numbered(name: str) -> tuple[str, int]:
    """A step's family and its number there: ``check_3`` is the third ``check_``."""
    family = name.rstrip("0123456789")
    return family, int(name[len(family) :] or 0)


def _items_found(truth: str, text: str) -> float:
    """Share of the true items among the written ones, over the larger number of items."""
    wanted, given = _items(truth), _items(text)
    # Only the first true item, at the start, may have words before it: elsewhere "not leather"
    # must not pass for "leather".
    if wanted and given and re.search(rf"(^|\W){re.escape(wanted[0])}$", given[0]):
        given[0] = wanted[0]
    found = sum((Counter(wanted) & Counter(given)).values())
    return found / max(len(wanted), len(given), 1) if wanted else float(not given)


def _items(text: str) -> list[str]:
    return [item for part in text.lower().split(";") if (item := " ".join(part.split()))]
