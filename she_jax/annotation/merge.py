"""From several annotators' opinions to one annotation of each pair, and how well they agree."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from she_jax.annotation.tasks import Opinion, Task
from she_jax.cot import LABEL_STEP, CotSchema
from she_jax.evaluation.raters import rater_metrics
from she_jax.types import Example

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Consensus:
    """What the annotators of a pair say together.

    Attributes:
      truth: the value that most say, by step; a step on which most values tie is left out.
      correct: whether the step that was shown is right, by step, likewise.
      ties: the steps whose truth was left out.
    """

    truth: Mapping[str, str] = field(default_factory=dict)
    correct: Mapping[str, bool] = field(default_factory=dict)
    ties: tuple[str, ...] = ()


def latest(opinions: Iterable[Opinion]) -> list[Opinion]:
    """The last opinion of each annotator on each step of each pair, sorted; in any order given."""
    newest: dict[tuple[str, str, str], Opinion] = {}
    for opinion in sorted(opinions, key=lambda opinion: opinion.order):
        newest[opinion.uid, opinion.step, opinion.annotator] = opinion
    return sorted(newest.values(), key=lambda opinion: opinion.order)


def by_pair(opinions: Iterable[Opinion]) -> dict[str, list[Opinion]]:
    """The last opinions by uid, without those that were taken back."""
    pairs: dict[str, list[Opinion]] = defaultdict(list)
    for opinion in latest(opinions):
        if not opinion.withdrawn:
            pairs[opinion.uid].append(opinion)
    return dict(pairs)


def consensus(opinions: Sequence[Opinion], schema: CotSchema) -> Consensus:
    """The consensus of a pair's last opinions: most votes, with ties left unknown."""
    truth: dict[str, str] = {}
    correct: dict[str, bool] = {}
    ties = []
    for step in schema.names:
        said = [opinion for opinion in opinions if opinion.step == step]
        values = [opinion.value for opinion in said if opinion.value]
        if (value := _most(values)) is not None:
            truth[step] = value
        elif values:
            ties.append(step)
        if (right := _most([o.correct for o in said if o.correct is not None])) is not None:
            correct[step] = right
    return Consensus(truth=truth, correct=correct, ties=tuple(ties))


def _most(values: Sequence[T]) -> T | None:
    """The commonest value, None where there is none or two are as common."""
    ranked = Counter(values).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def pair_row(example: Example) -> dict[str, Any]:
    """A pair as a row of a table that training reads, without a split."""
    known = {name: (example.steps or {}).get(name) for name in example.annotations}
    row = {
        "uid": example.uid,
        "query": example.query,
        "product": dict(example.product),
        "label": example.label,
        "raters": list(example.raters),
        "kind": example.kind,
        "steps": {name: text for name, text in known.items() if text},
        "rationale": example.rationale,
    }
    return {name: value for name, value in row.items() if value not in (None, "", [], {})}


def annotated_row(
    example: Example, opinions: Sequence[Opinion], schema: CotSchema
) -> dict[str, Any]:
    """The row of an annotated pair: its ``steps``, the label that was given, and who said it.

    What they say comes before what was known. ``annotators`` keeps each last opinion.
    """
    row = pair_row(example)
    truth = dict(consensus(opinions, schema).truth)
    label = truth.pop(LABEL_STEP, None)
    if label is not None:
        row["label"] = schema.labels.read(label)
    row["steps"] = {**row.get("steps", {}), **truth}
    if not row["steps"]:
        del row["steps"]
    names = ("step", "annotator", "at", "value", "correct")
    row["annotators"] = [
        {k: v for k in names if (v := getattr(o, k)) not in ("", None)} for o in opinions
    ]
    return row


def agreement(
    tasks: Mapping[str, Task], opinions: Iterable[Opinion], schema: CotSchema
) -> dict[str, Any]:
    """How well annotators agree on each step, and how often with the chain they were shown.

    Returns:
      Plain values: ``pairs`` annotated, ``opinions``, ``annotators`` (how many pairs each), and
      under ``steps`` by name: ``pairs``, ``twice`` (pairs with two annotators or more), ``ties``,
      ``chain_right`` (share of the last opinions that find the step right), and ``accuracy``,
      ``kappa`` and ``alpha`` between annotators with intervals by query (see
      ``she_jax.evaluation.raters``), over the step's verdicts in their order, or over right and
      wrong of free text; None where nobody annotated a pair twice.
    """
    pairs = by_pair(opinions)
    last = [opinion for said in pairs.values() for opinion in said]
    who = Counter(name for said in pairs.values() for name in {o.annotator for o in said})
    ties = Counter(step for said in pairs.values() for step in consensus(said, schema).ties)
    return {
        "pairs": len(pairs),
        "opinions": len(last),
        "annotators": dict(sorted(who.items())),
        "steps": {
            step.name: _step_agreement(step.name, step.verdicts, pairs, tasks)
            | {"ties": ties[step.name]}
            for step in schema.steps
            if any(opinion.step == step.name for opinion in last)
        },
    }


def _step_agreement(
    name: str,
    verdicts: Sequence[str],
    pairs: Mapping[str, Sequence[Opinion]],
    tasks: Mapping[str, Task],
) -> dict[str, Any]:
    said = {uid: [o for o in opinions if o.step == name] for uid, opinions in pairs.items()}
    said = {uid: opinions for uid, opinions in said.items() if opinions}
    right = [o.correct for opinions in said.values() for o in opinions if o.correct is not None]
    ratings = [
        [verdicts.index(o.value) for o in opinions if o.value]
        if verdicts
        else [int(o.correct) for o in opinions if o.correct is not None]
        for opinions in said.values()
    ]
    twice = sum(len(given) > 1 for given in ratings)
    names = ("accuracy", "kappa", "alpha")
    metrics: dict[str, Any] = dict.fromkeys(names)
    if twice:
        queries = [tasks[uid].example.query for uid in said]
        intervals = rater_metrics(queries, ratings, len(verdicts) or 2)
        metrics = {key: asdict(intervals[key]) for key in names}
    return {
        "pairs": len(said),
        "twice": twice,
        "chain_right": sum(right) / len(right) if right else None,
        **metrics,
    }
