"""What a policy says of pairs: its chains, one label for each pair, and how sure that is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from she_jax.cot import LabelSet
from she_jax.evaluation.confidence import log_votes, tempered
from she_jax.evaluation.decide import UNREAD, Decision, count_votes, vote_shares
from she_jax.generate.generator import Generator, Sample
from she_jax.types import Example, Label

LabelLogits = Callable[[Any, Sequence[Example]], Float[np.ndarray, "N K"]]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a policy has written of N pairs, before it becomes labels.

    Attributes:
      greedy: the greedy completion of each pair; None if there are none.
      samples: k completions of each pair, sampled at temperature 1; None with k = 0.
      logits: log-probabilities of the labels before the chain, of a policy that gives its label
        first; else None. Shape [N, K].
    """

    greedy: Sequence[Sample] | None = None
    samples: Sequence[Sequence[Sample]] | None = None
    logits: Float[np.ndarray, "N K"] | None = None

    def votes(self, labels: LabelSet) -> Int[np.ndarray, "N K"] | None:
        """The votes of the samples for each class."""
        if self.samples is None:
            return None
        indices = [[_index(labels, sample) for sample in group] for group in self.samples]
        return count_votes(np.array(indices, int).reshape(len(indices), -1), len(labels.values))

    def shares(self, labels: LabelSet) -> Float[np.ndarray, "N K"] | None:
        """Class probabilities: vote shares, else those of the label itself, else None."""
        if (votes := self.votes(labels)) is not None:
            return vote_shares(votes)
        return None if self.logits is None else np.exp(self.logits)

    def log_probabilities(self, labels: LabelSet) -> Float[np.ndarray, "N K"] | None:
        """What a temperature acts on; None where there are no class probabilities."""
        if (votes := self.votes(labels)) is not None:
            return log_votes(votes)
        return self.logits

    def greedy_labels(self, labels: LabelSet) -> Int[np.ndarray, "N"] | None:
        """The class of each greedy chain; without chains the likeliest label, if known."""
        if self.greedy is not None:
            return np.array([_index(labels, sample) for sample in self.greedy], int)
        return None if self.logits is None else self.logits.argmax(1)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was fitted on validation pairs, for one policy and one number of samples.

    Attributes:
      decision: the rule.
      temperature: of the class probabilities; None if there are none, or none to fit it on.
      review_below: the confidence from which on 95% of the validation labels were right, 2 if
        there is none; None without class probabilities.
      about: what it was fitted on, and how well each rule did there; plain values.
    """

    decision: Decision = field(default_factory=Decision)
    temperature: float | None = None
    review_below: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """What a policy says of a pair.

    Attributes:
      label: a value of the label set, None if none could be read.
      answer: the chain that speaks for the label; None if only the label was asked for.
      probabilities: of the labels, worst to best, as voted; None if nothing says them.
      confidence: of the label, after the temperature, in [0, 1].
      expected: mean of the label set's values (of their places, 0 to K - 1, if they are words)
        under the probabilities after the temperature.
      review: whether a human should look at it.
      votes: sampled chains whose label could be read; None without.
    """

    label: Label | None
    answer: Sample | None
    probabilities: tuple[float, ...] | None = None
    confidence: float | None = None
    expected: float | None = None
    review: bool | None = None
    votes: int | None = None


def gather(
    generator: Generator,
    params: Any,
    examples: Sequence[Example],
    *,
    greedy: bool,
    samples: int,
    seed: int,
    label_logits: LabelLogits | None,
    show: Callable[[int], None],
) -> Evidence:
    """What a policy writes of some pairs.

    Args:
      generator: of the policy.
      params: its parameters.
      examples: the pairs.
      greedy: whether to write greedy chains.
      samples: k, chains of each pair to sample.
      seed: of these.
      label_logits: of a policy that gives its label first; None of others.
      show: called with the number of pairs that are done.
    """
    parts = greedy + bool(samples)

    def part(n: int) -> Callable[[int], None]:
        return lambda done: show((n * len(examples) + done) // max(parts, 1))

    return Evidence(
        greedy=generator.greedy_samples(params, examples, part(0)) if greedy else None,
        samples=generator.sample(params, examples, samples, seed, part(greedy))
        if samples
        else None,
        logits=label_logits(params, examples) if label_logits else None,
    )


def judge(evidence: Evidence, calibration: Calibration, labels: LabelSet) -> list[Judgment]:
    """One label for each pair, with the chain that speaks for it, and how sure it is."""
    shares, votes = evidence.shares(labels), evidence.votes(labels)
    chosen = calibration.decision.labels(evidence.greedy_labels(labels), shares)
    logits = evidence.log_probabilities(labels)
    honest = shares
    if logits is not None and calibration.temperature is not None:
        honest = tempered(logits, calibration.temperature)
    grades = _grades(labels)
    judgments = []
    for n, index in enumerate(chosen.tolist()):
        known: dict[str, Any] = {} if votes is None else {"votes": int(votes[n].sum())}
        if shares is not None and honest is not None and not np.isnan(shares[n]).any():
            known["probabilities"] = tuple(shares[n].tolist())
            known["expected"] = float(honest[n] @ grades)
            if index != UNREAD:
                known["confidence"] = float(honest[n, index])
        if calibration.review_below is not None:
            known["review"] = known.get("confidence", 0.0) < calibration.review_below
        label = None if index == UNREAD else labels.values[index]
        judgments.append(Judgment(label=label, answer=_answer(evidence, n, index, labels), **known))
    return judgments


def _answer(evidence: Evidence, n: int, index: int, labels: LabelSet) -> Sample | None:
    """The greedy chain if it gives the label, else the first sampled one that does, else any."""
    written = [evidence.greedy[n]] if evidence.greedy is not None else []
    written += evidence.samples[n] if evidence.samples is not None else []
    speaking = [sample for sample in written if _index(labels, sample) == index]
    return next(iter([*speaking, *written]), None)


def _index(labels: LabelSet, sample: Sample) -> int:
    label = sample.chain.label
    return UNREAD if label is None else labels.index(label)


def _grades(labels: LabelSet) -> Float[np.ndarray, "K"]:
    """The values of the labels; their places if they are words."""
    numbers = [value for value in labels.values if isinstance(value, int | float)]
    return np.array(numbers if len(numbers) == len(labels.values) else range(len(labels.values)))
