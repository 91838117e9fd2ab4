"""What people are asked and what they say: a pair with a policy's chain, and opinions on its steps.

``pairs.jsonl`` of an annotation's folder has a line for each task. An opinion is one line as well,
of what the page saves and of ``imported.jsonl``::

    {"uid": "q7 / 42", "step": "category", "annotator": "ann", "at": "2026-12-01T09:30:00.000Z",
     "value": "near", "correct": false}
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from she_jax.annotation.quotas import Cell
from she_jax.cot import ARROW, LABEL_STEP, CotSchema, Step, fold
from she_jax.types import Example

CORRECT, INCORRECT = "correct", "incorrect"  # what is said of a step of free text


@dataclass(frozen=True, kw_only=True)
class ChainStep:
    """A step of the chain that is shown: empty where the policy wrote none."""

    name: str
    text: str = ""
    verdict: str | None = None

    @property
    def line(self) -> str:
        """The step as a line of a chain."""
        parts = [self.text, *([ARROW, self.verdict] if self.verdict is not None else [])]
        return f"{self.name}: {' '.join(part for part in parts if part)}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A pair to annotate.

    Attributes:
      example: the pair, with what is known of it.
      chain: the steps to look at, in the schema's order: all but optional ones that the policy left
        out.
      confidence: of the policy's label, in [0, 1]; None if nothing says it.
      probabilities: of the labels; None likewise.
      cell: what it was chosen for.
    """

    example: Example
    chain: tuple[ChainStep, ...]
    confidence: float | None = None
    probabilities: Mapping[str, float] | None = None
    cell: Cell = ("", "", "")

    @property
    def uid(self) -> str:
        """The pair's name."""
        return self.example.uid

    def step(self, name: str) -> ChainStep:
        """The step of the chain, empty if there is none."""
        return next((step for step in self.chain if step.name == name), ChainStep(name=name))


def make_task(example: Example, line: Mapping[str, Any], schema: CotSchema, cell: Cell) -> Task:
    """The task for a pair and its line of ``predictions.jsonl``."""
    written = {step["name"]: ChainStep(**step) for step in line["steps"]}
    if line["label"] is not None and LABEL_STEP in schema.names:
        text = written[LABEL_STEP].text if LABEL_STEP in written else ""
        written[LABEL_STEP] = ChainStep(name=LABEL_STEP, text=text, verdict=str(line["label"]))
    return Task(
        example=example,
        chain=tuple(
            written.get(step.name, ChainStep(name=step.name))
            for step in schema.steps
            if step.name in written or not step.optional
        ),
        confidence=line["confidence"],
        probabilities=line["probabilities"],
        cell=cell,
    )


def task_to_json(task: Task) -> dict[str, Any]:
    """The line of a task."""
    return {
        "pair": asdict(task.example),
        "chain": [asdict(step) for step in task.chain],
        "confidence": task.confidence,
        "probabilities": task.probabilities,
        "cell": list(task.cell),
    }


def task_from_json(values: Mapping[str, Any]) -> Task:
    """Inverts ``task_to_json``."""
    pair = dict(values["pair"])
    pair |= {name: tuple(pair[name]) for name in ("annotations", "raters")}
    return Task(
        example=Example(**pair),
        chain=tuple(ChainStep(**step) for step in values["chain"]),
        confidence=values["confidence"],
        probabilities=values["probabilities"],
        cell=tuple(values["cell"]),
    )


def read_tasks(path: Path) -> dict[str, Task]:
    """The tasks of ``pairs.jsonl`` by uid, in their order."""
    with path.open(encoding="utf-8") as file:
        tasks = [task_from_json(json.loads(line)) for line in file]
    return {task.uid: task for task in tasks}


def json_lines(values: Iterable[Any]) -> str:
    """The text of a JSONL file."""
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """What one annotator says of one step of one pair.

    Attributes:
      uid: of the pair.
      step: its name.
      annotator: who.
      at: when, UTC, ISO 8601 with milliseconds; "" if unknown, which counts as before all others.
      value: the right verdict or label; of free text the right items, with ``;`` between them; ""
        if not said.
      correct: whether the step that was shown is right; None if not said.
      withdrawn: whether the annotator takes back what they said of the step before.
    """

    uid: str
    step: str
    annotator: str
    at: str = ""
    value: str = ""
    correct: bool | None = None
    withdrawn: bool = False

    @property
    def order(self) -> tuple[str, ...]:
        """What opinions are sorted by: first the time."""
        return self.at, self.uid, self.step, self.annotator, self.value, str(self.correct)


def make_opinion(
    task: Task,
    step: Step | None,
    annotator: Any,
    at: Any,
    value: Any = None,
    correct: Any = None,
    withdrawn: bool = False,
) -> Opinion:
    """The opinion that a file states, checked and completed.

    Of a step with verdicts the right value says whether the one shown is right, and the other way
    around where only one value is left.

    Raises:
      ValueError: if there is no such step, nothing is said, or the value is not one of the step's.
    """
    if step is None:
        raise ValueError("no such step in this chain")
    who = " ".join(str(annotator or "").split())
    if not who:
        raise ValueError("no annotator: expected who said it")
    if withdrawn:
        return Opinion(
            uid=task.uid, step=step.name, annotator=who, at=time_text(at), withdrawn=True
        )
    text = " ".join(str("" if value is None else value).split())
    if correct not in (True, False, None):
        raise ValueError(f"correct={correct!r}: expected true, false or null")
    if step.verdicts:
        shown = task.step(step.name).verdict
        if not text and correct is not None:
            left = [v for v in step.verdicts if (v == shown) == correct]
            text = left[0] if len(left) == 1 else ""
        if text:
            text = _verdict(text, step)
            correct = text == shown
    if not text and correct is None:
        raise ValueError("nothing is said of the step")
    return Opinion(
        uid=task.uid, step=step.name, annotator=who, at=time_text(at), value=text, correct=correct
    )


def _verdict(text: str, step: Step) -> str:
    for verdict in step.verdicts:
        if fold(verdict) == fold(text):
            return verdict
    raise ValueError(f"{step.name} {text[:60]!r}: expected one of {', '.join(step.verdicts)}")


def time_text(at: Any) -> str:
    """A time as UTC, ISO 8601 with milliseconds, so that texts sort as times; "" for none.

    Raises:
      ValueError: if it is no time. A time without a zone is taken for UTC.
    """
    if not at:
        return ""
    try:
        time = datetime.fromisoformat(str(at))
    except ValueError:
        raise ValueError(
            f"at={str(at)[:40]!r}: expected a time such as 2026-12-01T09:30Z"
        ) from None
    time = time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
