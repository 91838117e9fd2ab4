"""Chains for the cold start on data sets with labels but without rationales (ESCI, WANDS, JSONL).

A chain says what a rule can know, in the pair's language, and no more: its verdicts come from the
label and the given steps, and its texts quote the query, the product's fields, and words that a
field contains or that none does.

Reconstruction: the parts of the paper (arXiv 2510.07972) that could be obtained do not say how its
first chains were written. Templates with several phrasings take their place.
"""

from collections.abc import Mapping

import numpy as np

from she_jax.cot import FOUR_GRADES, LABEL_STEP, UNSTATED, CotSchema
from she_jax.data.languages import language_of
from she_jax.data.word_claims import compare, is_negated, query_terms
from she_jax.types import Example, Label

_MAX_TERMS, _MAX_MISSING = 4, 2  # query terms that are named in a chain, and missing ones of them
_FORMATS = (
    ("{} in the {}", "{} in no field"),
    ("{} ({})", "{} (no field)"),
    ("{} named in the {}", "{} not named"),
)
_SILENT = {  # where no word can be named: what the verdict says already, or nothing
    "met": ("nothing is lacking", "nothing speaks against it", "all as asked"),
    "conflict": ("one demand is contradicted", "the offer contradicts a demand"),
    "unstated": ("left open", "nothing more is known", "undecided"),
}
_EDGES = " ,;:.!?/|-–—()[]{}\"'、。・【】「」『』（）"


def implied_steps(label: int) -> dict[str, str]:
    """The step verdicts that an ESCI or WANDS label implies.

    The category is a match for 4 (E, Exact) and 3 (S, Partial) and a mismatch for 2 (C) and 1 (I,
    Irrelevant). The attributes are met for 4. Steps that the label does not determine are absent.
    """
    return dict(FOUR_GRADES.implied[label])


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
    texts = {"query": query, "product": product}
    if schema.labels.implied or "attributes" in verdicts:
        texts["category"] = _category_text(example, rng)
        texts["attributes"] = _attributes_text(example, verdicts, rng)
    elif claims := _claims_text(example, UNSTATED, rng):  # nobody said whether they are met
        texts["product"] = f"{product}; {claims}"
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
    label = FOUR_GRADES.read(label)
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
    if rng.integers(4) or is_negated(example.query):
        return _pick(rng, query, f"asks for {query}", f"wanted: {query}")
    terms = [term.text for term in query_terms(example.query)[:6]]
    return f"words: {'; '.join(terms)}" if terms else query


def _product_text(example: Example, rng: np.random.Generator) -> str:
    title = _head(example.product["title"], 8, 48)
    brand = _short(example.product.get("brand", ""), 24)
    color = _short(example.product.get("colour", example.product.get("color", "")), 24)
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
    """Names words of the query that the product has or lacks, or repeats the verdict."""
    if verdicts.get("category") == "mismatch":
        return _pick(rng, "not compared", "no comparison", "left uncompared")
    attributes = verdicts.get("attributes", UNSTATED)
    claims = _claims_text(example, attributes, rng)
    return claims or _pick(rng, *_SILENT.get(attributes, _SILENT[UNSTATED]))


def _claims_text(example: Example, attributes: str, rng: np.random.Generator) -> str:
    """Names words of the query that the product has or lacks; "" if it has none of them."""
    claims = compare(
        example.query,
        example.product,
        language_of(example.query, example.product),
        most=_MAX_TERMS,
        most_missing=0 if attributes == "met" else _MAX_MISSING,
    )
    if not claims.found:
        return ""
    found_format, missing_format = _FORMATS[int(rng.integers(len(_FORMATS)))]
    texts = [missing_format.format(text) for text in claims.missing]
    return "; ".join(texts + [found_format.format(text, field) for text, field in claims.found])


def _head(text: str, words: int, chars: int) -> str:
    """The first words of a text, limited to ``chars`` characters; "..." stands for the rest."""
    head = " ".join(text.split()[:words])
    if len(head) > chars:
        cut = head[: chars + 1]
        whole_words = cut.rpartition(" ")[0]
        head = whole_words if len(whole_words) > chars // 2 else cut[:chars]
    is_cut = len(head) < len(" ".join(text.split()))
    head = head.strip(_EDGES) or head
    return f"{head} ..." if is_cut else head


def _short(text: str, chars: int) -> str:
    """A text that is short enough, or nothing."""
    return text.strip(_EDGES) if len(text) <= chars else ""


def _pick(rng: np.random.Generator, *phrasings: str) -> str:
    return phrasings[int(rng.integers(len(phrasings)))]
