"""Chains for the cold start of sets that have a class and nobody's reasoning (ESCI, WANDS, JSONL).

A chain is written from the gold class and the product's own fields: it names nothing that neither
the query nor a field contains, and its verdicts agree with the class.

Reconstruction: the paper (arXiv 2510.07972) does not say, in what could be obtained, how its first
chains were written; templates with several phrasings stand in.
"""

import re
import unicodedata
from collections.abc import Mapping

import numpy as np

from she_jax.cot import CotSchema
from she_jax.types import Example

_IMPLIED = {
    4: {"category": "match", "attributes": "met"},
    3: {"category": "match"},
    2: {"category": "mismatch"},
    1: {"category": "mismatch"},
}
_GROUPS = 4  # groups of query words that are compared one by one
_STOP = re.compile(
    "an?|and|as|at|by|for|from|in|is|of|on|or|that|the|to|what|which|with|"
    "con|del?|e|el|en|las?|los|o|para|por|una?|y"
)
_NEGATION = re.compile("not?|non|without|except|sin|excepto")
# Scripts written without spaces between words: kana, Han, and Thai to Khmer.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_UNSPACED_NEGATION = re.compile("な[しい]|無し|不要|以外")
_EDGES = " ,;:.!?/|-–—()[]{}\"'、。・【】「」『』（）"


def implied_steps(label: int) -> dict[str, str]:
    """The step verdicts that an ESCI or WANDS class implies, and no more.

    The category is a match for 4 (E, Exact) and 3 (S, Partial) and a mismatch for 2 (C) and 1 (I,
    Irrelevant); the attributes are met for 4. What a class leaves open is absent.
    """
    return dict(_IMPLIED[label])


def write_chain(example: Example, schema: CotSchema, rng: np.random.Generator) -> str:
    """A chain of thought for a judged pair, in one of several phrasings.

    A ``rationale`` that the schema reads as well formed is taken as it is. Otherwise the steps
    ``query``, ``product``, ``category``, ``attributes`` and ``label`` are written, the first two as
    they are annotated, if they are; any other step of the schema is copied from ``example.steps``,
    and an optional one that is not there is left out.

    Args:
      example: the pair, with its label; a verdict in ``example.steps`` is never contradicted.
      schema: names the steps.
      rng: picks the phrasings; the same state gives the same chain.

    Raises:
      ValueError: if the pair has no label, or a required step cannot be written.
    """
    if example.rationale and schema.parse(example.rationale).well_formed:
        return example.rationale
    if example.label is None:
        raise ValueError(f"{example.uid!r} has no label: a chain is written from the gold label")
    verdicts = {**_verdicts(example.label, example.steps or {}), "label": str(example.label)}
    query, product = _query_text(example, rng), _product_text(example, rng)
    texts = {
        "query": query,
        "product": product,
        "category": _category_text(example, rng),
        "attributes": _attributes_text(example, verdicts, rng),
    }
    known = example.steps or {}
    for name in ("query", "product"):
        if name in example.annotations and known.get(name):
            texts[name] = known[name]
    for step in schema.steps:
        if known.get(step.name) and step.name not in {*texts, *verdicts}:
            (verdicts if step.verdicts else texts)[step.name] = known[step.name]
    return schema.write(
        {name: text for name, text in texts.items() if name in schema.names},
        {name: verdict for name, verdict in verdicts.items() if name in schema.names},
    )


def _verdicts(label: int, known: Mapping[str, str]) -> dict[str, str]:
    """The label rule read backwards: 1 category, 2 conflict, 3 unstated or near, 4 all met.

    Reconstruction: a class 2 whose category is known to be a mismatch (ESCI's C) has its attributes
    ``unstated``, as does a class 1: nobody compares the attributes of another kind of thing.
    """
    category, attributes = known.get("category"), known.get("attributes")
    if category is None:
        near = label == 3 and attributes == "met"
        category = "near" if near else "mismatch" if label == 1 else "match"
    if attributes is None:
        attributes = "met" if label == 4 else "unstated"
        attributes = "conflict" if label == 2 and category != "mismatch" else attributes
    return {"category": category, "attributes": attributes}


def _query_text(example: Example, rng: np.random.Generator) -> str:
    whole = _head(example.query, 10, 60)
    listed = "; ".join(_groups(example.query)[:6]) or whole
    return _pick(rng, whole, listed, f"asks for {whole}", f"wanted: {listed}")


def _product_text(example: Example, rng: np.random.Generator) -> str:
    head = _head(example.product["title"], 8, 48)
    brand = _head(example.product.get("brand", ""), 3, 24)
    colour = _head(example.product.get("colour", example.product.get("color", "")), 2, 16)
    brand, colour = ("" if v.casefold() in head.casefold() else v for v in (brand, colour))
    if rng.integers(2):
        return "; ".join(filter(None, [head, brand, colour]))
    parts = [head, brand and f"brand {brand}", colour and f"colour {colour}"]
    return _pick(rng, "", "offers ", "this is ") + "; ".join(filter(None, parts))


def _category_text(example: Example, rng: np.random.Generator) -> str:
    asked, offered = _head(example.query, 5, 30), _head(example.product["title"], 5, 30)
    return _pick(
        rng,
        f"{asked} / {offered}",
        f"asked {asked}, offered {offered}",
        f"{asked} against {offered}",
    )


def _attributes_text(
    example: Example, verdicts: Mapping[str, str], rng: np.random.Generator
) -> str:
    """Sets what the query asks beside where the product says it."""
    if verdicts["category"] == "mismatch":
        return _pick(rng, "another kind of thing", "nothing to compare", "not compared")
    attributes = verdicts["attributes"]
    found, absent = [], []
    for group in _groups(example.query):
        for part, place in _compare(group, example.product):
            (found if place else absent).append((part, place))
    # Only what the product says is shown as met, only what it does not say as lacking.
    shown = found[:_GROUPS] if attributes == "met" else absent[:2] + found[:2]
    lacking = "unstated" if attributes == "unstated" else "not offered"
    if not shown or (attributes != "met" and not absent):
        if attributes == "met":
            return _pick(rng, "nothing is lacking", "nothing speaks against it", "all as asked")
        if attributes == "conflict":
            return _pick(rng, "the words agree, the offer does not", "one demand is contradicted")
        return _pick(rng, "the words agree, not every demand", "not every demand is settled")
    form = int(rng.integers(3))
    said = ("{} / {} met", "{} in the {} met", "{} ({}) met")[form]
    silent = ("{} / {}", "{} {}", "{} ({})")[form]
    return "; ".join(
        said.format(part, place) if place else silent.format(part, lacking) for part, place in shown
    )


def _groups(query: str) -> list[str]:
    """The words of a query that ask for something, a negation together with what it negates."""
    groups, negation = [], ""
    for word in (raw.strip(_EDGES) for raw in query.split()):
        if _NEGATION.fullmatch(word.casefold()):
            negation = f"{word} "
        elif word and not _STOP.fullmatch(word.casefold()):
            groups.append(negation + _head(word, 1, 20))
            negation = ""
    return list(dict.fromkeys(groups))


def _compare(group: str, product: Mapping[str, str]) -> list[tuple[str, str]]:
    """Parts of a group, each with the name of the first field that says it, or "".

    Words are looked up whole. Text of a script without spaces is taken apart into the longest
    pieces, of two characters or more, that a field contains; not where it negates, as its parts
    mean another thing than the whole.
    """
    if not _UNSPACED.search(group):
        return [(group, next((name for name, v in product.items() if _says(v, group)), ""))]
    if _UNSPACED_NEGATION.search(group):
        folded = group.casefold()
        return [(group, next((k for k, v in product.items() if folded in v.casefold()), ""))]
    parts, rest, at = [], "", 0
    while at < len(group):
        name, end = _longest(group, at, product)
        if name and rest:
            parts.append((rest, ""))
        rest = "" if name else rest + group[at]
        parts += [(group[at:end], name)] if name else []
        at = end if name else at + 1
    return [*parts, (rest, "")] if rest else parts


def _longest(group: str, at: int, product: Mapping[str, str]) -> tuple[str, int]:
    """The field that contains the longest piece of a group from ``at`` on, and the piece's end."""
    for end in range(len(group), at + 1, -1):  # two characters or more
        piece = group[at:end].casefold()
        for name, value in product.items():
            if piece in value.casefold():
                return name, end
    return "", at


def _says(text: str, group: str) -> bool:
    """Whether a text says all words of a group in a row; plurals and accents make no difference."""
    wanted = [_singular(word) for word in _fold(group).split()]
    words = [_singular(word.strip(_EDGES)) for word in _fold(text).split()]
    n = len(wanted)
    return any(words[i : i + n] == wanted for i in range(len(words) - n + 1))


def _fold(text: str) -> str:
    if not text.isascii():
        text = "".join(
            c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c)
        )
    return text.casefold()


def _singular(word: str) -> str:
    return word.removesuffix("s").removesuffix("'").removesuffix("’") if len(word) > 2 else word


def _head(text: str, words: int, chars: int) -> str:
    """The first words of a text, and no more than ``chars`` characters."""
    head = " ".join(text.split()[:words])
    if len(head) > chars:
        cut = head[: chars + 1]
        spaced = cut.rpartition(" ")[0]
        head = spaced if len(spaced) > chars // 2 else cut[:chars]
    return head.strip(_EDGES) or head


def _pick(rng: np.random.Generator, *phrasings: str) -> str:
    return phrasings[int(rng.integers(len(phrasings)))]
