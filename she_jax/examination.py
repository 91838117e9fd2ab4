"""The examination of a step in words: what an examiner reads, what it answers, how that is read.

An examiner sees the policy's prompt and the chain down to the step under examination, which stands
last. It answers in two lines, a critique and a verdict on the step::

    query: asks for table lamp; not red
    product: offers floor lamp; red
    category: table lamp in lighting / floor lamp in lighting => match
    critique: table lamp / floor lamp: near, not match
    verdict: incorrect

Asked for the verdict directly it leaves the critique out. Where it has a chain of its own, the
critique need not be its words either: ``write_critique`` compares the step with that chain. Reading
an answer never fails: what cannot be read is unknown.

Reconstruction: the prompts of the generative stepwise reward model (arXiv 2510.07972) could not be
obtained. The own chain is the answer that a reference-guided judge writes before it grades (Zheng
et al., arXiv 2306.05685, section 3.4).
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from she_jax.cot import ARROW, Chain, CotSchema, ParsedStep
from she_jax.types import Example

CRITIQUE, VERDICT = "\ncritique:", "\nverdict:"  # how a question ends, and what it asks for
VERDICTS = ("correct", "incorrect")


@dataclass(frozen=True, kw_only=True)
class Examination:
    """A step to be examined, and the truth about it where somebody knows it.

    Attributes:
      example: the pair that the chain is about.
      step: name of the step under examination.
      written: the chain down to that step; see ``written_steps``.
      correct: the true verdict, None where nobody knows it.
      critique: what an examiner should say before the verdict.
      source: who wrote the step, see ``she_jax.data.examinations``.
      chain: names the chain; all its steps share it.
      annotated: a human said what is true of the step, so the verifier speaks of it too.
    """

    example: Example
    step: str
    written: str
    correct: bool | None = None
    critique: str = ""
    source: str = ""
    chain: str = ""
    annotated: bool = True


def written_steps(chain: Chain, schema: CotSchema, index: int) -> str:
    """The chain down to a step, a line a step, as the examiner sees it.

    Only what the parser took for a step is shown, on one line each: whatever else the policy wrote,
    a line ``verdict: correct`` of its own above all, cannot pass for the examiner's.
    """
    lines = []
    for step, parsed in zip(schema.steps[: index + 1], chain.steps, strict=False):
        if parsed is not None:
            tail = [ARROW] * bool(parsed.verdict and parsed.text) + [parsed.verdict or ""]
            lines.append(" ".join([f"{step.name}:", *parsed.text.split(), *tail]).rstrip())
    return "\n".join(lines)


def write_critique(step: str, truth: Mapping[str, str], written: ParsedStep) -> str:
    """What an examiner should say of a step: the truth, and where the step departs from it.

    - Of a step with a verdict, the evidence as far as it is known, the true verdict, and what was
      written if that is another: ``table lamp / floor lamp: near, not match``.
    - Of a free step, the true items, the wrong ones and the missing ones:
      ``table lamp; not red, not red, lacks not red`` for ``table lamp; red``.

    Args:
      step: name of the step.
      truth: the truth by step name as far as it is known, or what an own chain takes for it; the
        label as a digit among it. See ``she_jax.types.Example.steps``.
      written: the step as the chain has it.
    """
    if written.verdict is None:
        return _compared(_items(truth.get(step, "")), _items(written.text))
    said = ": ".join(filter(None, [true_evidence(step, truth), truth.get(step, "not asked")]))
    return said if written.verdict == truth.get(step) else f"{said}, not {written.verdict}"


def true_evidence(step: str, truth: Mapping[str, str]) -> str:
    """What the true verdict of a step rests on, as far as it is known: ``table lamp / floor lamp``.

    Args:
      step: name of a step that has a verdict.
      truth: as ``write_critique`` has it.
    """
    asked, offered = (_items(truth.get(name, "")) for name in ("query", "product"))
    if asked and offered and step == "category":
        return f"{asked[0]} / {offered[0]}"
    if asked and offered and step == "attributes":
        return f"{'; '.join(asked[1:]) or 'nothing'} / {'; '.join(offered[1:]) or 'nothing'}"
    if step == "label":
        return ", ".join(truth[name] for name in ("category", "attributes") if name in truth)
    return ""


def _compared(wanted: list[str], given: list[str]) -> str:
    """The true items, then those of the written ones that are not among them, and the missing."""
    if wanted and given and re.search(rf"(^|\W){re.escape(wanted[0])}$", given[0]):
        given = [wanted[0], *given[1:]]  # the first may have words before it
    wrong = list((Counter(given) - Counter(wanted)).elements())
    missing = list((Counter(wanted) - Counter(given)).elements())
    said = "; ".join(wanted) or "nothing"
    said += f", not {'; '.join(wrong)}" if wrong else ""
    return said + (f", lacks {'; '.join(missing)}" if missing else "")


def write_answer(critique: str, correct: bool) -> str:
    """The answer to a question that ends in ``CRITIQUE``."""
    return f" {' '.join(critique.split())}{VERDICT} {VERDICTS[not correct]}"


def read_answer(text: str) -> tuple[str, bool] | None:
    """Reads such an answer back from any text; never raises.

    Returns:
      The critique and whether the step is correct, or None for anything but one line of critique
      and one of the two verdicts behind it.
    """
    critique, mark, verdict = text.partition(VERDICT)
    if not mark or "\n" in critique or verdict.strip() not in VERDICTS:
        return None
    return critique.strip(), verdict.strip() == VERDICTS[0]


def _items(text: str) -> list[str]:
    return [item for part in text.lower().split(";") if (item := " ".join(part.split()))]
