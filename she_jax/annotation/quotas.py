"""Which pairs are worth annotating: quotas over cells, and in each cell the most doubtful pairs.

A cell is where a pair stands in three tiers: its product's category, the kind of its query, and the
step that decided. Pure functions; the same input gives the same choice.

Source: SHARP (arXiv 2505.14147), which has no formulas. The tiers, the quotas and what counts as
doubt are Reconstruction.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from she_jax.cot import LABEL_STEP, CotSchema
from she_jax.types import Example

Cell: TypeAlias = tuple[str, str, str]  # category, kind of query, deciding step

EVEN_SHARE = 0.25  # of the pairs, which every cell has alike
SMOOTHING = 4.0  # pairs with the mean error that each cell's own pairs are joined by
CATEGORY_FIELDS = ("department", "category", "product class", "product type")
MOST_CATEGORIES = 12  # cells of the commonest categories; the others share one
OTHER = "other"


def deciding_step(verdicts: Mapping[str, str | None], schema: CotSchema) -> str:
    """The first step before the label whose verdict is not the first, best one of its set.

    Args:
      verdicts: by step name, as a chain has them.
      schema: the steps.

    Returns:
      Its name; "" if all verdicts are the best, or none can be read.
    """
    for step in schema.steps:
        verdict = verdicts.get(step.name)
        if step.verdicts and step.name != LABEL_STEP and verdict not in (None, step.verdicts[0]):
            return step.name
    return ""


def categories(examples: Sequence[Example]) -> list[str]:
    """The category of each pair's product, "" where no field says it.

    The first part of the first field of ``CATEGORY_FIELDS`` that any of the products has: "Lamps"
    for "Lamps > Floor lamps". Rare ones become ``OTHER``.
    """
    products = [{_plain(k): text for k, text in e.product.items()} for e in examples]
    field = next((f for f in CATEGORY_FIELDS if any(f in product for product in products)), "")
    heads = [product.get(field, "").partition(">")[0] for product in products]
    names = [head.partition(" / ")[0].strip() for head in heads]
    # Of equally common ones the first in the alphabet, whatever the order of the pairs.
    common = sorted(Counter(names).items(), key=lambda item: (-item[1], item[0]))
    kept = {name for name, _ in common[:MOST_CATEGORIES]} | {""}
    return [name if name in kept else OTHER for name in names]


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").strip()


def doubt(line: Mapping[str, Any]) -> tuple[float, float]:
    """How doubtful a policy's label is, to sort by: 1 - confidence, then the votes' entropy.

    Args:
      line: of ``predictions.jsonl``. Without votes all readable chains are alike, at 0; where no
        label could be read, the most votes stand for its confidence.
    """
    shares = list((line["probabilities"] or {}).values())
    confidence = line["confidence"]
    if confidence is None:
        confidence = max(shares, default=0.0) if line["label"] is None else 1.0
    return 1 - confidence, entropy(shares)


def entropy(shares: Sequence[float]) -> float:
    """The entropy of a distribution, in nats: how evenly cells are covered, or votes divided."""
    return max(0.0, -math.fsum(share * math.log(share) for share in shares if share > 0))


def quotas(errors: Float[np.ndarray, "C"], n: int) -> Float[np.ndarray, "C"]:
    """SHARP's quotas: n (0.25 / C + 0.75 e_c / sum(e)), which sum to n.

    Args:
      errors: e_c, the share of errors in each cell, >= 0, measured on pairs that are not judged by
        later; all zero for even quotas.
      n: how many pairs to choose.
    """
    errors = np.asarray(errors, float)
    total, cells = errors.sum(), len(errors)
    shares = errors / total if total > 0 else np.full(cells, 1 / max(cells, 1))
    return n * (EVEN_SHARE / max(cells, 1) + (1 - EVEN_SHARE) * shares)


def apportion(
    wanted: Float[np.ndarray, "C"], available: Int[np.ndarray, "C"], n: int
) -> Int[np.ndarray, "C"]:
    """Whole numbers near the wanted ones: at most what each cell has, n in all if there are.

    What a full cell cannot take goes to the others in proportion to what they want; the last pairs
    go to the largest remainders, of equal ones to the first cell.
    """
    wanted, available = np.asarray(wanted, float), np.asarray(available, int)
    n = min(n, int(available.sum()))
    full = np.zeros(len(wanted), bool)
    while True:
        rest = n - available[full].sum()
        open_sum = wanted[~full].sum()
        scaled = np.where(full, available, wanted * (rest / open_sum if open_sum > 0 else 0))
        over = ~full & (scaled > available)
        if not over.any():
            break
        full |= over
    counts = np.floor(scaled + 1e-9).astype(int)
    remainders = np.where(counts < available, scaled - counts, -1)
    counts[np.argsort(-remainders, kind="stable")[: n - counts.sum()]] += 1
    return counts


def cell_errors(cells: Sequence[Cell], wrong: Sequence[float]) -> dict[Cell, float]:
    """The share of errors in each cell, drawn toward the mean where there are few pairs.

    Args:
      cells: of the pairs that were measured.
      wrong: 1 for a pair with an error, 0 without, or the probability of one.
    """
    mean = float(np.mean(wrong)) if len(wrong) else 0.0
    counts, sums = Counter(cells), Counter[Cell]()
    for cell, value in zip(cells, wrong, strict=True):
        sums[cell] += value  # type: ignore[assignment]  # a Counter of floats
    return {c: (sums[c] + SMOOTHING * mean) / (counts[c] + SMOOTHING) for c in sorted(counts)}


def choose(
    cells: Sequence[Cell],
    doubts: Sequence[tuple[float, float]],
    errors: Mapping[Cell, float],
    n: int,
) -> list[int]:
    """The indices of the pairs to annotate, in an order whose every beginning covers the cells.

    Args:
      cells: of each candidate.
      doubts: of each candidate, see ``doubt``; in a cell the most doubtful come first, of equally
        doubtful ones the first.
      errors: share of errors by cell; a cell that it lacks has the mean.
      n: how many, or all if there are fewer candidates.
    """
    names = sorted(set(cells))
    if not names:
        return []
    mean = float(np.mean(list(errors.values()))) if errors else 0.0
    known = np.array([errors.get(name, mean) for name in names])
    members = {name: [k for k, cell in enumerate(cells) if cell == name] for name in names}
    available = np.array([len(members[name]) for name in names])
    counts = apportion(quotas(known, n), available, n)
    ranked: list[tuple[float, int, int]] = []
    for place, (name, count) in enumerate(zip(names, counts.tolist(), strict=True)):
        order = sorted(members[name], key=lambda k: (-doubts[k][0], -doubts[k][1], k))
        ranked += [((r + 0.5) / count, place, k) for r, k in enumerate(order[:count])]
    return [index for *_, index in sorted(ranked)]
