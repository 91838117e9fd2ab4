"""ShopWorld: its truth, its teacher, its splits."""

import dataclasses
from collections import Counter

import pytest

from she_jax.cot import CotSchema
from she_jax.data.dataset import open_split, prepare
from she_jax.data.shopworld import (
    SPLITS,
    Condition,
    ShopWorld,
    ShopWorldConfig,
    TeacherErrors,
    World,
    attributes_verdict,
    category_verdict,
    condition_verdict,
    generate,
    label_rule,
)
from she_jax.rl.rewards import verify

SMALL = World(pairs=(2_000, 200, 400, 200))


def gold(**changes) -> World:
    return dataclasses.replace(SMALL, chains="gold", **changes)


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
    assert condition_verdict(condition, offered) == verdict


def test_category_and_attribute_verdicts():
    assert category_verdict("sofa", "sofa") == "match"
    assert category_verdict("sofa", "armchair") == "near"
    assert category_verdict("sofa", "desk") == category_verdict("sofa", "jeans") == "mismatch"
    assert attributes_verdict([]) == "met"
    assert attributes_verdict(["met", "unstated", "conflict"]) == "conflict"
    assert attributes_verdict(["met", "unstated"]) == "unstated"


@pytest.mark.parametrize("checks", [False, True])
@pytest.mark.parametrize("label_first", [False, True])
def test_gold_chains_are_well_formed_and_right_in_every_step(checks, label_first):
    world = gold(checks=checks, label_first=label_first)
    schema = CotSchema.build(checks=2 if checks else 0, label_first=label_first)
    for example in generate(world, "test"):
        chain = schema.parse(example.rationale or "")
        assert chain.well_formed
        rewards, known = verify(chain, example, schema)
        assert rewards[known].min() == 1.0, example
        assert {name for name in example.steps or {}} == set(example.annotations)


def test_the_teacher_errs_at_the_stated_rates_and_in_no_other_way():
    """Each kind of error alone: how often the chain goes wrong where it has the chance."""
    schema = CotSchema()

    def wrong(errors: TeacherErrors, chance) -> tuple[float, int]:
        world = dataclasses.replace(SMALL, errors=errors)
        hits, elsewhere = [], 0
        for example in generate(world, "train"):
            chain = schema.parse(example.rationale or "")
            rewards, known = verify(chain, example, schema)
            bad = rewards[known].min() < 1
            if chance(example):
                hits.append(bad)
            else:
                elsewhere += bad
        return sum(hits) / len(hits), elsewhere

    none = TeacherErrors(negation=0, unstated=0, near=0, price=0)
    share, elsewhere = wrong(
        dataclasses.replace(none, near=0.6), lambda e: (e.steps or {})["category"] == "near"
    )
    assert share == pytest.approx(0.6, abs=0.05)
    assert elsewhere == 0
    share, elsewhere = wrong(
        dataclasses.replace(none, negation=0.6), lambda e: e.kind == "negation"
    )
    assert share == pytest.approx(0.6, abs=0.07)
    assert elsewhere == 0
    _, elsewhere = wrong(
        dataclasses.replace(none, unstated=1.0),
        lambda e: (e.steps or {})["attributes"] == "unstated",
    )
    assert elsewhere == 0
    _, elsewhere = wrong(dataclasses.replace(none, price=1.0), lambda e: e.kind == "alternative")
    assert elsewhere == 0
    assert wrong(none, lambda e: True) == (0.0, 0)


def test_the_same_world_gives_the_same_pairs_and_another_seed_others():
    first, again = list(generate(SMALL, "test")), list(generate(SMALL, "test"))
    assert first == again
    other = list(generate(dataclasses.replace(SMALL, seed=1), "test"))
    assert [e.query for e in first] != [e.query for e in other]


def test_no_query_is_in_two_splits_and_no_longtail_combination_in_training():
    queries = {split: {e.query for e in generate(SMALL, split)} for split in SPLITS}
    for split in SPLITS[1:]:
        assert queries["train"].isdisjoint(queries[split])
    assert queries["validation"].isdisjoint(queries["test"])

    def combinations(split: str) -> set[tuple[str, str]]:
        found = set()
        for example in generate(gold(), split):
            wanted = (example.steps or {})["query"].split("; ")
            found |= {(wanted[0], value) for value in wanted[1:]}
        return found

    trained, rare = combinations("train"), combinations("test_longtail")
    assert len(rare - trained) > 10


@pytest.mark.parametrize("balance", [(0.25,) * 4, (0.1, 0.2, 0.3, 0.4)])
def test_class_balance(balance):
    world = dataclasses.replace(SMALL, class_balance=balance)
    counts = Counter(e.label for e in generate(world, "train"))
    for label, share in zip((1, 2, 3, 4), balance, strict=True):
        assert counts[label] / 2_000 == pytest.approx(share, abs=0.03)


def test_coverage_says_how_many_steps_humans_annotated():
    world = dataclasses.replace(SMALL, coverage=0.3)
    pairs = list(generate(world, "train"))
    seen = sum(len(e.annotations) for e in pairs) / sum(len(e.steps or {}) for e in pairs)
    assert seen == pytest.approx(0.3, abs=0.03)
    assert all(e.label is not None for e in pairs)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="four counts"):
        World(pairs=(1, 2, 3))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="probabilities"):
        World(errors=TeacherErrors(near=1.5))
    with pytest.raises(ValueError, match="'oracle'"):
        World(chains="oracle")
    with pytest.raises(ValueError, match="expected one of"):
        next(generate(SMALL, "dev"))


def test_the_builder_writes_what_the_generator_makes(tmp_path):
    world = dataclasses.replace(SMALL, pairs=(50, 8, 12, 8))
    made = prepare(ShopWorld(data_dir=tmp_path, config=ShopWorldConfig(world=world)))
    assert dict(made.splits) == dict(zip(SPLITS, world.pairs, strict=True))
    source = open_split(made.path, "train")
    assert [source[i] for i in range(50)] == list(generate(world, "train"))


def test_what_nobody_looked_at_has_no_label_and_the_pairs_are_the_same():
    whole, some = (
        list(generate(World(pairs=(400, 50, 0, 0), annotated=share), "train"))
        for share in (1.0, 0.3)
    )
    assert [(e.query, e.product, e.steps, e.rationale) for e in whole] == [
        (e.query, e.product, e.steps, e.rationale) for e in some
    ]
    unseen = [e for e in some if e.label is None]
    assert 0.6 < len(unseen) / len(some) < 0.8
    assert not any(e.annotations for e in unseen)
    assert all(e.annotations for e in some if e.label is not None)
    others = generate(World(pairs=(0, 50, 0, 0), annotated=0.0), "validation")
    assert all(e.label is not None for e in others)
