"""Chains for the cold start on data sets with labels but without rationales (ESCI, WANDS, JSONL).

A chain is written from the gold label and the product's fields. It names nothing that neither the
query nor a field contains, and its verdicts agree with the label.

Reconstruction: the parts of the paper (arXiv 2510.07972) that could be obtained do not say how its
first chains were written. Templates with several phrasings take their place.
"""

import re
import unicodedata
from collections.abc import Mapping

import numpy as np

from she_jax.cot import DEFAULT_LABELS, LABEL_STEP, UNSTATED, CotSchema
from she_jax.types import Example, Label

_MAX_TERMS = 4  # query terms that are compared one by one
_STOP = re.compile(
    "an?|and|as|at|by|for|from|in|is|of|on|or|that|the|to|what|which|with|"
    "con|del?|e|el|en|las?|los|o|para|por|una?|y"
)
_NEGATION = re.compile("not?|non|without|except|sin|excepto")
# Scripts written without spaces between words: Thai to Khmer, kana, Han.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_UNSPACED_NEGATION = re.compile("な[しい]|無し|不要|以外")
_EDGES = " ,;:.!?/|-–—()[]{}\"'、。・【】「」『』（）"


def implied_steps(label: int) -> dict[str, str]:
    """The step verdicts that an ESCI or WANDS label implies.

    The category is a match for 4 (E, Exact) and 3 (S, Partial) and a mismatch for 2 (C) and 1 (I,
    Irrelevant). The attributes are met for 4. Steps that the label does not determine are absent.
    """
    return dict(DEFAULT_LABELS.implied[label])


def write_chain(example: Example, schema: CotSchema, rng: np.random.Generator) -> str:
    """Writes a chain of thought for a labeled pair, in one of several phrasings.

    A ``rationale`` that the schema parses as well formed is returned unchanged. Otherwise the steps
    ``query``, ``product``, ``category``, ``attributes`` and ``label`` are written. The first two
    are copied from their annotations if present. Other steps of the schema are copied from
    ``example.steps``, and optional ones that are absent there are omitted.

    Args:
      example: the pair, with its label. The chain agrees with the verdicts in ``example.steps``.
      schema: the steps of the chain.
      rng: selects the phrasings; the same state gives the same chain.

    Raises:
      ValueError: if the pair has no label, or a required step cannot be written.
    """
    if example.rationale and schema.parse(example.rationale).well_formed:
        return example.rationale
    if example.label is None:
        raise ValueError(f"{example.uid!r} has no label: a chain is written from the gold label")
    steps = example.steps or {}
    verdicts = {**_verdicts(example.label, steps, schema), LABEL_STEP: str(example.label)}
    query, product = _query_text(example, rng), _product_text(example, rng)
    texts = {
        "query": query,
        "product": product,
        "category": _category_text(example, rng),
        "attributes": _attributes_text(example, verdicts, rng),
    }
    for name in ("query", "product"):
        if name in example.annotations and steps.get(name):
            texts[name] = steps[name]
    for step in schema.steps:
        if steps.get(step.name) and step.name not in {*texts, *verdicts}:
            (verdicts if step.verdicts else texts)[step.name] = steps[step.name]
    known = {step.name for step in schema.steps if not step.verdicts or step.name in verdicts}
    return schema.write(
        {name: text for name, text in texts.items() if name in known},
        {name: verdict for name, verdict in verdicts.items() if name in known},
    )


def _verdicts(label: Label, steps: Mapping[str, str], schema: CotSchema) -> dict[str, str]:
    """Verdicts on category and attributes that lead to a label; those in ``steps`` are kept.

    They invert the label rule: 1 for a category mismatch, 2 for a conflict, 3 for unstated
    attributes or a near category, 4 if all are met. Where a label implies nothing, a required step
    that nobody annotated is ``unstated``, if it can be.

    Reconstruction: label 2 with a known category mismatch (ESCI's C) gets the attributes
    ``unstated``, as does label 1, since attributes of different product types are not compared.
    """
    if not schema.labels.implied:
        required = [step for step in schema.steps if not step.optional]
        unknown = {step.name: UNSTATED for step in required if UNSTATED in step.verdicts}
        return unknown | {
            s.name: steps[s.name] for s in schema.steps if s.verdicts and s.name in steps
        }
    label = DEFAULT_LABELS.read(label)
    category, attributes = steps.get("category"), steps.get("attributes")
    if category is None:
        near = label == 3 and attributes == "met"
        category = "near" if near else "mismatch" if label == 1 else "match"
    if attributes is None:
        attributes = "met" if label == 4 else "unstated"
        attributes = "conflict" if label == 2 and category != "mismatch" else attributes
    return {"category": category, "attributes": attributes}


def _query_text(example: Example, rng: np.random.Generator) -> str:
    query = _head(example.query, 10, 60)
    terms = "; ".join(_terms(example.query)[:6]) or query
    return _pick(rng, query, terms, f"asks for {query}", f"wanted: {terms}")


def _product_text(example: Example, rng: np.random.Generator) -> str:
    title = _head(example.product["title"], 8, 48)
    brand = _head(example.product.get("brand", ""), 3, 24)
    color = _head(example.product.get("colour", example.product.get("color", "")), 2, 16)
    brand, color = ("" if v.casefold() in title.casefold() else v for v in (brand, color))
    if rng.integers(2):
        return "; ".join(filter(None, [title, brand, color]))
    parts = [title, brand and f"brand {brand}", color and f"colour {color}"]
    return _pick(rng, "", "offers ", "this is ") + "; ".join(filter(None, parts))


def _category_text(example: Example, rng: np.random.Generator) -> str:
    query, title = _head(example.query, 5, 30), _head(example.product["title"], 5, 30)
    return _pick(
        rng, f"{query} / {title}", f"asked {query}, offered {title}", f"{query} against {title}"
    )


def _attributes_text(
    example: Example, verdicts: Mapping[str, str], rng: np.random.Generator
) -> str:
    """Compares the terms of the query with the product's fields, in line with the verdicts."""
    if verdicts.get("category") == "mismatch":
        return _pick(rng, "another kind of thing", "nothing to compare", "not compared")
    attributes = verdicts.get("attributes", UNSTATED)
    matched, unmatched = [], []
    for term in _terms(example.query):
        for part, field in _match(term, example.product):
            (matched if field else unmatched).append((part, field))
    # Parts are shown as met only if a field contains them, and as missing only if none does.
    shown = matched[:_MAX_TERMS] if attributes == "met" else unmatched[:2] + matched[:2]
    missing = "unstated" if attributes == "unstated" else "not offered"
    if not shown or (attributes != "met" and not unmatched):
        if attributes == "met":
            return _pick(rng, "nothing is lacking", "nothing speaks against it", "all as asked")
        if attributes == "conflict":
            return _pick(rng, "the words agree, the offer does not", "one demand is contradicted")
        return _pick(rng, "the words agree, not every demand", "not every demand is settled")
    form = int(rng.integers(3))
    met_format = ("{} / {} met", "{} in the {} met", "{} ({}) met")[form]
    missing_format = ("{} / {}", "{} {}", "{} ({})")[form]
    return "; ".join(
        met_format.format(part, field) if field else missing_format.format(part, missing)
        for part, field in shown
    )


def _terms(query: str) -> list[str]:
    """The distinct words of a query without stop words, each negation joined to its word."""
    terms, negation = [], ""
    for word in (raw.strip(_EDGES) for raw in query.split()):
        if _NEGATION.fullmatch(word.casefold()):
            negation = f"{word} "
        elif word and not _STOP.fullmatch(word.casefold()):
            terms.append(negation + _head(word, 1, 20))
            negation = ""
    return list(dict.fromkeys(terms))


def _match(term: str, product: Mapping[str, str]) -> list[tuple[str, str]]:
    """Parts of a term, each with the name of the first field that contains it, or "".

    Words are matched whole. A term of a script without spaces is split into the longest pieces, of
    at least two characters, that a field contains. A negated one is not split, since its parts do
    not have the meaning of the whole.
    """
    if not _UNSPACED.search(term):
        return [(term, next((name for name, v in product.items() if _contains(v, term)), ""))]
    if _UNSPACED_NEGATION.search(term):
        folded = term.casefold()
        return [(term, next((k for k, v in product.items() if folded in v.casefold()), ""))]
    parts, unmatched, start = [], "", 0
    while start < len(term):
        field, end = _longest_match(term, start, product)
        if field and unmatched:
            parts.append((unmatched, ""))
        unmatched = "" if field else unmatched + term[start]
        parts += [(term[start:end], field)] if field else []
        start = end if field else start + 1
    return [*parts, (unmatched, "")] if unmatched else parts


def _longest_match(term: str, start: int, product: Mapping[str, str]) -> tuple[str, int]:
    """The first field with the longest piece of a term from ``start`` on, and the piece's end."""
    for end in range(len(term), start + 1, -1):  # two characters or more
        piece = term[start:end].casefold()
        for field, value in product.items():
            if piece in value.casefold():
                return field, end
    return "", start


def _contains(text: str, term: str) -> bool:
    """Whether a text contains the words of a term in sequence, ignoring plurals and accents."""
    term_words = [_singular(word) for word in _fold(term).split()]
    words = [_singular(word.strip(_EDGES)) for word in _fold(text).split()]
    n = len(term_words)
    return any(words[i : i + n] == term_words for i in range(len(words) - n + 1))


def _fold(text: str) -> str:
    if not text.isascii():
        text = "".join(
            c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c)
        )
    return text.casefold()


def _singular(word: str) -> str:
    return word.removesuffix("s").removesuffix("'").removesuffix("’") if len(word) > 2 else word


def _head(text: str, words: int, chars: int) -> str:
    """The first words of a text, limited to ``chars`` characters."""
    head = " ".join(text.split()[:words])
    if len(head) > chars:
        cut = head[: chars + 1]
        whole_words = cut.rpartition(" ")[0]
        head = whole_words if len(whole_words) > chars // 2 else cut[:chars]
    return head.strip(_EDGES) or head


def _pick(rng: np.random.Generator, *phrasings: str) -> str:
    return phrasings[int(rng.integers(len(phrasings)))]
