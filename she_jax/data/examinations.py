"""What an examiner learns from: steps of chains, right, spoilt and a policy's own, with the truth.

A step's truth is the offline verifier's word, so only steps that humans annotated are here; correct
is a step with full marks. Sources:

- ``gold``: a right step of the demonstration that the cold start imitates (a teacher's chain, or
  one written from the gold class); ``teacher``: a wrong one.
- a gold step spoilt on purpose: ``verdict`` (another one, wherever the step says it, so that it
  does not contradict itself), ``attribute`` (an invented item), ``product`` (what it says of the
  product is another product's), ``reason`` (the verdict is right, the text is about another pair),
  ``evidence`` (that text, and the verdict that goes with it). What the pair is and the other one is
  not is read in the two, in their annotation, and where that is silent in the demonstrations.
- ``policy``: as the policy wrote it.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from she_jax.cot import ARROW, Chain, CotSchema, ParsedStep
from she_jax.data.chains import write_chain
from she_jax.examination import Examination, true_evidence, write_critique, written_steps
from she_jax.rl.rewards import verify
from she_jax.types import Example

POLICY = "policy"
SPOILT = ("verdict", "attribute", "product", "reason", "evidence")
FULL_MARKS = 1 - 1e-6


def with_all_truth(example: Example) -> Example:
    """The example with every step whose truth is known taken for annotated: the truth as judge."""
    return dataclasses.replace(example, annotations=tuple(example.steps or ()))


def put_right(example: Example, schema: CotSchema, evidence: Mapping[str, str]) -> Example | None:
    """The example with a chain that is right in every step as the rationale.

    Free steps say what the annotation says. Optional steps are there where the annotation has them.

    Args:
      example: the pair.
      schema: the steps.
      evidence: what a right step said before its verdict, by step name; for others the chain says
        what the annotation knows of it, see ``true_evidence``.

    Returns:
      None where the annotation lacks a step that a chain must have.
    """
    truth = _known_truth(example)
    if not {step.name for step in schema.steps if not step.optional} <= truth.keys():
        return None
    texts, verdicts = {}, {}
    for step in schema.steps:
        if step.name not in truth:
            continue
        if not step.verdicts:
            texts[step.name] = truth[step.name]
            continue
        verdicts[step.name] = truth[step.name]
        if step.name != "label":
            texts[step.name] = evidence.get(step.name) or true_evidence(step.name, truth)
    return dataclasses.replace(example, rationale=schema.write(texts, verdicts))


def right_evidence(examinations: Iterable[Examination]) -> dict[str, dict[str, str]]:
    """What right steps say before their verdicts, by pair and step; of several the last one.

    Of steps as somebody wrote them: who spoils one makes no right ones.
    """
    found: dict[str, dict[str, str]] = {}
    for one in examinations:
        line = one.written.rpartition("\n")[2].removeprefix(f"{one.step}: ")
        text, arrow, _ = line.rpartition(f" {ARROW} ")
        if one.correct and arrow:
            found.setdefault(one.example.uid, {})[one.step] = text
    return found


def judged(
    chain: Chain, example: Example, schema: CotSchema, source: str, name: str
) -> list[Examination]:
    """The steps of a chain that the annotation judges; unreadable ones are left out.

    Args:
      chain: as parsed by ``schema``.
      example: the pair it is about.
      schema: the steps.
      source: who wrote it.
      name: of the chain.
    """
    truth = _known_truth(example)
    rewards, known = verify(chain, example, schema)
    return [
        Examination(
            example=example,
            step=step.name,
            written=written_steps(chain, schema, k),
            correct=bool(rewards[k] >= FULL_MARKS),
            critique=write_critique(step.name, truth, parsed),
            source=source,
            chain=name,
        )
        for k, (step, parsed) in enumerate(zip(schema.steps, chain.steps, strict=True))
        if known[k] and parsed is not None and parsed.valid
    ]


def demonstrated(
    example: Example, other: Example, schema: CotSchema, rng: np.random.Generator
) -> Iterator[Examination]:
    """Examinations from a demonstration: its steps, and each right one spoilt in one way.

    Args:
      example: a pair with a label.
      other: another one, with a label too, from which wrong words are borrowed.
      schema: the steps.
      rng: consumed.
    """
    chain, foreign = (schema.parse(write_chain(pair, schema, rng)) for pair in (example, other))
    facts = _facts(example, chain, schema), _facts(other, foreign, schema)
    for right in judged(chain, example, schema, "gold", f"{example.uid}/demonstration"):
        if not right.correct:
            yield dataclasses.replace(right, source="teacher")
            continue
        yield right
        k = schema.names.index(right.step)
        verdicts = schema.steps[k].verdicts
        own, theirs = chain.steps[k], foreign.steps[k]
        ways = {way: _spoil(way, own, theirs, verdicts, facts, rng) for way in SPOILT}
        options = [(way, step) for way, step in ways.items() if step is not None]
        if options:
            way, step = options[rng.integers(len(options))]
            spoilt = dataclasses.replace(
                chain, steps=(*chain.steps[:k], step, *chain.steps[k + 1 :])
            )
            yield dataclasses.replace(
                right,
                written=written_steps(spoilt, schema, k),
                critique=write_critique(right.step, _known_truth(example), step),
                correct=False,
                source=way,
            )


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What is known of a pair, by step, and all its words."""

    steps: Mapping[str, str]
    words: Set[str]


def _facts(example: Example, chain: Chain, schema: CotSchema) -> _Facts:
    """The annotation, and of free steps without any, such as the product, what the chain says."""
    written = zip(schema.steps, chain.steps, strict=True)
    steps = {step.name: own.text for step, own in written if own is not None and not step.verdicts}
    steps |= _known_truth(example)
    texts = [example.query, *example.product.values(), *steps.values()]
    return _Facts(steps=steps, words=_split(" ".join(texts)))


def _spoil(
    way: str,
    own: ParsedStep | None,
    theirs: ParsedStep | None,
    verdicts: Sequence[str],
    facts: tuple[_Facts, _Facts],
    rng: np.random.Generator,
) -> ParsedStep | None:
    """A step gone wrong in a given way, or None where it cannot, or would not surely, be wrong.

    Args:
      way: one of ``SPOILT``.
      own: the step.
      theirs: the same of another pair's chain.
      verdicts: those that it may have.
      facts: what is known of the pair, and of the other.
      rng: consumed.
    """
    if own is None:
        return None
    if way == "verdict":
        wrong = [verdict for verdict in verdicts if verdict != own.verdict]
        if not wrong or own.verdict is None:
            return None
        verdict = _pick(rng, wrong)
        text = re.sub(rf"\b{re.escape(own.verdict)}\b", verdict, own.text)
        return dataclasses.replace(own, text=text, verdict=verdict)
    if theirs is None or not own.text:
        return None
    if way == "attribute" and not verdicts:
        item = _foreign_item(theirs.text, facts[0].words)
        return dataclasses.replace(own, text=f"{own.text}; {item}") if item else None
    if way == "product":
        text = _other_product(own.text, *facts, rng)
        return dataclasses.replace(own, text=text) if text else None
    if way == "reason" and verdicts and _foreign_item(theirs.text, *(one.words for one in facts)):
        return dataclasses.replace(own, text=theirs.text)
    if way == "evidence" and theirs.verdict not in (own.verdict, None) and theirs.text:
        return theirs
    return None


def _foreign_item(text: str, known: Set[str], other: Set[str] | None = None) -> str:
    """The last item of a text that says a word that the pair does not; "" where there is none.

    Args:
      text: items with semicolons between them.
      known: the words of the pair.
      other: the words of the pair that the text is about, where it may be about any pair: phrases
        such as "nothing is lacking" are, and words that the pair does not say do not count then.
    """
    for item in reversed(text.split(";")):
        words = _split(item) - known
        if words and (other is None or words & other):
            return item.strip()
    return ""


def _other_product(text: str, pair: _Facts, other: _Facts, rng: np.random.Generator) -> str:
    """The text with an item of the product exchanged for another product's."""
    own, theirs = (one.steps.get("product", "").split(";") for one in (pair, other))
    asked = _split(pair.steps.get("query", ""))
    items = list(zip(map(str.strip, own), map(str.strip, theirs), strict=False))
    for n in rng.permutation(len(items)):
        mine, foreign = items[n]
        # What is asked as well may stand for what is asked: exchanging it proves nothing.
        where = re.search(rf"\b{re.escape(mine)}\b(?!.*\b{re.escape(mine)}\b)", text)
        if mine and where and not _split(mine) <= asked and _split(foreign) - pair.words:
            return text[: where.start()] + foreign + text[where.end() :]
    return ""


def _split(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _known_truth(example: Example) -> dict[str, str]:
    steps = example.steps or {}
    truth = {name: steps[name] for name in example.annotations if name in steps}
    return truth | ({} if example.label is None else {"label": str(example.label)})


class Balanced:
    """Draws chains, with an examination of each of their steps.

    Half of the draws are chains of the policy's own, where there are any: with right and wrong
    steps as often as the policy writes them, so that a score means what it says on these. The rest
    are all other chains; of each step of a demonstration one examination, right or spoilt. So the
    draws are even over the steps, and those of demonstrations over the verdicts, and over the ways
    to spoil a step.

    Raises:
      ValueError: if there is nothing to draw from.
    """

    def __init__(self, examinations: Sequence[Examination]):
        chains: dict[str, dict[str, list[Examination]]] = {}
        for one in examinations:
            chains.setdefault(one.chain, {}).setdefault(one.step, []).append(one)
        if not chains:
            raise ValueError(
                "no step to examine: the pairs have neither labels nor annotated steps"
            )
        kinds: dict[bool, list[list[list[Examination]]]] = {True: [], False: []}
        for steps in chains.values():
            by_step = list(steps.values())
            kinds[by_step[0][0].source == POLICY].append(by_step)
        self._kinds = [kind for kind in kinds.values() if kind]

    def draw(self, count: int, rng: np.random.Generator) -> list[list[Examination]]:
        """The examinations of so many chains, with repetition."""
        drawn = []
        for _ in range(count):
            chain = _pick(rng, _pick(rng, self._kinds))
            drawn.append([_pick(rng, step) for step in chain])
        return drawn


def _pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]
