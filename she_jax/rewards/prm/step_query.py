"""The text format of a process reward model (PRM): the step query it reads, the answer it writes.

The PRM reads the policy's prompt and the chain up to and including the step to be scored. It
answers in two lines, a critique and a verdict on that step::

    query: asks for table lamp; not red
    product: offers floor lamp; red
    category: table lamp in lighting / floor lamp in lighting => match
    critique: table lamp / floor lamp: near, not match
    verdict: incorrect

Prompted for the verdict directly, it leaves the critique out. If it also writes a reference chain,
its own solution of the pair, ``write_critique`` builds the critique by comparing the step with that
chain. Parsing an answer never raises. An answer that cannot be parsed is unknown.

Reconstruction: the prompts of the generative stepwise reward model (arXiv 2510.07972) could not be
obtained. The reference chain is the answer that a reference-guided judge writes before it grades
(Zheng et al., arXiv 2306.05685, section 3.4).
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from she_jax.cot import ARROW, LABEL_STEP, Chain, CotSchema, ParsedStep
from she_jax.types import Example

CRITIQUE, VERDICT = "\ncritique:", "\nverdict:"  # end of a step query: what the model writes next
VERDICTS = ("correct", "incorrect")


@dataclass(frozen=True, kw_only=True)
class StepQuery:
    """A step query: one step of a chain to be scored, and its true verdict if known.

    Attributes:
      example: the query-product pair that the chain is about.
      step: name of the step to be scored.
      written: the chain up to and including that step; see ``written_steps``.
      correct: True if the step is right, False if it is wrong, None if unknown.
      critique: the target critique, which precedes the verdict in training.
      source: ``gold``, ``teacher``, ``policy``, ``earlier policy`` or the name of a corruption.
      chain: identifier of the chain, shared by all its steps.
      annotated: True if a human annotated the step, so that the verifier can score it too.
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
    """Returns the chain up to and including step ``index``, one line per step, as the PRM reads it.

    Only text that the parser assigned to a step is shown, on one line per step. Anything else that
    the policy wrote, above all a line ``verdict: correct``, cannot pass for an answer of the PRM.
    """
    lines = []
    for step, parsed in zip(schema.steps[: index + 1], chain.steps, strict=False):
        if parsed is not None:
            ending = [ARROW] * bool(parsed.verdict and parsed.text) + [parsed.verdict or ""]
            lines.append(" ".join([f"{step.name}:", *parsed.text.split(), *ending]).rstrip())
    return "\n".join(lines)


def write_critique(step: str, truth: Mapping[str, str], written: ParsedStep) -> str:
    """Returns the target critique of a step: the truth, and where the step differs from it.

    - For a step with a verdict: the evidence if known, the true verdict, and the written verdict if
      it differs: ``table lamp / floor lamp: near, not match``.
    - For a free-text step: the true items, the wrong ones and the missing ones:
      ``table lamp; not red, not red, lacks not red`` for ``table lamp; red``.

    Args:
      step: name of the step.
      truth: the true value of each known step by name, or the value in a reference chain. The label
        is included, as text. See ``she_jax.types.Example.steps``.
      written: the step as parsed from the chain.
    """
    if written.verdict is None:
        return _compare_items(_items(truth.get(step, "")), _items(written.text))
    parts = true_evidence(step, truth), truth.get(step, "not asked")
    critique = ": ".join(filter(None, parts))
    return critique if written.verdict == truth.get(step) else f"{critique}, not {written.verdict}"


def true_evidence(step: str, truth: Mapping[str, str]) -> str:
    """Returns the known evidence for the true verdict of a step: ``table lamp / floor lamp``.

    Args:
      step: name of a step that has a verdict.
      truth: as in ``write_critique``.
    """
    query, product = (_items(truth.get(name, "")) for name in ("query", "product"))
    if query and product and step == "category":
        return f"{query[0]} / {product[0]}"
    if query and product and step == "attributes":
        return f"{'; '.join(query[1:]) or 'nothing'} / {'; '.join(product[1:]) or 'nothing'}"
    if step == LABEL_STEP:
        return ", ".join(truth[name] for name in ("category", "attributes") if name in truth)
    return ""


def _compare_items(expected: list[str], written: list[str]) -> str:
    """Returns the expected items, then the written items not among them, then the missing ones."""
    if expected and written and re.search(rf"(^|\W){re.escape(expected[0])}$", written[0]):
        written = [expected[0], *written[1:]]  # the first item may have words before it
    wrong = list((Counter(written) - Counter(expected)).elements())
    missing = list((Counter(expected) - Counter(written)).elements())
    critique = "; ".join(expected) or "nothing"
    critique += f", not {'; '.join(wrong)}" if wrong else ""
    return critique + (f", lacks {'; '.join(missing)}" if missing else "")


def write_answer(critique: str, correct: bool) -> str:
    """Returns the answer to a step query that ends in ``CRITIQUE``."""
    return f" {' '.join(critique.split())}{VERDICT} {VERDICTS[not correct]}"


def read_answer(text: str) -> tuple[str, bool] | None:
    """Parses an answer in the format of ``write_answer`` from any text; never raises.

    Returns:
      The critique and whether the step is correct. None unless the text is one line of critique
      followed by one of the two verdicts.
    """
    critique, mark, verdict = text.partition(VERDICT)
    if not mark or "\n" in critique or verdict.strip() not in VERDICTS:
        return None
    return critique.strip(), verdict.strip() == VERDICTS[0]


def _items(text: str) -> list[str]:
    return [item for part in text.lower().split(";") if (item := " ".join(part.split()))]
