"""Rollouts as plain values, with all that a page shows of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from she_jax.cot import CotSchema
from she_jax.rewards.prm.model import ProcessRewardModel, chain_step_queries
from she_jax.rollouts.batch import RolloutBatch

VERIFIER, MODEL = "verifier", "process reward model"


@dataclass(frozen=True, kw_only=True)
class PageParts:
    """What a page of rollouts takes from the run, beside the rollouts.

    Attributes:
      schema: the steps of the chain.
      pieces: the text that each token of a completion adds.
      grpo: outcome rewards [B] to the advantages [B] that GRPO would give.
      prm: whose critique of each step is shown, or None.
    """

    schema: CotSchema
    pieces: Callable[[Sequence[int]], list[str]]
    grpo: Callable[[np.ndarray], Float[np.ndarray, "B"]]
    prm: ProcessRewardModel | None = None


def rollout_records(
    step: int, rollouts: RolloutBatch, parts: PageParts, groups: int
) -> dict[str, Any]:
    """The first groups of a batch as values that JSON returns unchanged.

    Args:
      step: training step.
      rollouts: the batch.
      parts: of the run.
      groups: how many groups.

    Returns:
      ``step`` and ``groups``. A group is its pair (``uid``, ``query``, ``product``, ``label``,
      ``truth`` by step) and ``rollouts``. A rollout has ``outcome``, its reward; ``grpo``, the
      advantage that GRPO would give each of its tokens; ``well_formed``; ``text``; ``steps``, see
      ``_step``; and of its T sampled tokens the texts, the step (-1 outside every step) and the
      advantage, as ``tokens``, ``token_steps`` and ``token_advantages``.
    """
    on_host = jax.device_get({"batch": rollouts.batch, "steps": rollouts.steps})
    rollouts = replace(rollouts, **on_host)
    size = len(rollouts.texts) // len(rollouts.examples)
    critiques = {} if parts.prm is None else _critiques(rollouts, parts.schema, parts.prm, groups)
    grpo = parts.grpo(rollouts.outcome)
    return {
        "step": step,
        "groups": [
            {
                "uid": example.uid,
                "query": example.query,
                "product": dict(example.product),
                "label": example.label,
                "truth": dict(example.steps or {}),
                "rollouts": [
                    _rollout(row, rollouts, parts, float(grpo[row]), critiques)
                    for row in range(n * size, (n + 1) * size)
                ],
            }
            for n, example in enumerate(rollouts.examples[:groups])
        ],
    }


def _rollout(
    row: int,
    rollouts: RolloutBatch,
    parts: PageParts,
    grpo: float,
    critiques: Mapping[tuple[int, int], str],
) -> dict[str, Any]:
    batch, chain = rollouts.batch, rollouts.chains[row]
    sampled = batch.positions[row] >= 0
    sampled[: batch.prompt_length] = False
    ids, steps, advantages = (
        values[row][sampled].tolist()
        for values in (batch.tokens, rollouts.steps.step_ids, batch.advantages)
    )
    return {
        "outcome": float(rollouts.outcome[row]),
        "grpo": grpo,
        "well_formed": chain.well_formed,
        "text": rollouts.texts[row],
        "steps": [
            _step(row, k, name, rollouts) | {"critique": critiques.get((row, k), "")}
            for k, name in enumerate(parts.schema.names)
        ],
        "tokens": parts.pieces(ids),
        "token_steps": steps,
        "token_advantages": advantages,
    }


def _step(row: int, k: int, name: str, rollouts: RolloutBatch) -> dict[str, Any]:
    """A step: ``written``, ``text``, ``verdict``, ``reward`` and ``advantage`` (None if unknown).

    ``sources`` has the score of each that knows the step, the verifier and the process reward
    model, whichever of them became its reward.
    """
    parsed, known, steps = (
        rollouts.chains[row].steps[k],
        bool(rollouts.known[row, k]),
        rollouts.steps,
    )
    sources = {}
    for source, score, knows in (
        (VERIFIER, steps.verifier, steps.verifier_known),
        (MODEL, steps.model_score, steps.model_known),
    ):
        if steps.step_mask[row, k] and knows[row, k]:
            sources[source] = float(score[row, k])
    return {
        "name": name,
        "written": parsed is not None,
        "text": parsed.text if parsed else "",
        "verdict": parsed.verdict if parsed else None,
        "reward": float(rollouts.rewards[row, k]) if known else None,
        "sources": sources,
        "advantage": float(rollouts.advantages[row, k]) if known or parsed else None,
    }


def _critiques(
    rollouts: RolloutBatch, schema: CotSchema, prm: ProcessRewardModel, groups: int
) -> dict[tuple[int, int], str]:
    """The PRM's score and critique of each step as text, by (row, step index)."""
    size = len(rollouts.texts) // len(rollouts.examples)
    examples = [example for example in rollouts.examples[:groups] for _ in range(size)]
    indices, queries = chain_step_queries(rollouts.chains[: size * groups], examples, schema)
    scores, known = rollouts.steps.model_score, rollouts.steps.model_known
    return {
        index: f"{f'{scores[index]:.2f}' if known[index] else 'unknown'} {text}"
        for index, text in zip(indices, prm.critiques(queries), strict=True)
    }
