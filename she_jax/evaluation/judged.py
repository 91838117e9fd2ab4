"""Labeled pairs with a judge's answers: numbers in arrays, texts read when they are asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from she_jax.cot import LabelSet
from she_jax.data.languages import language_of
from she_jax.evaluation.confidence import log_votes, tempered
from she_jax.evaluation.decide import UNREAD
from she_jax.evaluation.lazy import Lazy
from she_jax.types import Example

LENGTHS = {"product text up to 100 characters": 100, "up to 300": 300, "longer": np.inf}


@dataclass(frozen=True)
class JudgedPairs:
    """N labeled pairs with a judge's answers, as class indices worst to best.

    Attributes:
      examples: the pairs, each with a label.
      lines: their lines of ``predictions.jsonl``.
      labels: the label set.
      places: of each among the pairs that it was chosen from; ascending, shape [N].
      queries: of each pair; length N, equal ones share their text, as in the next ones.
      ratings: the class indices that the raters of each pair gave.
      slices: by title (``kind``, ``language``, ``length``) the group of each pair.
      gold: human labels; shape [N].
      predicted: the judge's, or ``UNREAD``; shape [N].
      confidence: of each line, NaN where there is none; shape [N].
      probabilities: as voted, NaN where there are none; None if no pair has any. Shape [N, K].
      confident: the same after the temperature.
    """

    examples: Sequence[Example]
    lines: Sequence[Mapping[str, Any]]
    labels: LabelSet
    places: Int[np.ndarray, "N"]
    queries: Sequence[str]
    ratings: Sequence[tuple[int, ...]]
    slices: Mapping[str, Sequence[str]]
    gold: Int[np.ndarray, "N"]
    predicted: Int[np.ndarray, "N"]
    confidence: Float[np.ndarray, "N"]
    probabilities: Float[np.ndarray, "N K"] | None
    confident: Float[np.ndarray, "N K"] | None

    @property
    def expected(self) -> Float[np.ndarray, "N"]:
        """What ranks the products: the expected grade, else the label, see ``farthest``."""
        places = self.farthest.astype(float)
        if self.confident is None:
            return places
        grades = self.confident @ np.arange(len(self.labels.values))
        return np.where(np.isnan(self.confident).any(1), places, grades)

    @property
    def farthest(self) -> Int[np.ndarray, "N"]:
        """The judge's labels; where none could be read, the class farthest from the human one."""
        last = len(self.labels.values) - 1
        return np.where(
            self.predicted == UNREAD, np.where(self.gold * 2 > last, 0, last), self.predicted
        )

    def subset(self, rows: Bool[np.ndarray, "N"]) -> "JudgedPairs":
        """Some of the pairs, by a boolean for each."""
        kept = np.flatnonzero(rows)
        return replace(
            self,
            examples=Lazy(kept, self.examples.__getitem__),
            lines=Lazy(kept, self.lines.__getitem__),
            places=self.places[kept],
            queries=[self.queries[n] for n in kept.tolist()],
            ratings=[self.ratings[n] for n in kept.tolist()],
            slices={k: [groups[n] for n in kept.tolist()] for k, groups in self.slices.items()},
            gold=self.gold[kept],
            predicted=self.predicted[kept],
            confidence=self.confidence[kept],
            probabilities=None if self.probabilities is None else self.probabilities[kept],
            confident=None if self.confident is None else self.confident[kept],
        )


def judged_pairs(
    examples: Sequence[Example],
    lines: Sequence[Mapping[str, Any]],
    labels: LabelSet,
    *,
    samples: int,
    temperature: float | None,
) -> JudgedPairs:
    """The labeled ones of some pairs, with their answers.

    Args:
      examples: the pairs; all are read once here.
      lines: their lines of ``predictions.jsonl``; the same.
      labels: the label set.
      samples: k, chains that were sampled; 0 if the probabilities are the label's own.
      temperature: that was fitted; None for none.
    """
    size, kept = len(examples), np.zeros(len(examples), bool)
    gold, predicted = np.zeros(size, int), np.full(size, UNREAD)
    confidence = np.full(size, np.nan)
    probabilities = np.full((size, len(labels.values)), np.nan)
    votes = np.full((size, 1), samples)  # that could be read
    queries: list[str] = []
    ratings: list[tuple[int, ...]] = []
    slices: dict[str, list[str]] = {"kind": [], "language": [], "length": []}
    shared: dict[Any, Any] = {}
    for n, (example, line) in enumerate(zip(examples, lines, strict=True)):
        if example.label is None:
            continue
        kept[n], gold[n] = True, labels.index(example.label)
        queries.append(shared.setdefault(example.query, example.query))
        given = tuple(map(labels.index, example.raters))
        ratings.append(shared.setdefault(given, given))
        for title, group in _groups(example).items():
            slices[title].append(shared.setdefault(group, group))
        if line["label"] is not None:
            predicted[n] = labels.index(line["label"])
        if line["confidence"] is not None:
            confidence[n] = line["confidence"]
        if line["probabilities"]:
            probabilities[n] = list(line["probabilities"].values())
        if line.get("votes") is not None:  # not in files from before it was written
            votes[n] = line["votes"]
    rows = np.flatnonzero(kept)
    known = None if np.isnan(probabilities[rows]).all() else probabilities[rows]
    confident = known
    if known is not None and temperature is not None:
        with np.errstate(divide="ignore"):
            logits = log_votes(np.round(known * votes[rows])) if samples else np.log(known)
        confident = tempered(logits, temperature)
    return JudgedPairs(
        examples=Lazy(rows, examples.__getitem__),
        lines=Lazy(rows, lines.__getitem__),
        labels=labels,
        places=rows,
        queries=queries,
        ratings=ratings,
        slices=slices,
        gold=gold[rows],
        predicted=predicted[rows],
        confidence=confidence[rows],
        probabilities=known,
        confident=confident,
    )


def _groups(example: Example) -> dict[str, str]:
    """The groups that a pair is counted in, by title."""
    language = language_of(example.query, example.product).name
    size = sum(map(len, example.product.values()))
    return {
        "kind": example.kind or "unknown",
        "language": "too few known words" if language == "unknown" else language,
        "length": next(name for name, most in LENGTHS.items() if size <= most),
    }
