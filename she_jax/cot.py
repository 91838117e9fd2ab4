"""The chain of thought: which steps it has, how they are written, how they are read back.

A chain is text, a line a step: ``name: free text => verdict``. A step whose verdict stands alone is
``name: verdict``; a step without a verdict is ``name: free text``::

    query: running shoes; red; not leather
    product: trail shoes; navy; suede
    category: running shoes / trail shoes => near
    attributes: red / navy conflict; not leather / suede met => conflict
    label: 2

The text is free, the verdict is machine-readable. Reading never fails: what cannot be read has a
defined result (a step without a verdict, or no step at all).

Reconstruction: the paper (arXiv 2510.07972) does not publish its steps or its output format in what
could be obtained; the steps follow the label rule of its sister papers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ARROW = "=>"
LABELS = ("1", "2", "3", "4")
CATEGORY = ("match", "near", "mismatch")
ATTRIBUTES = ("met", "unstated", "conflict")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of the schema. ``verdicts`` is its closed set of values, empty for a free step."""

    name: str
    verdicts: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class ParsedStep:
    """A step as a model wrote it. ``verdict`` is None for a free step and for an unreadable one."""

    text: str
    verdict: str | None
    valid: bool


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A parsed chain.

    Attributes:
      steps: one entry a schema step, None where the chain lacks it.
      line_steps: for each line of the text the index of the step it belongs to, -1 outside every
        step.
      well_formed: every required step is there once, in order and readable, and no text stands
        outside the steps.
      label: the class 1 to 4, or None where it cannot be read.
    """

    steps: tuple[ParsedStep | None, ...]
    line_steps: tuple[int, ...]
    well_formed: bool
    label: int | None


@dataclass(frozen=True, kw_only=True)
class CotSchema:
    """The steps of a chain, in order. One of them is ``label``, with the verdicts 1 to 4.

    Raises:
      ValueError: if two steps share a name, a name is not a word, or no step is called ``label``.
    """

    steps: tuple[Step, ...] = (
        Step(name="query"),
        Step(name="product"),
        Step(name="category", verdicts=CATEGORY),
        Step(name="attributes", verdicts=ATTRIBUTES),
        Step(name="label", verdicts=LABELS),
    )

    def __post_init__(self):
        names = self.names
        if len(set(names)) != len(names):
            raise ValueError(f"step names {names}: each name may stand only once")
        if bad := [name for name in names if not re.fullmatch(r"[a-z][a-z0-9_]*", name)]:
            raise ValueError(f"step names {bad}: expected lower-case words like 'category'")
        if "label" not in names or self.steps[names.index("label")].verdicts != LABELS:
            raise ValueError(f"step names {names}: one must be 'label', with verdicts {LABELS}")

    @classmethod
    def build(cls, *, label_first: bool = False, checks: int = 0) -> "CotSchema":
        """The default schema, with its two switches.

        Args:
          label_first: put the label before the reasoning ("post-CoT", TaoSR1 2508.12365).
          checks: give up to this many asked attributes a step of their own (``check_1``, ...),
            before the ``attributes`` step that sums them up.
        """
        *reasoning, label = cls().steps
        own = tuple(
            Step(name=f"check_{i + 1}", verdicts=ATTRIBUTES, optional=True) for i in range(checks)
        )
        reasoning = (*reasoning[:3], *own, *reasoning[3:])
        return cls(steps=(label, *reasoning) if label_first else (*reasoning, label))

    @property
    def names(self) -> tuple[str, ...]:
        """The step names, in order."""
        return tuple(step.name for step in self.steps)

    @property
    def switches(self) -> dict[str, Any]:
        """What ``build`` was given."""
        checks = sum(name.startswith("check_") for name in self.names)
        return {"label_first": self.names[0] == "label", "checks": checks}

    def write(self, texts: Mapping[str, str], verdicts: Mapping[str, str]) -> str:
        """Writes a chain, a line a step, in the schema's order.

        Args:
          texts: free text by step name; may be missing for a step that has a verdict.
          verdicts: verdict by step name.

        Raises:
          ValueError: if a required step is missing, a verdict is outside its set, or a name is
          unknown.
        """
        if unknown := (set(texts) | set(verdicts)) - set(self.names):
            raise ValueError(f"steps {sorted(unknown)} are not in the schema {self.names}")
        lines = []
        for step in self.steps:
            text = " ".join(texts.get(step.name, "").split()).replace(ARROW, "->")
            verdict = verdicts.get(step.name)
            if not text and verdict is None:
                if step.optional:
                    continue
                raise ValueError(f"step {step.name!r} has no text and no verdict")
            if (step.verdicts or verdict is not None) and verdict not in step.verdicts:
                raise ValueError(f"step {step.name!r}: verdict {verdict!r} not in {step.verdicts}")
            parts = [text] if verdict is None else [text, ARROW, verdict] if text else [verdict]
            lines.append(f"{step.name}: {' '.join(parts)}")
        return "\n".join(lines)

    def parse(self, text: str) -> Chain:
        """Reads a chain back from any text; never raises.

        A line that names the next step, or a later one, opens it. A line that names no step
        continues the step before it. A line that names an earlier step or the same one again is
        outside every step, like whatever stands before the first step.
        """
        names = {step.name: k for k, step in enumerate(self.steps)}
        bodies: dict[int, list[str]] = {}
        line_steps: list[int] = []
        current, last, stray = -1, -1, False
        for line in text.split("\n"):
            head, colon, rest = line.partition(":")
            k = names.get(head.strip().lower()) if colon else None
            if k is None:
                rest = line
            else:
                current = k if k > last else -1
                last = max(last, k)
            if current >= 0:
                bodies.setdefault(current, []).append(rest)
            stray |= current < 0 and bool(line.strip())
            line_steps.append(current)
        steps = tuple(
            self._parse_step(step, " ".join(bodies[k])) if k in bodies else None
            for k, step in enumerate(self.steps)
        )
        complete = all(
            step.optional if parsed is None else parsed.valid
            for step, parsed in zip(self.steps, steps, strict=True)
        )
        label = steps[names["label"]]
        return Chain(
            steps=steps,
            line_steps=tuple(line_steps),
            well_formed=complete and not stray,
            label=int(label.verdict) if label is not None and label.verdict else None,
        )

    def path(self, chain: Chain) -> str:
        """A chain's verdicts, such as ``match/unstated/3``, with ``-`` for a missing one."""
        pairs = zip(self.steps, chain.steps, strict=True)
        return "/".join((own and own.verdict) or "-" for step, own in pairs if step.verdicts)

    @staticmethod
    def _parse_step(step: Step, body: str) -> ParsedStep:
        text, arrow, tail = body.rpartition(ARROW)
        if not step.verdicts:
            return ParsedStep(text=body.strip(), verdict=None, valid=bool(body.strip()))
        verdict = tail.strip().rstrip(".").lower()
        known = verdict in step.verdicts
        return ParsedStep(
            text=(text if arrow else "" if known else body).strip(),
            verdict=verdict if known else None,
            valid=known,
        )
