"""Training data of a process reward model: labeled step queries, corrupted ones among them.

The label of a step is the offline verifier's reward, so only annotated steps are included. A step
is correct if its reward is 1. Sources:

- ``gold``: a correct step of the rationale that the cold start imitates (a teacher's chain, or one
  written from the gold class). ``teacher``: an incorrect one.
- A gold step corrupted on purpose: ``verdict`` (another verdict, also inside the step's text, so
  that the step stays consistent), ``attribute`` (an added false item), ``product`` (a product item
  replaced by another product's), ``reason`` (correct verdict, text about another pair),
  ``evidence`` (text about another pair with the verdict that it supports). Two pairs are compared
  by their texts and annotation, and by their rationales where the annotation is silent.
- ``policy``: a step sampled from the policy.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from she_jax.cot import ARROW, LABEL_STEP, Chain, CotSchema, ParsedStep
from she_jax.data.rationales import write_chain
from she_jax.rewards.prm.step_query import StepQuery, true_evidence, write_critique, written_steps
from she_jax.rewards.verifier import FULL_REWARD, verify
from she_jax.training.files import write_text
from she_jax.types import Example, UserError

POLICY = "policy"
CORRUPTIONS = ("verdict", "attribute", "product", "reason", "evidence")


@dataclass(frozen=True, kw_only=True)
class PrmConfig:
    """What a process reward model is trained and measured on.

    Attributes:
      pairs: training pairs that give steps of their rationale, correct and corrupted.
      policy_pairs: training pairs for which the policies write steps.
      rollouts: chains that each policy writes a pair.
      eval_pairs: pairs of each other split to measure on.
      answer_length: tokens of an answer, the end included.
      room: tokens of the answers to one chain in a training row.
      batch_size: steps or pairs at a time outside training.
      votes: critiques a step to measure with, too; 0: verdicts read directly only.

    Raises:
      UserError: if a number is out of its range.
    """

    pairs: int
    policy_pairs: int
    rollouts: int
    eval_pairs: int
    answer_length: int
    room: int
    batch_size: int
    votes: int

    def __post_init__(self):
        for name in ("pairs", "rollouts", "eval_pairs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"prm.{name}={getattr(self, name)}: expected at least 1")
        if self.room < 2 * self.answer_length:
            raise UserError(
                f"prm.room={self.room}: expected at least {2 * self.answer_length}, for two "
                f"answers of answer_length={self.answer_length}"
            )
        if self.votes < 0:
            raise UserError(f"prm.votes={self.votes}: expected 0 (no critiques) or more")


def with_correct_rationale(
    example: Example, schema: CotSchema, evidence: Mapping[str, str]
) -> Example | None:
    """Returns the example with a rationale that is correct in every step.

    Free-text steps repeat the annotation. Optional steps are included if annotated.

    Args:
      example: the query-product pair.
      schema: the steps.
      evidence: the text of a correct step before its verdict, by step name. For other steps the
        text is derived from the annotation, see ``true_evidence``.

    Returns:
      None if the annotation lacks a required step.
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
        if step.name != LABEL_STEP:
            texts[step.name] = evidence.get(step.name) or true_evidence(step.name, truth)
    return dataclasses.replace(example, rationale=schema.write(texts, verdicts))


def correct_evidence(step_queries: Iterable[StepQuery]) -> dict[str, dict[str, str]]:
    """Returns the text of correct steps before their verdicts, by pair and step name.

    The last one wins if there are several. Corrupted steps are never correct, so none is included.
    """
    evidence: dict[str, dict[str, str]] = {}
    for step_query in step_queries:
        line = step_query.written.rpartition("\n")[2].removeprefix(f"{step_query.step}: ")
        text, arrow, _ = line.rpartition(f" {ARROW} ")
        if step_query.correct and arrow:
            evidence.setdefault(step_query.example.uid, {})[step_query.step] = text
    return evidence


def label_steps(
    chain: Chain, example: Example, schema: CotSchema, source: str, name: str
) -> list[StepQuery]:
    """Returns a labeled step query for each annotated step of a chain, unreadable ones excluded.

    Args:
      chain: as parsed by ``schema``.
      example: the query-product pair that it is about.
      schema: the steps.
      source: who wrote the chain.
      name: identifier of the chain.
    """
    truth = _known_truth(example)
    rewards, known = verify(chain, example, schema)
    return [
        StepQuery(
            example=example,
            step=step.name,
            written=written_steps(chain, schema, k),
            correct=bool(rewards[k] >= FULL_REWARD),
            critique=write_critique(step.name, truth, parsed),
            source=source,
            chain=name,
        )
        for k, (step, parsed) in enumerate(zip(schema.steps, chain.steps, strict=True))
        if known[k] and parsed is not None and parsed.valid
    ]


def rationale_step_queries(
    example: Example, other: Example, schema: CotSchema, rng: np.random.Generator
) -> Iterator[StepQuery]:
    """Yields the step queries of a rationale, each correct one also in a corrupted version.

    Args:
      example: a labeled pair.
      other: another labeled pair, from which wrong text is borrowed.
      schema: the steps.
      rng: consumed.
    """
    chain, other_chain = (schema.parse(write_chain(pair, schema, rng)) for pair in (example, other))
    facts = _facts(example, chain, schema), _facts(other, other_chain, schema)
    for step_query in label_steps(chain, example, schema, "gold", f"{example.uid}/demonstration"):
        if not step_query.correct:
            yield dataclasses.replace(step_query, source="teacher")
            continue
        yield step_query
        k = schema.names.index(step_query.step)
        verdicts = schema.steps[k].verdicts
        step, other_step = chain.steps[k], other_chain.steps[k]
        attempts = {
            way: _corrupt(way, step, other_step, verdicts, facts, rng) for way in CORRUPTIONS
        }
        options = [(way, wrong) for way, wrong in attempts.items() if wrong is not None]
        if options:
            way, wrong = options[rng.integers(len(options))]
            corrupted = dataclasses.replace(
                chain, steps=(*chain.steps[:k], wrong, *chain.steps[k + 1 :])
            )
            yield dataclasses.replace(
                step_query,
                written=written_steps(corrupted, schema, k),
                critique=write_critique(step_query.step, _known_truth(example), wrong),
                correct=False,
                source=way,
            )


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What is known of a pair.

    Attributes:
      steps: values by step name: annotated ones and the label; for a free-text step without
        annotation, what the chain says.
      words: all words of the query, the product and these values.
    """

    steps: Mapping[str, str]
    words: Set[str]


def _facts(example: Example, chain: Chain, schema: CotSchema) -> _Facts:
    """Collects what is known of a pair for which the chain was written."""
    steps = {
        step.name: parsed.text
        for step, parsed in zip(schema.steps, chain.steps, strict=True)
        if parsed is not None and not step.verdicts
    }
    steps |= _known_truth(example)
    texts = [example.query, *example.product.values(), *steps.values()]
    return _Facts(steps=steps, words=_words(" ".join(texts)))


def _corrupt(
    way: str,
    step: ParsedStep | None,
    other_step: ParsedStep | None,
    verdicts: Sequence[str],
    facts: tuple[_Facts, _Facts],
    rng: np.random.Generator,
) -> ParsedStep | None:
    """Returns the step made wrong in a given way, or None if it might still be correct.

    Args:
      way: one of ``CORRUPTIONS``.
      step: the correct step.
      other_step: the same step of another pair's chain.
      verdicts: the verdicts that the step may have, empty for a free-text step.
      facts: of the pair, and of the other pair.
      rng: consumed.
    """
    if step is None:
        return None
    if way == "verdict":
        wrong = [verdict for verdict in verdicts if verdict != step.verdict]
        if not wrong or step.verdict is None:
            return None
        verdict = _choose(rng, wrong)
        text = re.sub(rf"\b{re.escape(step.verdict)}\b", verdict, step.text)
        return dataclasses.replace(step, text=text, verdict=verdict)
    if other_step is None or not step.text:
        return None
    if way == "attribute" and not verdicts:
        item = _foreign_item(other_step.text, facts[0].words)
        return dataclasses.replace(step, text=f"{step.text}; {item}") if item else None
    if way == "product":
        text = _swap_product_item(step.text, *facts, rng)
        return dataclasses.replace(step, text=text) if text else None
    if way == "reason" and verdicts and _foreign_item(other_step.text, *(f.words for f in facts)):
        return dataclasses.replace(step, text=other_step.text)
    if way == "evidence" and other_step.verdict not in (step.verdict, None) and other_step.text:
        return other_step
    return None


def _foreign_item(text: str, known: Set[str], other: Set[str] | None = None) -> str:
    """Returns the last item of a text with a word that the pair lacks, "" if there is none.

    Args:
      text: items separated by semicolons.
      known: the words of the pair.
      other: the words of the other pair, which the text is about. If given, the foreign word must
        be among them: a phrase such as "nothing is lacking" could be about any pair.
    """
    for item in reversed(text.split(";")):
        words = _words(item) - known
        if words and (other is None or words & other):
            return item.strip()
    return ""


def _swap_product_item(text: str, pair: _Facts, other: _Facts, rng: np.random.Generator) -> str:
    """Returns the text with one product item replaced by another product's, "" if impossible."""
    old_items, new_items = (facts.steps.get("product", "").split(";") for facts in (pair, other))
    query_words = _words(pair.steps.get("query", ""))
    items = list(zip(map(str.strip, old_items), map(str.strip, new_items), strict=False))
    for n in rng.permutation(len(items)):
        old, new = items[n]
        # An item that the query asks for too may refer to the query: replacing it proves nothing.
        match = re.search(rf"\b{re.escape(old)}\b(?!.*\b{re.escape(old)}\b)", text)
        if old and match and not _words(old) <= query_words and _words(new) - pair.words:
            return text[: match.start()] + new + text[match.end() :]
    return ""


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _known_truth(example: Example) -> dict[str, str]:
    steps = example.steps or {}
    truth = {name: steps[name] for name in example.annotations if name in steps}
    return truth | ({} if example.label is None else {LABEL_STEP: str(example.label)})


class BalancedSampler:
    """Samples chains with one step query per step, from a balanced mixture of sources.

    Half of the samples are policy chains, if present. Their steps are correct as often as the
    policy writes them correctly, so that scores of policy steps are calibrated. The other half are
    all other chains. Each step of a rationale gives one step query, correct or corrupted. The
    samples are thus uniform over the steps, and those of rationales also over the PRM's verdicts
    and the kinds of corruption.

    Raises:
      UserError: if there is no step query.
    """

    def __init__(self, step_queries: Sequence[StepQuery]):
        chains: dict[str, dict[str, list[StepQuery]]] = {}
        for step_query in step_queries:
            chains.setdefault(step_query.chain, {}).setdefault(step_query.step, []).append(
                step_query
            )
        if not chains:
            raise UserError("no step to examine: the pairs have neither labels nor annotated steps")
        by_origin: dict[bool, list[list[list[StepQuery]]]] = {True: [], False: []}
        for steps in chains.values():
            by_step = list(steps.values())
            by_origin[by_step[0][0].source == POLICY].append(by_step)
        self._pools = [pool for pool in by_origin.values() if pool]

    def draw(self, count: int, rng: np.random.Generator) -> list[list[StepQuery]]:
        """Samples the step queries of ``count`` chains, with replacement."""
        samples = []
        for _ in range(count):
            chain = _choose(rng, _choose(rng, self._pools))
            samples.append([_choose(rng, step) for step in chain])
        return samples


def _choose(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


def step_query_file(workdir: Path, split: str) -> Path:
    """Where the run of a process reward model keeps the step queries of a split."""
    return workdir / "step_queries" / f"{split}.jsonl"


def write_step_queries(path: Path, step_queries: Iterable[StepQuery]) -> None:
    """Writes step queries as JSON lines, for people and for ``read_step_queries``."""
    lines = []
    for query in step_queries:
        pair = {"uid": query.example.uid, "query": query.example.query}
        rest = {name: value for name, value in vars(query).items() if name != "example"}
        record = pair | {"product": dict(query.example.product)} | rest
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def read_step_queries(path: Path) -> list[StepQuery]:
    """Reads step queries; their examples have ``uid``, query and product."""
    step_queries = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            pair = {name: record.pop(name) for name in ("uid", "query", "product")}
            step_queries.append(StepQuery(example=Example(**pair), **record))
    return step_queries
