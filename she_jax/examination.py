"""The examination of a step in words: what an examiner reads, what it answers, how that is read.

An examiner sees the policy's prompt and the chain down to the step under examination, which stands
last. It answers in two lines, a critique and a verdict on the step::

    query: asks for table lamp; not red
    product: offers floor lamp; red
    category: table lamp in lighting / floor lamp in lighting => match
    critique: table lamp / floor lamp: near
    verdict: incorrect

Asked for the verdict directly it leaves the critique out. Reading an answer never fails: what
cannot be read is unknown.

Reconstruction: the prompts of the generative stepwise reward model (arXiv 2510.07972) could not be
obtained.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from she_jax.cot import ARROW, Chain, CotSchema
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
    """

    example: Example
    step: str
    written: str
    correct: bool | None = None
    critique: str = ""
    source: str = ""
    chain: str = ""


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


def write_critique(step: str, truth: Mapping[str, str]) -> str:
    """What is true of a step, behind the evidence for it as far as that is known.

    The same whether the step under examination is right or wrong: an examiner first works out the
    truth, then compares.

    Args:
      step: name of the step.
      truth: the known truth by step name, the label as a digit among it; see
        ``she_jax.types.Example.steps``.
    """
    asked, offered = (_items(truth.get(name, "")) for name in ("query", "product"))
    evidence = ""
    if asked and offered and step == "category":
        evidence = f"{asked[0]} / {offered[0]}"
    elif asked and offered and step == "attributes":
        evidence = f"{'; '.join(asked[1:]) or 'nothing'} / {'; '.join(offered[1:]) or 'nothing'}"
    elif step == "label":
        evidence = ", ".join(truth[name] for name in ("category", "attributes") if name in truth)
    return ": ".join(filter(None, [evidence, truth.get(step, "not asked")]))


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
    return [item for part in text.split(";") if (item := part.strip())]
