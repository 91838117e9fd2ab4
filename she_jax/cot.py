"""The chain of thought: its labels and steps, how it is written as text, and how text is parsed.

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
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from she_jax.types import Label

ARROW = "=>"
CATEGORY = ("match", "near", "mismatch")
ATTRIBUTES = ("met", "unstated", "conflict")
UNSTATED = "unstated"  # the verdict of a step of which nothing is known
LABEL_STEP = "label"


@dataclass(frozen=True, kw_only=True)
class LabelSet:
    """The relevance classes of a set of pairs, in the values that its owner uses.

    Attributes:
      values: worst to best: whole numbers, fractions, or words.
      meanings: what each class means, as the prompt says it; empty for values without words.
      good: the values that count as relevant; the upper half if empty.
      implied: verdicts of other steps that follow from a label; for most sets there are none.
      aliases: other ways to write a value, in lower case.

    Raises:
      ValueError: if there are fewer than two values, two are alike, or one cannot be a verdict.
    """

    values: tuple[Label, ...]
    meanings: tuple[str, ...] = ()
    good: tuple[Label, ...] = ()
    implied: Mapping[Label, Mapping[str, str]] = field(default_factory=dict, hash=False)
    aliases: Mapping[str, Label] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        texts, shown = self.texts, ", ".join(self.texts)
        if len({_key(text) for text in texts}) < max(2, len(texts)):
            raise ValueError(f"labels {shown}: expected at least two, all different")
        if bad := [text for text in texts if not _is_verdict(text)]:
            raise ValueError(f"labels {bad}: expected short values without , | {ARROW}")
        if self.meanings and len(self.meanings) != len(texts):
            raise ValueError(f"{len(self.meanings)} meanings for the labels {shown}: give each one")
        if unknown := [str(value) for value in self.good if value not in self.values]:
            raise ValueError(f"good labels {unknown}: expected some of {shown}")
        if not self.good:  # those above the middle
            object.__setattr__(self, "good", self.values[(len(texts) + 1) // 2 :])

    @classmethod
    def parse(cls, text: str, good: str = "") -> "LabelSet":
        """The set that a recipe describes.

        Args:
          text: ``1-4`` (the default set, with its meanings), ``0-3`` or any other range from the
            worst to the best (``5-1``: 1 is the best), ``esci``, ``binary``, values with commas
            between them (``poor,fair,good``; ``0,0.5,1``), or a line ``value: meaning`` for each.
          good: the values that count as relevant, with commas; "" for the upper half.

        Raises:
          ValueError: if the text describes no set.
        """
        text = text.strip()
        bounds = re.fullmatch(r"(\d{1,3})\s*-\s*(\d{1,3})", text)
        if named := {"1-4": FOUR_GRADES, "esci": ESCI_GRADES}.get(text.lower()):
            labels = named
        elif text.lower() == "binary":
            labels = cls(values=(0, 1), meanings=BINARY_MEANINGS)
        elif bounds:
            worst, best = int(bounds[1]), int(bounds[2])
            step = 1 if best > worst else -1
            labels = cls(values=tuple(range(worst, best + step, step)))
        elif ":" in text:
            parts = [line.partition(":") for line in text.splitlines() if line.strip()]
            if bad := [value for value, _, meaning in parts if not meaning.strip()]:
                raise ValueError(f"labels {bad}: expected a line 'value: meaning' for each")
            values = tuple(_value(value) for value, _, _ in parts)
            labels = cls(values=values, meanings=tuple(" ".join(m.split()) for *_, m in parts))
        else:
            labels = cls(values=tuple(_value(part) for part in text.split(",") if part.strip()))
        if not good:
            return labels
        chosen = tuple(labels.read(part) for part in good.split(","))
        return replace(labels, good=tuple(v for v in labels.values if v in chosen))

    @property
    def text(self) -> str:
        """The inverse of ``parse``, without ``good``."""
        for name, labels in (("1-4", FOUR_GRADES), ("esci", ESCI_GRADES)):
            if (self.values, self.implied) == (labels.values, labels.implied):
                return name
        if self.meanings:
            pairs = zip(self.texts, self.meanings, strict=True)
            return "\n".join(f"{value}: {meaning}" for value, meaning in pairs)
        return ",".join(self.texts)

    @property
    def texts(self) -> tuple[str, ...]:
        """The values as a chain writes them."""
        return tuple(map(str, self.values))

    @cached_property
    def _index(self) -> dict[float | str, int]:
        index = {_key(text): k for k, text in enumerate(self.texts)}
        return {_key(alias): index[_key(v)] for alias, v in self.aliases.items()} | index

    def index(self, value: Any) -> int:
        """The class of a value: 0 for the worst.

        Raises:
          ValueError: if the value is not in the set.
        """
        try:
            return self._index[_key(value)]
        except KeyError:
            raise ValueError(
                f"unknown label: {str(value)[:60]!r}, expected {', '.join(self.texts)}"
            ) from None

    def read(self, value: Any) -> Label:
        """The set's value for what a file or a chain says: 2, 2.0, " 2 ", an alias.

        Raises:
          ValueError: if that is not in the set.
        """
        return self.values[self.index(value)]


def _value(text: str) -> Label:
    """A label as it is written: a whole number, a fraction or a word."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if re.fullmatch(r"-?\d+", text, re.ASCII):
        return int(text)
    return float(text) if re.fullmatch(r"-?\d*\.\d+", text, re.ASCII) else text


def _key(value: Any) -> float | str:
    """What equal verdicts share: the number, or the text without case and outer blanks."""
    text = fold(str(value)).rstrip(".")
    return float(text) if re.fullmatch(r"-?\d+(\.\d+)?|-?\.\d+", text, re.ASCII) else text


def fold(text: str) -> str:
    """A name or verdict without case, and with single blanks."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _is_verdict(text: str) -> bool:
    return bool(text) and len(text) <= 40 and not re.search(r"=>|[,|\n]|\.$", text)


FOUR_GRADES = LabelSet(
    values=(1, 2, 3, 4),
    meanings=("irrelevant", "mismatch", "related", "excellent"),
    implied={
        4: {"category": "match", "attributes": "met"},
        3: {"category": "match"},
        2: {"category": "mismatch"},
        1: {"category": "mismatch"},
    },
    aliases={"i": 1, "c": 2, "s": 3, "e": 4},
)
ESCI_GRADES = LabelSet(
    values=("I", "C", "S", "E"),
    meanings=("irrelevant", "complement", "substitute", "exact"),
    implied={letter: FOUR_GRADES.implied[FOUR_GRADES.aliases[letter.lower()]] for letter in "ICSE"},
    aliases={str(value): letter.upper() for letter, value in FOUR_GRADES.aliases.items()},
)
BINARY_MEANINGS = ("not relevant", "relevant")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a schema.

    Attributes:
      name: how its line begins, in any script.
      verdicts: the closed set of its values, empty for a free-text step.
      optional: a chain without it can be well formed.
      meaning: what to write, as the prompt says it.
    """

    name: str
    verdicts: tuple[str, ...] = ()
    optional: bool = False
    meaning: str = ""

    @classmethod
    def parse(cls, line: str) -> "Step":
        """The step that a recipe describes by its line in a chain.

        ``category: asked type / offered type => match|near|mismatch``: the name, with ``?`` behind
        it if the step is optional; what to write; the verdicts. All but the name can be left out.
        """
        head, _, rest = line.partition(":")
        meaning, _, verdicts = rest.rpartition(ARROW) if ARROW in rest else (rest, "", "")
        name = " ".join(unicodedata.normalize("NFC", head).split())
        return cls(
            name=name.removesuffix("?").strip(),
            verdicts=tuple(v for part in verdicts.split("|") if (v := " ".join(part.split()))),
            optional=name.endswith("?"),
            meaning=" ".join(meaning.split()),
        )

    @property
    def line(self) -> str:
        """The inverse of ``parse``."""
        verdicts = f" {ARROW} {'|'.join(self.verdicts)}" if self.verdicts else ""
        return f"{self.name}{'?' * self.optional}: {self.meaning}{verdicts}"


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
      label: a value of the schema's label set, or None if it cannot be read.
      truncated: True if it reached the token limit before its end; not known to the parser.
    """

    steps: tuple[ParsedStep | None, ...]
    line_steps: tuple[int, ...]
    well_formed: bool
    label: Label | None
    truncated: bool = False


_QUERY = Step(
    name="query", meaning="what is asked: product type; required attributes; excluded ones"
)
_PRODUCT = Step(name="product", meaning="what is offered")
_CATEGORY = Step(name="category", verdicts=CATEGORY, meaning="asked type / offered type")
_ATTRIBUTES = Step(
    name="attributes", verdicts=ATTRIBUTES, meaning="each asked attribute / the offered one"
)
_CHECK = "one asked attribute / the offered one"


@dataclass(frozen=True, kw_only=True)
class CotSchema:
    """The steps of a chain, in order, and the labels it may end in.

    Attributes:
      steps: at least one. The step named ``label`` gives the relevance class; a chain without it is
        for outcomes that a user's own reward knows.
      labels: the classes, which are the verdicts of the step ``label``.
      instruction: jinja2 template of the task's description in the prompt; "" for the default (see
        ``she_jax.generate.prompts``).

    Raises:
      ValueError: if two steps share a name, a name or verdict cannot be written as part of a line,
        or the verdicts of ``label`` are not the label set's.
    """

    steps: tuple[Step, ...] = (
        _QUERY,
        _PRODUCT,
        _CATEGORY,
        _ATTRIBUTES,
        Step(name=LABEL_STEP, verdicts=FOUR_GRADES.texts),
    )
    labels: LabelSet = FOUR_GRADES
    instruction: str = ""

    def __post_init__(self):
        if not all(isinstance(step, Step) for step in self.steps):
            raise ValueError(
                "CotSchema takes she_jax.Step records: build it from lines with "
                "CotSchema.build(steps=('plan: how', 'answer: the sum'))"
            )
        names = self.names
        if len({fold(name) for name in names}) < max(1, len(names)):
            raise ValueError(f"step names {names}: expected at least one, each only once")
        if bad := [
            name for name in names if not re.fullmatch(r"[^\W\d_](?:(?!=>)[^\s:/|?])*", name)
        ]:
            raise ValueError(
                f"step names {bad}: expected single words like 'category', without : / | ?"
            )
        for step in self.steps:
            folded = {fold(verdict) for verdict in step.verdicts}
            if len(folded) < len(step.verdicts) or not all(map(_is_verdict, step.verdicts)):
                raise ValueError(
                    f"step {step.name!r}: verdicts {step.verdicts} cannot be told apart"
                )
        if LABEL_STEP in names and self.steps[self.label_index].verdicts != self.labels.texts:
            raise ValueError(f"step 'label': expected the verdicts {self.labels.texts}")

    @classmethod
    def build(
        cls,
        *,
        label_first: bool = False,
        checks: int = 0,
        steps: Sequence[str] = (),
        instruction: str = "",
        labels: str = "1-4",
        good: str = "",
    ) -> "CotSchema":
        """Builds the default schema, with options, or that of a user's own steps.

        If a label implies nothing for other steps, those with verdicts are optional.

        Args:
          label_first: put the label before the reasoning ("post-CoT", TaoSR1, arXiv 2508.12365).
          checks: give each of up to this many requested attributes an optional step of its own
            (``check_1``, ...), before the ``attributes`` step, which summarizes them.
          steps: lines as in ``Step.parse``, in place of the default ones; ``label`` takes its
            verdicts from the label set.
          instruction: as the attribute.
          labels, good: as for ``LabelSet.parse``.

        Raises:
          ValueError: if the options do not fit together.
        """
        if isinstance(steps, str):
            raise ValueError(f"steps={steps!r}: expected several lines, such as steps=({steps!r},)")
        label_set = LabelSet.parse(labels, good)
        label = Step(name=LABEL_STEP, verdicts=label_set.texts)
        if steps:
            if label_first or checks:
                raise ValueError("chain.steps names all steps: leave label_first and checks out")
            parsed = [Step.parse(line) for line in steps]
            named = tuple(label if step.name == LABEL_STEP else step for step in parsed)
            return cls(steps=named, labels=label_set, instruction=instruction)
        category, attributes = (
            replace(step, optional=not label_set.implied) for step in (_CATEGORY, _ATTRIBUTES)
        )
        check_steps = tuple(
            Step(name=f"check_{i + 1}", verdicts=ATTRIBUTES, optional=True, meaning=_CHECK)
            for i in range(checks)
        )
        reasoning = (_QUERY, _PRODUCT, category, *check_steps, attributes)
        return cls(
            steps=(label, *reasoning) if label_first else (*reasoning, label),
            labels=label_set,
            instruction=instruction,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The step names, in order."""
        return tuple(step.name for step in self.steps)

    @property
    def label_index(self) -> int:
        """The index of the step ``label``, -1 if there is none."""
        return self.names.index(LABEL_STEP) if LABEL_STEP in self.names else -1

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ``build`` that give this schema, as JSON values."""
        checks = sum(name.startswith("check_") for name in self.names)
        known = {"label_first": self.label_index == 0, "checks": checks, "steps": []}
        known |= {"labels": self.labels.text, "good": ",".join(map(str, self.labels.good))}
        known |= {"instruction": self.instruction}
        if CotSchema.build(**known) == self:
            return known
        return known | {
            "label_first": False,
            "checks": 0,
            "steps": [step.name if step.name == LABEL_STEP else step.line for step in self.steps],
        }

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
        names = {fold(step.name): k for k, step in enumerate(self.steps)}
        bodies: dict[int, list[str]] = {}
        line_steps: list[int] = []
        current, last, stray = -1, -1, False
        for line in text.split("\n"):
            head, colon, rest = line.partition(":")
            k = names.get(fold(head)) if colon else None
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
        label = steps[self.label_index] if self.label_index >= 0 else None
        return Chain(
            steps=steps,
            line_steps=tuple(line_steps),
            well_formed=complete and not stray,
            label=self.labels.read(label.verdict) if label and label.verdict else None,
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
        written = fold(tail).rstrip(".")
        verdict = next((known for known in step.verdicts if fold(known) == written), None)
        return ParsedStep(
            text=(text if arrow else "" if verdict is not None else body).strip(),
            verdict=verdict,
            valid=verdict is not None,
        )
