"""What an examiner learns from: every example is what its source says, and draws are even."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest

from she_jax.cot import CotSchema
from she_jax.data.rationales import write_chain
from she_jax.data.shopworld.builder import World, generate
from she_jax.rewards.prm.dataset import (
    CORRUPTIONS,
    POLICY,
    BalancedSampler,
    correct_evidence,
    label_steps,
    rationale_step_queries,
    with_correct_rationale,
)
from she_jax.rewards.prm.step_query import StepQuery
from she_jax.rewards.verifier import fully_annotated, verify
from she_jax.types import Example

SCHEMA = CotSchema()
LAMP = Example(
    uid="a",
    query="red table lamp",
    product={"title": "navy floor lamp"},
    label=2,
    steps={
        "query": "table lamp; red",
        "product": "floor lamp; navy",
        "category": "near",
        "attributes": "conflict",
    },
    annotations=("query", "category"),
)
CHAIN = SCHEMA.parse("""query: table lamp; red
product: floor lamp; navy
category: table lamp / floor lamp => match
attributes: red / navy => what
label: 2""")


@pytest.mark.parametrize("checks", [0, 4])
def test_a_chain_put_right_earns_full_marks(checks):
    schema = CotSchema.build(checks=checks)
    for example in generate(World(pairs=(60, 0, 0, 0), checks=checks), "train"):
        right = with_correct_rationale(example, schema, {})
        assert right is not None
        chain = schema.parse(str(right.rationale))
        rewards, known = verify(chain, example, schema)
        assert chain.well_formed
        assert rewards[known].min() == 1
        told = {step.name for step, parsed in zip(schema.steps, chain.steps, strict=True) if parsed}
        assert told == {*example.annotations, "label"}


def test_a_chain_is_put_right_with_the_evidence_of_right_steps():
    whole = fully_annotated(LAMP)
    demonstrated_lamp = label_steps(CHAIN, whole, SCHEMA, "teacher", "a/demonstration")
    assert correct_evidence(demonstrated_lamp) == {}  # its one readable verdict is wrong
    right = SCHEMA.parse("attributes: red / navy conflict => conflict\nlabel: 2")
    evidence = correct_evidence(label_steps(right, whole, SCHEMA, POLICY, "a/0"))
    assert evidence == {"a": {"attributes": "red / navy conflict"}}
    lamp = with_correct_rationale(whole, SCHEMA, evidence["a"])
    assert lamp is not None
    assert str(lamp.rationale).split("\n") == [
        "query: table lamp; red",
        "product: floor lamp; navy",
        "category: table lamp / floor lamp => near",
        "attributes: red / navy conflict => conflict",
        "label: 2",
    ]


def test_where_a_step_is_not_annotated_no_chain_is_put_right():
    assert with_correct_rationale(LAMP, SCHEMA, {}) is None
    assert (
        with_correct_rationale(dataclasses.replace(fully_annotated(LAMP), label=None), SCHEMA, {})
        is None
    )


@pytest.fixture(scope="module")
def pairs():
    return list(generate(World(pairs=(300, 0, 0, 0)), "train"))


@pytest.fixture(scope="module")
def lessons(pairs):
    """Every demonstrated examination of the pairs, each pair borrowing from the next."""
    rng = np.random.default_rng(0)
    shifted = [*pairs[7:], *pairs[:7]]
    return [
        one
        for pair, other in zip(pairs, shifted, strict=True)
        for one in rationale_step_queries(pair, other, SCHEMA, rng)
    ]


def last_step(one):
    """The step under examination, parsed."""
    step = SCHEMA.parse(one.written).steps[SCHEMA.names.index(one.step)]
    assert step is not None
    return step


def test_the_annotation_judges_and_says_nothing_of_other_steps():
    found = label_steps(CHAIN, LAMP, SCHEMA, POLICY, "a/0")
    assert [(one.step, one.correct) for one in found] == [
        ("query", True),
        ("category", False),
        ("label", True),
    ]
    assert {one.source for one in found} == {POLICY}
    assert {one.chain for one in found} == {"a/0"}
    # The truth of steps that nobody annotated stays out of the critiques too.
    assert [one.critique for one in found] == ["table lamp; red", "near, not match", "near: 2"]


def test_with_all_truth_the_product_is_judged_and_the_unreadable_step_left_out():
    found = label_steps(CHAIN, fully_annotated(LAMP), SCHEMA, POLICY, "a/0")
    assert [one.step for one in found] == ["query", "product", "category", "label"]


def test_partial_credit_is_not_correct():
    chain = SCHEMA.parse("query: table lamp; blue")
    assert [one.correct for one in label_steps(chain, LAMP, SCHEMA, POLICY, "")] == [False]


def test_every_source_is_there_and_means_what_it_says(pairs, lessons):
    by_uid = {pair.uid: pair for pair in pairs}
    seen = Counter(one.source for one in lessons)
    assert {"gold", "teacher", *CORRUPTIONS} == seen.keys()
    assert min(seen.values()) > 20
    for one in lessons:
        k = SCHEMA.names.index(one.step)
        chain = SCHEMA.parse(one.written)
        reward = verify(chain, by_uid[one.example.uid], SCHEMA)[0][k]
        assert one.correct == (one.source == "gold")
        assert last_step(one).valid
        if one.source == "reason":
            assert reward == 1  # the verifier reads the verdict alone
        elif SCHEMA.steps[k].verdicts and one.source == "product":
            assert reward == 1
        else:
            assert (reward == 1) == one.correct


def test_a_spoilt_step_differs_from_the_right_one_in_its_way_only(lessons):
    right = {(one.example.uid, one.step): one for one in lessons if one.source == "gold"}
    for one in lessons:
        if one.source not in CORRUPTIONS:
            continue
        gold = right[one.example.uid, one.step]
        # A critique compares verdicts or items, and says nothing of what precedes a verdict.
        silent = one.source in ("reason", "product") and one.step in ("category", "attributes")
        assert (one.critique == gold.critique) == silent
        assert one.critique.startswith(gold.critique)
        assert one.chain == gold.chain
        assert one.written.split("\n")[:-1] == gold.written.split("\n")[:-1]
        same_verdict = last_step(one).verdict == last_step(gold).verdict
        assert same_verdict == (one.source not in ("verdict", "evidence"))
        same_text = last_step(one).text == last_step(gold).text
        if one.source == "verdict":
            was, now = last_step(gold).verdict, last_step(one).verdict
            words = re.findall(r"\w+|\W", last_step(gold).text)
            said = "".join(now if word == was else word for word in words)
            assert last_step(one).text == said
        else:
            assert one.source == "evidence" or not same_text


def test_what_nobody_annotated_is_not_read():
    """A world keeps all truth; here it is struck out where humans said nothing."""
    schema = CotSchema.build(checks=4)
    pairs = list(generate(World(pairs=(80, 0, 0, 0), checks=4, coverage=0.3), "train"))
    struck = []
    for pair in pairs:
        truth = {k: v if k in pair.annotations else "zebra" for k, v in (pair.steps or {}).items()}
        struck.append(dataclasses.replace(pair, steps=truth))

    def lessons_of(own):
        for n in range(len(own) - 1):
            for one in rationale_step_queries(own[n], own[n + 1], schema, np.random.default_rng(n)):
                yield one.step, one.written, one.correct, one.critique, one.source

    found = list(lessons_of(pairs))
    assert found == list(lessons_of(struck))
    assert {source for *_, source in found} == {"gold", "teacher", *CORRUPTIONS}


def test_spoilt_evidence_is_another_pairs_whole_step(pairs, lessons):
    """Text and verdict agree with each other: only the pair shows that they are wrong."""
    written = [SCHEMA.parse(write_chain(p, SCHEMA, np.random.default_rng(0))) for p in pairs]
    steps = [step for chain in written for step in chain.steps if step is not None]
    borrowed = [last_step(one) for one in lessons if one.source == "evidence"]
    assert {(s.text, s.verdict) for s in borrowed} <= {(s.text, s.verdict) for s in steps}


def test_a_reason_that_would_do_for_any_pair_is_not_borrowed():
    """Of a set without truths or shared words: 'nothing is lacking' is no wrong reason."""
    texts = ["all as asked", "nothing is lacking", "nothing speaks against it"]
    plain = Example(uid="1", query="mug", product={"title": "mug"}, label=4)
    other = dataclasses.replace(plain, uid="2", query="blue cup", product={"title": "blue cup"})
    for seed in range(20):
        for one in rationale_step_queries(plain, other, SCHEMA, np.random.default_rng(seed)):
            if one.source == "reason":
                assert last_step(one).text not in texts


def test_draws_are_even_over_kinds_steps_and_verdicts():
    """The policy's chains as they are; of a demonstrated step, the right or the spoilt one."""

    def examined(chain, source, step, correct):
        return StepQuery(
            example=LAMP, step=step, written="", correct=correct, source=source, chain=chain
        )

    pool = [examined(f"p{n}", POLICY, "label", n > 0) for n in range(4)]
    pool += [examined("d", "gold", step, True) for step in ("query", "label")]
    pool += [examined("d", "verdict", "label", False), examined("d", "product", "query", False)]
    drawn = BalancedSampler(pool).draw(8_000, np.random.default_rng(0))
    chains = Counter(tuple(one.chain for one in chain) for chain in drawn)
    shares = {("d", "d"): 1 / 2} | {(f"p{n}",): 1 / 8 for n in range(4)}
    assert {k: v / 8_000 for k, v in chains.items()} == pytest.approx(shares, abs=0.02)
    shown = [chain for chain in drawn if chain[0].chain == "d"]
    assert all([one.step for one in chain] == ["query", "label"] for chain in shown)
    sources = Counter(one.source for chain in shown for one in chain)
    assert {k: v / len(shown) for k, v in sources.items()} == pytest.approx(
        {"gold": 1, "verdict": 1 / 2, "product": 1 / 2}, abs=0.04
    )


def test_nothing_to_draw_from_is_an_error():
    with pytest.raises(ValueError, match="no step to examine"):
        BalancedSampler([])
