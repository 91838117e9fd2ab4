"""Rationales: chains written from the gold class for the cold start."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes import SHARED_DATA

from she_jax.cot import ATTRIBUTES, CotSchema, Step
from she_jax.data.intake import normalize_text
from she_jax.data.rationales import _SILENT, implied_steps, write_chain
from she_jax.rewards.verifier import verify
from she_jax.types import Example

SCHEMA = CotSchema()
LAMP = Example(
    uid="a",
    query="brass wall lamp without cord",
    product={
        "title": "Acme Wall Lamps, brushed brass, with a very long cord and so on and on",
        "brand": "Lumen Works",
        "colour": "gold",
        "bullets": "dimmable",
    },
    label=3,
)
TEXT = st.text(max_size=60).map(normalize_text).filter(bool)


def chain(example: Example, seed: int = 0, schema: CotSchema = SCHEMA) -> str:
    return write_chain(example, schema, np.random.default_rng(seed))


def step(text: str, name: str) -> str:
    """The line of a step in a chain."""
    return next(line for line in text.split("\n") if line.startswith(f"{name}: "))


def verdicts(example: Example, **kw) -> tuple[str | None, ...]:
    parsed = SCHEMA.parse(chain(example, **kw))
    assert parsed.well_formed
    return tuple(s.verdict for s in parsed.steps if s is not None and s.verdict)


@given(
    query=TEXT,
    product=st.dictionaries(st.sampled_from(["brand", "colour", "color", "bullets"]), TEXT),
    title=TEXT,
    label=st.integers(1, 4),
    implied=st.booleans(),
    seed=st.integers(0, 50),
)
def test_every_pair_gets_a_well_formed_chain(query, product, title, label, implied, seed):
    example = Example(
        uid="x",
        query=query,
        product={"title": title} | product,
        label=label,
        steps=implied_steps(label) if implied else None,
    )
    for schema in (SCHEMA, CotSchema.build(label_first=True, checks=2)):
        parsed = schema.parse(chain(example, seed, schema))
        assert parsed.well_formed
        assert parsed.label == label


def test_checks_whose_truth_is_known_are_written():
    """Otherwise a policy would start without them, and get no reward for these steps."""
    schema = CotSchema.build(checks=2)
    steps = {"check_1": "met", "attributes": "met"}
    parsed = schema.parse(chain(dataclasses.replace(LAMP, label=4, steps=steps), 0, schema))
    steps = dict(zip(schema.names, parsed.steps, strict=True))
    assert parsed.well_formed
    assert steps["check_1"] is not None
    assert steps["check_1"].verdict == "met"
    assert steps["check_2"] is None


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (4, ("match", "met", "4")),
        (3, ("match", "unstated", "3")),
        (2, ("match", "conflict", "2")),
        (1, ("mismatch", "unstated", "1")),
    ],
)
def test_verdicts_follow_the_label_rule(label, expected):
    assert verdicts(dataclasses.replace(LAMP, label=label)) == expected


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (4, ("match", "met", "4")),
        (3, ("match", "unstated", "3")),
        (2, ("mismatch", "unstated", "2")),
        (1, ("mismatch", "unstated", "1")),
    ],
)
def test_verdicts_never_contradict_the_steps_that_the_class_implies(label, expected):
    known = implied_steps(label)
    assert verdicts(dataclasses.replace(LAMP, label=label, steps=known)) == expected
    assert known.items() <= {"category": expected[0], "attributes": expected[1]}.items()


def test_given_verdicts_are_kept_and_the_other_verdict_agrees_with_the_label():
    near = dataclasses.replace(LAMP, steps={"category": "near"})
    assert verdicts(near) == ("near", "unstated", "3")
    met = dataclasses.replace(LAMP, steps={"attributes": "met"})
    assert verdicts(met) == ("near", "met", "3")


def test_attributes_name_words_that_the_product_has_or_lacks():
    line = step(chain(dataclasses.replace(LAMP, query="brass wall lamp emerald")), "attributes")
    for word in ("brass", "wall", "lamp / Lamps", "emerald"):
        assert word in line
    assert line.count("title") == 3
    assert line.count("no field") + line.count("not named") == 1
    assert line.endswith("=> unstated")


@pytest.mark.parametrize("label", [2, 3, 4])
def test_a_negated_word_is_never_said_to_be_there_or_to_be_missing(label):
    line = step(chain(dataclasses.replace(LAMP, label=label)), "attributes")
    assert "brass" in line
    assert "cord" not in line  # the title has a cord, the query wants none


@pytest.mark.parametrize(
    ("query", "title", "label"),
    [
        ("rote Lampe", "Lampe, rot", 3),  # was "rote / unstated"
        ("Lampe ohne Kabel", "Lampe mit Kabel", 4),  # was "ohne ... met"
        ("lampa bez kabla", "lampa z kablem", 3),  # a language that no rule knows
        ("赤いメガネ", "赤 眼鏡", 3),
    ],
)
def test_nothing_is_missing_where_a_rule_cannot_know_it(query, title, label):
    example = Example(uid="a", query=query, product={"title": title}, label=label)
    for seed in range(9):
        line = step(chain(example, seed), "attributes")
        assert "no field" not in line
        assert "not named" not in line


def test_attributes_without_a_word_to_name_say_what_the_verdict_says_or_nothing():
    example = Example(uid="a", query="xyz", product={"title": "abc"}, label=3)
    texts = {step(chain(example, seed), "attributes").split(" => ")[0] for seed in range(20)}
    assert texts == {f"attributes: {text}" for text in _SILENT["unstated"]}


def test_a_text_that_is_cut_says_so():
    example = dataclasses.replace(LAMP, query="a query of very many words that is longer than all")
    assert "..." in step(chain(example), "category")
    assert "..." not in step(chain(dataclasses.replace(LAMP, query="lamp")), "query")


@given(title=TEXT, query=TEXT, label=st.integers(1, 4), seed=st.integers(0, 9))
def test_a_chain_contains_only_words_of_the_pair_and_of_the_templates(title, query, label, seed):
    """Every character outside ASCII comes from the pair; the templates are plain English."""
    example = Example(uid="x", query=query, product={"title": title}, label=label)
    foreign = {c for c in chain(example, seed) if not c.isascii()}
    assert foreign <= set(title + query)


def test_chains_are_deterministic_and_varied():
    assert chain(LAMP, 3) == chain(LAMP, 3)
    seen = Counter(chain(LAMP, seed) for seed in range(100))
    assert len(seen) > 30
    for name in ("query", "product", "category", "attributes"):
        assert len({step(text, name) for text in seen}) >= 3


def test_a_well_formed_rationale_is_used_unchanged():
    rationale = "query: a\nproduct: b\ncategory: c => near\nattributes: met\nlabel: 1"
    assert chain(dataclasses.replace(LAMP, rationale=rationale)) == rationale
    assert chain(dataclasses.replace(LAMP, rationale="label: 3")) == chain(LAMP)


def test_other_steps_of_a_schema_come_from_the_example():
    steps = (*SCHEMA.steps[:4], Step(name="price", verdicts=ATTRIBUTES), SCHEMA.steps[4])
    priced = CotSchema(steps=steps)
    example = dataclasses.replace(LAMP, steps={"price": "conflict"})
    assert "price: conflict\nlabel: 3" in chain(example, schema=priced)
    with pytest.raises(ValueError, match="'price' has no text and no verdict"):
        chain(LAMP, schema=priced)
    short = CotSchema(steps=SCHEMA.steps[2:])
    assert short.parse(chain(LAMP, schema=short)).well_formed


def test_the_query_and_product_steps_repeat_their_annotations():
    """The verifier compares their items one by one with the annotation."""
    steps = {"query": "mug; red", "product": "cup; crimson"}
    pair = Example(
        uid="a",
        query="red mug",
        product={"title": "crimson cup"},
        label=4,
        steps=steps,
        annotations=("query", "product"),
    )
    rng = np.random.default_rng(0)
    chain = SCHEMA.parse(write_chain(pair, SCHEMA, rng))
    assert [step.text for step in chain.steps[:2] if step] == list(steps.values())
    rewards, known = verify(chain, pair, SCHEMA)
    assert known[:2].all()
    assert (rewards[known] == 1).all()
    other = write_chain(dataclasses.replace(pair, annotations=("product",)), SCHEMA, rng)
    assert "query: mug; red" not in other
    silent = dataclasses.replace(pair, steps=steps | {"query": ""})
    assert SCHEMA.parse(write_chain(silent, SCHEMA, rng)).well_formed


def test_an_unlabeled_pair_has_no_chain():
    with pytest.raises(ValueError, match="'a' has no label"):
        chain(dataclasses.replace(LAMP, label=None))


def test_chains_of_the_real_excerpt_are_short_and_readable():
    from she_jax.data.readers.esci import Esci, EsciConfig

    folder = SHARED_DATA / "esci_excerpt"
    if not folder.is_dir():
        pytest.skip(f"the ESCI excerpt is not at {folder}")
    rng = np.random.default_rng(0)
    rows = list(Esci(data_dir="unused", config=EsciConfig(path=str(folder))).rows())
    texts = [write_chain(row.example, SCHEMA, rng) for row in rows]
    assert max(len(text.split()) for text in texts) <= 70
    assert max(map(len, texts)) <= 450
    for row, text in zip(rows, texts, strict=True):
        parsed = SCHEMA.parse(text)
        assert parsed.well_formed
        assert parsed.label == row.example.label
        written = {name: s.verdict for name, s in zip(SCHEMA.names, parsed.steps, strict=True) if s}
        assert row.example.steps.items() <= written.items()
