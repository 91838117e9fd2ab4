"""ShopWorld's queries and products: verdicts, vocabulary, and queries of many conditions."""

import random
from itertools import combinations

import pytest

from she_jax.data.shopworld.catalogue import (
    ATTRIBUTES,
    BRANDS,
    DEPARTMENTS,
    DETAILS,
    NEEDS,
    SUBSTITUTED,
)
from she_jax.data.shopworld.generator import (
    CATEGORY,
    Condition,
    Shop,
    attributes_verdict,
    category_verdict,
    draw_product,
    draw_query,
    is_doubtful,
    is_longtail,
    label_rule,
    likeness,
)

PLAIN = Shop(checks=0, longtail=False)
MANY = [
    Shop(checks=checks, longtail=longtail) for checks in (2, 4, 8) for longtail in (False, True)
]


def queries(shop: Shop, number: int):
    rng = random.Random(7)
    drawn = (draw_query(rng, shop) for _ in range(number))
    return [query for query in drawn if query is not None]


def test_the_label_rule():
    assert label_rule("mismatch", "met") == label_rule("mismatch", "conflict") == 1
    assert label_rule("match", "conflict") == label_rule("near", "conflict") == 2
    assert label_rule("match", "unstated") == label_rule("near", "met") == 3
    assert label_rule("match", "met") == 4


@pytest.mark.parametrize(
    ("condition", "offered", "verdict"),
    [
        (Condition("colour", "is", "red"), "red", "met"),
        (Condition("colour", "is", "red"), "blue", "conflict"),
        (Condition("colour", "is", "red"), None, "unstated"),
        (Condition("material", "not", "leather"), "leather", "conflict"),
        (Condition("material", "not", "leather"), "suede", "met"),
        (Condition("brand", "cheaper", "velora"), "pacer", "met"),
        (Condition("brand", "cheaper", "velora"), "strado", "conflict"),
        (Condition("brand", "cheaper", "velora"), None, "unstated"),
    ],
)
def test_condition_verdicts(condition, offered, verdict):
    assert PLAIN.verdict(condition, offered) == verdict


def substitutes():
    """Every pair of values that may be alike, with its attribute."""
    return {
        (attribute, *sorted(pair))
        for department in DEPARTMENTS
        for attribute, values in (
            ATTRIBUTES[department] | DETAILS[department] | {"brand": BRANDS[department]}
        ).items()
        for pair in combinations(values, 2)
        if attribute in SUBSTITUTED
    }


def test_with_checks_some_values_are_substitutes_of_others():
    likenesses = {pair: likeness(*pair) for pair in substitutes()}
    values = list(likenesses.values())
    assert len(values) > 150
    assert values.count("alike") / len(values) == pytest.approx(1 / 3, abs=0.08)
    assert set(values) == {"alike", "other"}
    doubtful = [likeness(*pair) for pair in likenesses if is_doubtful(*pair)]
    assert len(doubtful) / len(values) == pytest.approx(1 / 2, abs=0.08)
    assert 0.2 < doubtful.count("alike") / len(doubtful) < 0.5
    shop = MANY[0]
    for (attribute, value, other), alike in likenesses.items():
        assert likeness(attribute, other, value) == alike
        assert likeness(attribute, value, value) == "same"
        assert not is_doubtful(attribute, value, value)
        asked, excluded = Condition(attribute, "is", value), Condition(attribute, "not", value)
        assert shop.verdict(asked, other) == ("met" if alike == "alike" else "conflict")
        assert shop.verdict(excluded, other) == ("conflict" if alike == "alike" else "met")
        assert (PLAIN.verdict(asked, other), PLAIN.verdict(asked, value)) == ("conflict", "met")
    assert likeness("size", "size 6", "size 7") == "other"
    assert not any(is_doubtful("size", f"size {n}", "size 7") for n in (6, 8, 9, 10))


def test_category_and_attribute_verdicts():
    assert category_verdict("sofa", "sofa") == "match"
    assert category_verdict("sofa", "armchair") == "near"
    assert category_verdict("sofa", "desk") == category_verdict("sofa", "jeans") == "mismatch"
    assert attributes_verdict([]) == "met"
    assert attributes_verdict(["met", "unstated", "conflict"]) == "conflict"
    assert attributes_verdict(["met", "unstated"]) == "unstated"


@pytest.mark.parametrize("department", DEPARTMENTS)
def test_the_words_of_a_product_are_unambiguous(department):
    """Values of different attributes share no word; details share none with product types."""
    named = ATTRIBUTES[department] | DETAILS[department]
    assert len(named) == len(ATTRIBUTES[department]) + len(DETAILS[department]) >= 8
    words = {
        attribute: [phrase for value, more in values.items() for phrase in (value, *more)]
        for attribute, values in (named | {"brand": dict.fromkeys(BRANDS[department], ())}).items()
    }
    assert all(len(set(phrases)) == len(phrases) for phrases in words.values())
    single = {attribute: set(" ".join(phrases).split()) for attribute, phrases in words.items()}
    for first, second in combinations(single, 2):
        assert single[first].isdisjoint(single[second]), (first, second)
    nouns = [
        phrase
        for types in DEPARTMENTS[department].values()
        for name, more in types.items()
        for phrase in (name, *more)
    ]
    taken = set(" ".join([*nouns, *NEEDS[department], "not without non like but for"]).split())
    assert all(taken.isdisjoint(single[attribute]) for attribute in DETAILS[department])
    assert {p for phrases in words.values() for p in phrases}.isdisjoint(nouns)


@pytest.mark.parametrize("shop", MANY, ids=str)
def test_a_query_has_between_half_and_all_of_the_checks_as_conditions(shop):
    drawn = queries(shop, 3_000)
    numbers = {kind: set() for kind in ("plain", "attribute", "brand", "negation", "alternative")}
    for query in drawn:
        asked = [c.attribute for c in query.conditions]
        assert len(set(asked)) == len(asked)
        numbers.setdefault(query.kind, set()).add(len(asked))
        rare = [is_longtail(query.type, c.value) for c in query.conditions]
        assert any(rare) if shop.longtail else not any(rare)
    possible = set(range(shop.checks // 2, shop.checks + 1))
    assert numbers.pop("plain") == (set() if shop.longtail else {0})
    assert len(numbers) == 5
    assert all(counts == possible for counts in numbers.values())


def _differ(attribute, first, second):
    return likeness(attribute, first, second) == "other"


@pytest.mark.parametrize("shop", MANY[2:5:2], ids=str)
def test_kinds_of_many_conditions(shop):
    excluded = further = 0
    negated = set()
    for query in queries(shop, 3_000):
        ops = [c.op for c in query.conditions]
        first = query.conditions[0] if query.conditions else None
        assert ("not" in ops) == (query.kind == "negation")
        assert (query.kind == "alternative") == bool(first and first.op == "cheaper")
        if query.kind == "brand":
            assert first is not None
            assert (first.attribute, first.op) == ("brand", "is")
        if query.kind == "question":
            department = CATEGORY[query.type][0]
            needs = {n for n, met in NEEDS[department].items() if n in query.text}
            assert any((first.attribute, first.value) == NEEDS[department][n] for n in needs)
        if query.kind == "negation":
            assert ops == sorted(ops)  # "is" before "not", as in the words
            words = query.text.split()
            assert words.count("not") + words.count("without") == ops.count("not")
            excluded, further = excluded + ops.count("not") - 1, further + len(ops) - 1
            negated |= {c.attribute for c in query.conditions if c.op == "not"}
    assert excluded / further == pytest.approx(1 / 3, abs=0.05)
    distinct = {attribute for attribute, *pair in substitutes() if _differ(attribute, *pair)}
    assert negated >= distinct & {name for values in DETAILS.values() for name in values}
    assert len(distinct) > 10


@pytest.mark.parametrize("shop", MANY, ids=str)
@pytest.mark.parametrize("label", [1, 2, 3, 4])
def test_the_drawn_product_has_the_label_and_meets_most_of_many_conditions(shop, label):
    rng = random.Random(3)
    near = met = total = asked = 0
    for query in queries(shop, 1_000):
        if not query.conditions:
            continue
        product = draw_product(rng, shop, query, label)
        stated = [c for c in query.conditions if c.attribute in product.stated]
        assert 1 <= len(product.stated) - len(stated) <= 2
        category = category_verdict(query.type, product.type)
        outcomes = [shop.verdict(c, product.stated.get(c.attribute)) for c in query.conditions]
        assert label_rule(category, attributes_verdict(outcomes)) == label
        if not shop.longtail:
            assert not any(is_longtail(product.type, value) for value in product.stated.values())
        asked += 1
        near += category == "near"
        if label == 2:
            assert "conflict" in outcomes
        if label == 3:
            assert "unstated" in outcomes or category == "near"
            assert "conflict" not in outcomes
        met += outcomes.count("met")
        total += len(outcomes)
    assert near / asked == pytest.approx({2: 0.3, 3: 0.5}.get(label, 0.0), abs=0.1)
    few = 0.12 if shop.checks == 2 and label in (2, 3) else 0.0  # the one that decides is not met
    assert met / total > {1: 0.2, 2: 0.35, 3: 0.6, 4: 0.999}[label] - few


def test_without_checks_the_details_are_left_out():
    details = {name for values in DETAILS.values() for name in values}
    rng = random.Random(0)
    for query in queries(PLAIN, 500):
        assert len(query.conditions) <= 2
        stated = draw_product(rng, PLAIN, query, 4).stated
        assert details.isdisjoint({*stated, *(c.attribute for c in query.conditions)})
