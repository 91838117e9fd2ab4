"""The offline verifier: step rewards and outcome rewards by human annotation, on the host.

A user's own rewards have the same types: ``StepRewardFn`` and ``OutcomeRewardFn``. Every function
here is pure.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from she_jax.cot import LABEL_STEP, Chain, CotSchema, ParsedStep, Step
from she_jax.rl.steps import step_ids
from she_jax.types import Example, StepBatch

# (chains, examples), one of each per rollout -> rewards [B, S] in [0, 1], and a mask [B, S] of the
# steps whose reward is known.
StepRewardFn: TypeAlias = Callable[
    [Sequence[Chain], Sequence[Example]], tuple[np.ndarray, np.ndarray]
]
# (chains, examples), one of each per rollout -> rewards [B] in [0, 1]; a rollout with the reward 1
# counts as solved.
OutcomeRewardFn: TypeAlias = Callable[[Sequence[Chain], Sequence[Example]], np.ndarray]


def verify(
    chain: Chain, example: Example, schema: CotSchema
) -> tuple[Float32[np.ndarray, "S"], Bool[np.ndarray, "S"]]:
    """Returns the verifier's step rewards: each step of a chain compared with its annotation.

    - The reward of the label is known if the example has a label. The reward of any other step is
      known if the step is among the example's ``annotations``. The reward of a step that the chain
      lacks is unknown, because there is nothing to credit.
    - A step with a verdict earns 1 if the verdict is the true one, else 0. An unreadable verdict
      earns 0.
    - The truth of a free-text step is a list of ``;``-separated items. The step earns the number of
      true items that it contains, divided by the larger of the two numbers of items, so missing
      and superfluous items both cost. Case is ignored. The first true item, if it is also the first
      written one, may have words before it, such as "asks for".
    - An optional step beyond those that the truth has (``check_3`` for a query with two attributes)
      earns 0. This reward is known if the truth has steps of its family (``check_1``, ...) and all
      of them are annotated.

    Reconstruction: the paper's annotation verifier (arXiv 2510.07972) is not described in what
    could be obtained.

    Args:
      chain: as parsed by ``schema``.
      example: the query-product pair that the chain is about.
      schema: the steps.

    Returns:
      Rewards in [0, 1], and a mask of the known ones. Unknown rewards are 0.
    """
    step_rewards = [
        None if parsed is None else _step_reward(step, parsed, example)
        for step, parsed in zip(schema.steps, chain.steps, strict=True)
    ]
    rewards = np.array([reward or 0.0 for reward in step_rewards], dtype=np.float32)
    return rewards, np.array([reward is not None for reward in step_rewards])


def missing_steps(chain: Chain, example: Example, schema: CotSchema) -> Bool[np.ndarray, "S"]:
    """Returns a mask of the optional steps that are annotated but missing from the chain."""
    return np.array(
        [
            parsed is None and step.optional and _annotation(step, example) is not None
            for step, parsed in zip(schema.steps, chain.steps, strict=True)
        ]
    )


def outcome_reward(
    chain: Chain, example: Example, *, truncated: bool = False, format_weight: float = 0.1
) -> float:
    """Returns the outcome reward of a chain, in [0, 1].

    1 for the correct label in a well-formed chain, ``format_weight`` for any other well-formed
    chain, 0 otherwise. A truncated rollout always earns 0. If the example has no label, no label is
    correct.

    Args:
      chain: the parsed chain.
      example: the query-product pair that it is about.
      truncated: True if the rollout reached its token limit before its end.
      format_weight: reward of the format alone, in [0, 1).
    """
    if truncated or not chain.well_formed:
        return 0.0
    return 1.0 if example.label is not None and chain.label == example.label else format_weight


def annotation_reward(schema: CotSchema) -> StepRewardFn:
    """The step rewards of the offline verifier, for a batch of rollouts.

    An annotated optional step that a rollout leaves out has the reward 0, though it has no tokens.
    Otherwise leaving out a difficult step would cost nothing.
    """

    def step_reward(
        chains: Sequence[Chain], examples: Sequence[Example]
    ) -> tuple[np.ndarray, np.ndarray]:
        pairs = list(zip(chains, examples, strict=True))
        verified = [verify(chain, example, schema) for chain, example in pairs]
        omitted = np.stack([missing_steps(chain, example, schema) for chain, example in pairs])
        rewards = np.stack([rewards for rewards, _ in verified])
        return rewards, np.stack([known for _, known in verified]) | omitted

    return step_reward


def label_reward(format_weight: float = 0.1) -> OutcomeRewardFn:
    """The outcome rewards of ``outcome_reward``, for a batch of rollouts."""

    def outcome(chains: Sequence[Chain], examples: Sequence[Example]) -> np.ndarray:
        rewards = [
            outcome_reward(chain, example, truncated=chain.truncated, format_weight=format_weight)
            for chain, example in zip(chains, examples, strict=True)
        ]
        return np.array(rewards, dtype=np.float32)

    return outcome


def step_batch(
    chains: Sequence[Chain],
    examples: Sequence[Example],
    step_reward: StepRewardFn,
    outcome_reward: OutcomeRewardFn,
    *,
    tokens: Int[Array | np.ndarray, "B T"],
    completion_mask: Bool[Array | np.ndarray, "B T"],
    newlines: Int[np.ndarray, "V"],
) -> StepBatch:
    """Splits rollouts into steps with their rewards; process reward model scores are unknown.

    A step that ``step_reward`` gives a reward counts as present, also where the rollout lacks it.

    Args:
      chains: one per rollout, parsed from exactly what the completion decodes to.
      examples: one per rollout, so the example of each prompt is repeated G times.
      step_reward: rewards of steps, such as ``annotation_reward``.
      outcome_reward: rewards of rollouts, such as ``label_reward``.
      tokens: token ids.
      completion_mask: True on the sampled tokens, the end-of-sequence token included.
      newlines: number of newlines in each token id; see ``she_jax.rl.steps.step_ids``.

    Raises:
      ValueError: if the numbers of chains, examples and rows of tokens differ, or a reward function
        returns another shape.
    """
    if not len(chains) == len(examples) == len(tokens):
        raise ValueError(
            f"{len(chains)} chains, {len(examples)} examples, {len(tokens)} rows of tokens: "
            "expected one of each per rollout"
        )
    lines = [chain.line_steps for chain in chains]
    present = np.array([[step is not None for step in chain.steps] for chain in chains])
    rewards, known = step_reward(chains, examples)
    outcome = outcome_reward(chains, examples)
    shapes, rows = [list(np.shape(x)) for x in (rewards, known, outcome)], present.shape[0]
    if shapes != [[*present.shape], [*present.shape], [rows]]:
        raise ValueError(
            f"the reward functions returned step rewards {shapes[0]}, mask {shapes[1]} and outcome "
            f"{shapes[2]}: expected {list(present.shape)} twice and [{rows}], a row per rollout "
            "and a column per step of the schema"
        )
    return StepBatch(
        step_ids=jnp.asarray(step_ids(tokens, completion_mask, newlines, lines)),
        step_mask=jnp.asarray(present | known),
        verifier=jnp.asarray(rewards, dtype=jnp.float32),
        verifier_known=jnp.asarray(known),
        model_score=jnp.zeros(present.shape, jnp.float32),
        model_known=jnp.zeros(present.shape, bool),
        outcome=jnp.asarray(outcome, dtype=jnp.float32),
    )


def _step_reward(step: Step, parsed: ParsedStep, example: Example) -> float | None:
    """Returns the verifier's reward of a step that the chain has, None if unknown."""
    truth = _annotation(step, example)
    if truth is None:
        return 0.0 if step.optional and _is_superfluous(step, example) else None
    if step.verdicts:
        return float(parsed.verdict == truth)
    return _item_overlap(truth, parsed.text) if parsed.valid else 0.0


def _annotation(step: Step, example: Example) -> str | None:
    if step.name == LABEL_STEP:
        return None if example.label is None else str(example.label)
    if example.steps is None or step.name not in example.annotations:
        return None
    truth = example.steps.get(step.name)
    # A label may imply a verdict for a step that has others in this chain.
    return None if step.verdicts and truth not in step.verdicts else truth


def _is_superfluous(step: Step, example: Example) -> bool:
    """Whether the step's number exceeds those of its family's true steps, all of them annotated."""
    family, number = _split_number(step.name)
    parts = {name: _split_number(name) for name in example.steps or ()}
    numbers = {name: n for name, (kind, n) in parts.items() if kind == family}
    return (
        bool(numbers)
        and numbers.keys() <= set(example.annotations)
        and number > max(numbers.values())
    )


def _split_number(name: str) -> tuple[str, int]:
    """Returns a step's family and its number in it: ``check_3`` is the third ``check_``."""
    family = name.rstrip("0123456789")
    return family, int(name[len(family) :] or 0)


def _item_overlap(truth: str, text: str) -> float:
    """Returns the number of true items that were written, over the larger number of items."""
    expected, written = _items(truth), _items(text)
    # Only the first true item, at the start, may have words before it: elsewhere "not leather"
    # must not pass for "leather".
    if expected and written and re.search(rf"(^|\W){re.escape(expected[0])}$", written[0]):
        written[0] = expected[0]
    matches = sum((Counter(expected) & Counter(written)).values())
    return matches / max(len(expected), len(written), 1) if expected else float(not written)


def _items(text: str) -> list[str]:
    return [item for part in text.lower().split(";") if (item := " ".join(part.split()))]


FULL_REWARD = 1 - 1e-6


def fully_annotated(example: Example) -> Example:
    """Returns the example with all known steps marked as annotated, so the verifier uses them."""
    return dataclasses.replace(example, annotations=tuple(example.steps or ()))
