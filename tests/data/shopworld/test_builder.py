"""The ShopWorld data set: annotations, the teacher's errors, and the splits."""

import dataclasses
import hashlib
import json
from collections import Counter

import pytest
from recipes import config

from she_jax.cot import CotSchema
from she_jax.data.dataset import open_split, prepare
from she_jax.data.shopworld.builder import (
    SPLITS,
    ShopWorld,
    ShopWorldConfig,
    TeacherErrors,
    World,
    generate,
)
from she_jax.data.shopworld.catalogue import ATTRIBUTES, BRANDS, DEPARTMENTS, DETAILS
from she_jax.data.shopworld.generator import is_doubtful
from she_jax.data.sources import make_builder
from she_jax.rewards.verifier import verify
from she_jax.runs.config import parse
from she_jax.types import UserError

SMALL = World(pairs=(2_000, 200, 400, 200))


def gold(**changes) -> World:
    return dataclasses.replace(SMALL, chains="gold", **changes)


@pytest.mark.parametrize(
    ("chains", "digest"), [("teacher", "fd4158f2a60a92e5"), ("gold", "cf6524907cf754b3")]
)
def test_the_worlds_of_published_results_never_change(chains, digest):
    """Pair for pair and character for character."""
    pairs = hashlib.blake2b(digest_size=8)
    for seed in range(3):
        for first in (False, True):
            world = World(seed=seed, chains=chains, label_first=first)
            world = dataclasses.replace(world, pairs=(300, 40, 40, 40))
            for split in SPLITS:
                for example in generate(world, split):
                    known = {k: v for k, v in vars(example).items() if k != "raters"}
                    pairs.update(json.dumps(known).encode())
    assert pairs.hexdigest() == digest


@pytest.mark.parametrize("checks", [2, 4, 8])
def test_with_checks_the_pairs_do_not_depend_on_who_writes_the_chains(checks):
    worlds = [
        World(pairs=(300, 0, 40, 40), chains=chains, checks=checks, coverage=0.5, label_first=first)
        for chains, first in (("teacher", False), ("gold", False), ("none", False), ("gold", True))
    ]
    for split in SPLITS:
        pairs = [list(generate(world, split)) for world in worlds]
        bare = [[dataclasses.replace(e, rationale=None) for e in examples] for examples in pairs]
        assert bare[0] == bare[1] == bare[2] == bare[3]
    chains = [[e.rationale for e in generate(world, "train")] for world in worlds]
    assert chains[0] != chains[1]
    assert chains[1] != chains[3]
    assert set(chains[2]) == {None}


@pytest.mark.parametrize("checks", [0, 2, 4, 8])
@pytest.mark.parametrize("label_first", [False, True])
def test_gold_chains_are_well_formed_and_right_in_every_step(checks, label_first):
    world = gold(checks=checks, label_first=label_first)
    schema = CotSchema.build(checks=checks, label_first=label_first)
    for example in generate(world, "test"):
        chain = schema.parse(example.rationale or "")
        assert chain.well_formed
        rewards, known = verify(chain, example, schema)
        assert rewards[known].min() == 1.0, example
        assert {name for name in example.steps or {}} == set(example.annotations)


@pytest.mark.parametrize("checks", [2, 4, 8])
def test_a_check_beyond_the_query_is_not_required_and_gets_no_reward(checks):
    schema = CotSchema.build(checks=checks)
    short = 0
    for example in generate(gold(checks=checks), "test"):
        asked = len((example.steps or {})["query"].split("; ")) - 1
        chain = schema.parse(example.rationale or "")
        rewards, known = verify(chain, example, schema)
        numbered = [f"check_{i + 1}" for i in range(checks)]
        assert [known[schema.names.index(name)] for name in numbered] == [
            i < asked for i in range(checks)
        ]
        assert [name in (example.steps or {}) for name in numbered] == [
            i < asked for i in range(checks)
        ]
        if 0 < asked < checks:
            short += 1
            more = f"\n{numbered[-1]}: red / red => met\nattributes:"
            chain = schema.parse((example.rationale or "").replace("\nattributes:", more))
            assert chain.well_formed
            rewards, known = verify(chain, example, schema)
            last = schema.names.index(numbered[-1])
            assert known[last]
            assert rewards[last] == 0.0
            assert rewards[known].sum() == known.sum() - 1
    assert short > 50


ATTRIBUTE = {
    value: attribute
    for department in DEPARTMENTS
    for attribute, values in (
        ATTRIBUTES[department] | DETAILS[department] | {"brand": BRANDS[department]}
    ).items()
    for value in values
}


def has_doubtful_pair(example) -> bool:
    """Whether a value of the query, wanted or excluded, and the product's are a doubtful pair."""
    _, *asked = example.steps["query"].split("; ")
    _, *offered = example.steps["product"].split("; ")
    asked = [item.removeprefix("not ") for item in asked if "cheaper" not in item]
    stated = {ATTRIBUTE[value]: value for value in offered}
    pairs = [(ATTRIBUTE[value], value, stated.get(ATTRIBUTE[value], value)) for value in asked]
    return any(is_doubtful(*pair) for pair in pairs)


@pytest.mark.parametrize("checks", [0, 8])
def test_the_teacher_errs_at_the_stated_rates_and_in_no_other_way(checks):
    """Each kind of error alone: the share of wrong chains where it can occur, and elsewhere."""
    schema = CotSchema.build(checks=checks)

    def wrong(errors: TeacherErrors, chance) -> tuple[float, int]:
        world = dataclasses.replace(SMALL, errors=errors, checks=checks)
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

    none = TeacherErrors(negation=0, unstated=0, near=0, price=0, likeness=0)
    share, elsewhere = wrong(
        dataclasses.replace(none, near=0.6), lambda e: (e.steps or {})["category"] == "near"
    )
    assert share == pytest.approx(0.6, abs=0.05)
    assert elsewhere == 0
    share, elsewhere = wrong(
        dataclasses.replace(none, negation=0.6), lambda e: e.kind == "negation"
    )
    world = dataclasses.replace(SMALL, checks=checks)
    negated = [(e.steps or {})["query"].count("; not ") for e in generate(world, "train")]
    right = [0.4**number for number in negated if number]
    assert share == pytest.approx(1 - sum(right) / len(right), abs=0.07)  # 0.6 each
    assert elsewhere == 0
    share, elsewhere = wrong(
        dataclasses.replace(none, unstated=1.0), lambda e: "unstated" in (e.steps or {}).values()
    )
    assert share == 1.0
    assert elsewhere == 0
    _, elsewhere = wrong(dataclasses.replace(none, price=1.0), lambda e: e.kind == "alternative")
    assert elsewhere == 0
    share, elsewhere = wrong(dataclasses.replace(none, likeness=1.0), has_doubtful_pair)
    assert (share, elsewhere) == (1.0 if checks else 0.0, 0)
    assert wrong(none, lambda e: True) == (0.0, 0)


def test_the_same_world_gives_the_same_pairs_and_another_seed_others():
    first, again = list(generate(SMALL, "test")), list(generate(SMALL, "test"))
    assert first == again
    other = list(generate(dataclasses.replace(SMALL, seed=1), "test"))
    assert [e.query for e in first] != [e.query for e in other]


@pytest.mark.parametrize("checks", [0, 4, 8])
def test_no_query_is_in_two_splits_and_no_longtail_combination_in_training(checks):
    world = gold(checks=checks)
    queries = {split: {e.query for e in generate(world, split)} for split in SPLITS}
    for split in SPLITS[1:]:
        assert queries["train"].isdisjoint(queries[split])
    assert queries["validation"].isdisjoint(queries["test"])

    def combinations(split: str) -> set[tuple[str, str]]:
        pairs = set()
        for example in generate(world, split):
            wanted = (example.steps or {})["query"].split("; ")
            pairs |= {(wanted[0], value) for value in wanted[1:]}
        return pairs

    trained, rare = combinations("train"), combinations("test_longtail")
    assert len(rare - trained) > 10


@pytest.mark.parametrize("checks", [0, 8])
@pytest.mark.parametrize("balance", [(0.25,) * 4, (0.1, 0.2, 0.3, 0.4)])
def test_class_balance(balance, checks):
    world = dataclasses.replace(SMALL, class_balance=balance, checks=checks)
    counts = Counter(e.label for e in generate(world, "train"))
    for label, share in zip((1, 2, 3, 4), balance, strict=True):
        assert counts[label] / 2_000 == pytest.approx(share, abs=0.03)


def test_coverage_is_the_share_of_annotated_steps():
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
    with pytest.raises(ValueError, match=r"checks=3: expected one of \(0, 2, 4, 8\)"):
        World(checks=3)
    with pytest.raises(ValueError, match="'oracle'"):
        World(chains="oracle")
    with pytest.raises(ValueError, match="expected one of"):
        next(generate(SMALL, "dev"))


def test_the_builder_writes_the_generated_pairs(tmp_path):
    world = dataclasses.replace(SMALL, pairs=(50, 8, 12, 8))
    dataset = prepare(ShopWorld(data_dir=tmp_path, config=ShopWorldConfig(world=world)))
    assert dict(dataset.splits) == dict(zip(SPLITS, world.pairs, strict=True))
    source = open_split(dataset.path, "train")
    assert [source[i] for i in range(50)] == list(generate(world, "train"))


def test_pairs_that_are_not_annotated_have_no_label_and_are_otherwise_the_same():
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


@pytest.mark.parametrize("checks", [0, 2, 4, 8])
def test_the_checks_of_a_recipe_are_those_of_the_world(tmp_path, checks):
    builder = make_builder(parse(config(chain__checks=checks), tmp_path).data)
    assert isinstance(builder, ShopWorld)
    assert builder.builder_config.world.checks == checks


def test_other_numbers_of_checks_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"chain\.checks=3: ShopWorld takes 0 or 2 or 4 or 8"):
        parse(config(chain__checks=3), tmp_path)
