"""The chain of thought: its schema, how a chain is written as text, and how text is parsed.

A chain is text with one line per step, ``name: free text => verdict``. Either part may be absent:
``name: verdict`` has no free text, and ``name: free text`` has no verdict::

    query: running shoes; red; not leather
    product: trail shoes; navy; suede
    category: running shoes / trail shoes => near
    attributes: red / navy conflict; not leather / suede met => conflict
    label: 2

The free text is unconstrained, the verdict is machine-readable. Parsing never fails: unreadable
text has a defined result (a step without a verdict, or no step).

Reconstruction: the parts of the paper (arXiv 2510.07972) that could be obtained do not give its
steps or its output format. The steps here follow the label rule of its sister papers.
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
    """A step of a schema. ``verdicts`` is its closed set of values, empty for a free-text step."""

    name: str
    verdicts: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class ParsedStep:
    """A step parsed from text.

    Attributes:
      text: what stands before ``=>``.
      verdict: None for a free-text step, and for a verdict that cannot be read.
      valid: the verdict is in the step's set, or the free text is not empty.
    """

    text: str
    verdict: str | None
    valid: bool


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A chain parsed from text.

    Attributes:
      steps: one entry per step of the schema, None for a step that the chain lacks.
      line_steps: index of the step that each line of the text belongs to, -1 for a line outside
        every step.
      well_formed: True if every required step is present, every present step is readable, the steps
        are in order without repetition, and no text is outside the steps.
      label: relevance class 1 to 4, or None if it cannot be read.
      truncated: True if it reached the token limit before its end; not known to the parser.
    """

    steps: tuple[ParsedStep | None, ...]
    line_steps: tuple[int, ...]
    well_formed: bool
    label: int | None
    truncated: bool = False


@dataclass(frozen=True, kw_only=True)
class CotSchema:
    """The steps of a chain, in order. One of them is ``label``, with the verdicts 1 to 4.

    Raises:
      ValueError: if two steps share a name, a name is not a lower-case word, or no step is named
        ``label`` with these verdicts.
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
            raise ValueError(f"step names {names}: each name may occur only once")
        if bad := [name for name in names if not re.fullmatch(r"[a-z][a-z0-9_]*", name)]:
            raise ValueError(f"step names {bad}: expected lower-case words like 'category'")
        if "label" not in names or self.steps[names.index("label")].verdicts != LABELS:
            raise ValueError(f"step names {names}: one must be 'label', with verdicts {LABELS}")

    @classmethod
    def build(cls, *, label_first: bool = False, checks: int = 0) -> "CotSchema":
        """Builds the default schema, with two options.

        Args:
          label_first: put the label before the reasoning ("post-CoT", TaoSR1, arXiv 2508.12365).
          checks: give each of up to this many requested attributes an optional step of its own
            (``check_1``, ...), before the ``attributes`` step, which summarizes them.
        """
        *reasoning, label = cls().steps
        check_steps = tuple(
            Step(name=f"check_{i + 1}", verdicts=ATTRIBUTES, optional=True) for i in range(checks)
        )
        reasoning = (*reasoning[:3], *check_steps, *reasoning[3:])
        return cls(steps=(label, *reasoning) if label_first else (*reasoning, label))

    @property
    def names(self) -> tuple[str, ...]:
        """The step names, in order."""
        return tuple(step.name for step in self.steps)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ``build`` that give this schema."""
        checks = sum(name.startswith("check_") for name in self.names)
        return {"label_first": self.names[0] == "label", "checks": checks}

    def write(self, texts: Mapping[str, str], verdicts: Mapping[str, str]) -> str:
        """Writes a chain as text, one line per step, in the schema's order.

        Args:
          texts: free text by step name; optional for a step that has a verdict.
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
        """Parses a chain from any text; never raises.

        A line that names a step later than all steps before it starts that step. A line that names
        no step continues the line before it. The lines before the first step are outside every
        step, and so is a line that names an earlier step or the current one again.
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
        """The verdicts of a chain, such as ``match/unstated/3``, with ``-`` for a missing one."""
        pairs = zip(self.steps, chain.steps, strict=True)
        return "/".join(
            (parsed and parsed.verdict) or "-" for step, parsed in pairs if step.verdicts
        )

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
