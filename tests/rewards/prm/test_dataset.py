"""Training data of a process reward model: labels, corruptions, and balanced draws."""

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
def test_a_correct_rationale_earns_every_reward(checks):
    schema = CotSchema.build(checks=checks)
    for example in generate(World(pairs=(60, 0, 0, 0), checks=checks), "train"):
        right = with_correct_rationale(example, schema, {})
        assert right is not None
        chain = schema.parse(str(right.rationale))
        rewards, known = verify(chain, example, schema)
        assert chain.well_formed
        assert rewards[known].min() == 1
        names = {name for name, step in zip(schema.names, chain.steps, strict=True) if step}
        assert names == {*example.annotations, "label"}


def test_a_correct_rationale_keeps_the_evidence_of_correct_steps():
    whole = fully_annotated(LAMP)
    taught = label_steps(CHAIN, whole, SCHEMA, "teacher", "a/demonstration")
    assert correct_evidence(taught) == {}  # its only readable verdict with a text is wrong
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


def test_without_a_full_annotation_there_is_no_correct_rationale():
    unlabeled = dataclasses.replace(fully_annotated(LAMP), label=None)
    for example in (LAMP, unlabeled):
        assert with_correct_rationale(example, SCHEMA, {}) is None


@pytest.fixture(scope="module")
def pairs():
    return list(generate(World(pairs=(300, 0, 0, 0)), "train"))


@pytest.fixture(scope="module")
def queries(pairs):
    """The step queries of all rationales; each pair borrows wrong text from another."""
    rng = np.random.default_rng(0)
    shifted = [*pairs[7:], *pairs[:7]]
    return [
        query
        for pair, other in zip(pairs, shifted, strict=True)
        for query in rationale_step_queries(pair, other, SCHEMA, rng)
    ]


def last_step(query):
    """The step to be scored, parsed."""
    step = SCHEMA.parse(query.written).steps[SCHEMA.names.index(query.step)]
    assert step is not None
    return step


def test_only_annotated_steps_are_labeled():
    labeled = label_steps(CHAIN, LAMP, SCHEMA, POLICY, "a/0")
    assert [(query.step, query.correct) for query in labeled] == [
        ("query", True),
        ("category", False),
        ("label", True),
    ]
    assert {query.source for query in labeled} == {POLICY}
    assert {query.chain for query in labeled} == {"a/0"}
    # The critiques do not show the truth of the other steps either.
    critiques = [query.critique for query in labeled]
    assert critiques == ["table lamp; red", "near, not match", "near: 2"]


def test_with_a_full_annotation_only_the_unreadable_step_is_left_out():
    labeled = label_steps(CHAIN, fully_annotated(LAMP), SCHEMA, POLICY, "a/0")
    assert [query.step for query in labeled] == ["query", "product", "category", "label"]


def test_a_step_with_partial_credit_is_incorrect():
    chain = SCHEMA.parse("query: table lamp; blue")
    (query,) = label_steps(chain, LAMP, SCHEMA, POLICY, "")
    assert query.correct is False


def test_every_source_occurs_with_the_labels_it_stands_for(pairs, queries):
    by_uid = {pair.uid: pair for pair in pairs}
    seen = Counter(query.source for query in queries)
    assert {"gold", "teacher", *CORRUPTIONS} == seen.keys()
    assert min(seen.values()) > 20
    for query in queries:
        k = SCHEMA.names.index(query.step)
        chain = SCHEMA.parse(query.written)
        reward = verify(chain, by_uid[query.example.uid], SCHEMA)[0][k]
        assert query.correct == (query.source == "gold")
        assert last_step(query).valid
        if query.source == "reason":
            assert reward == 1  # the verifier reads the verdict alone
        elif SCHEMA.steps[k].verdicts and query.source == "product":
            assert reward == 1
        else:
            assert (reward == 1) == query.correct


def test_a_corrupted_step_differs_from_the_correct_one_in_its_way_only(queries):
    correct = {(q.example.uid, q.step): q for q in queries if q.source == "gold"}
    for query in queries:
        if query.source not in CORRUPTIONS:
            continue
        gold = correct[query.example.uid, query.step]
        # A critique compares verdicts or items; it does not mention the text before a verdict.
        silent = query.source in ("reason", "product") and query.step in ("category", "attributes")
        assert (query.critique == gold.critique) == silent
        assert query.critique.startswith(gold.critique)
        assert query.chain == gold.chain
        assert query.written.split("\n")[:-1] == gold.written.split("\n")[:-1]
        same_verdict = last_step(query).verdict == last_step(gold).verdict
        assert same_verdict == (query.source not in ("verdict", "evidence"))
        same_text = last_step(query).text == last_step(gold).text
        if query.source == "verdict":
            old, new = last_step(gold).verdict, last_step(query).verdict
            words = re.findall(r"\w+|\W", last_step(gold).text)
            assert last_step(query).text == "".join(new if word == old else word for word in words)
        else:
            assert query.source == "evidence" or not same_text


def test_truth_that_is_not_annotated_is_not_used():
    """ShopWorld keeps all truth; here it is overwritten where there is no annotation."""
    schema = CotSchema.build(checks=4)
    pairs = list(generate(World(pairs=(80, 0, 0, 0), checks=4, coverage=0.3), "train"))
    masked = []
    for pair in pairs:
        truth = {k: v if k in pair.annotations else "zebra" for k, v in (pair.steps or {}).items()}
        masked.append(dataclasses.replace(pair, steps=truth))

    def step_queries(pairs):
        for n in range(len(pairs) - 1):
            rng = np.random.default_rng(n)
            for query in rationale_step_queries(pairs[n], pairs[n + 1], schema, rng):
                yield query.step, query.written, query.correct, query.critique, query.source

    expected = list(step_queries(pairs))
    assert list(step_queries(masked)) == expected
    assert {source for *_, source in expected} == {"gold", "teacher", *CORRUPTIONS}


def test_borrowed_evidence_is_a_whole_step_of_another_pair(pairs, queries):
    """Its text and verdict agree with each other: only the pair shows that they are wrong."""
    written = [SCHEMA.parse(write_chain(p, SCHEMA, np.random.default_rng(0))) for p in pairs]
    steps = [step for chain in written for step in chain.steps if step is not None]
    borrowed = [last_step(query) for query in queries if query.source == "evidence"]
    assert {(s.text, s.verdict) for s in borrowed} <= {(s.text, s.verdict) for s in steps}


def test_a_reason_that_could_be_about_any_pair_is_not_borrowed():
    """In a data set without annotated steps: 'nothing is lacking' is no wrong reason."""
    texts = ["all as asked", "nothing is lacking", "nothing speaks against it"]
    plain = Example(uid="1", query="mug", product={"title": "mug"}, label=4)
    other = dataclasses.replace(plain, uid="2", query="blue cup", product={"title": "blue cup"})
    for seed in range(20):
        for query in rationale_step_queries(plain, other, SCHEMA, np.random.default_rng(seed)):
            if query.source == "reason":
                assert last_step(query).text not in texts


def test_draws_are_balanced_over_origins_steps_and_verdicts():
    """The policy's chains as they are; of a rationale's step, the correct or the corrupted one."""

    def query(chain, source, step, correct):
        return StepQuery(
            example=LAMP, step=step, written="", correct=correct, source=source, chain=chain
        )

    pool = [query(f"p{n}", POLICY, "label", n > 0) for n in range(4)]
    pool += [query("d", "gold", step, True) for step in ("query", "label")]
    pool += [query("d", "verdict", "label", False), query("d", "product", "query", False)]
    drawn = BalancedSampler(pool).draw(8_000, np.random.default_rng(0))
    chains = Counter(tuple(query.chain for query in chain) for chain in drawn)
    shares = {("d", "d"): 1 / 2} | {(f"p{n}",): 1 / 8 for n in range(4)}
    assert {k: v / 8_000 for k, v in chains.items()} == pytest.approx(shares, abs=0.02)
    rationales = [chain for chain in drawn if chain[0].chain == "d"]
    assert all([query.step for query in chain] == ["query", "label"] for chain in rationales)
    sources = Counter(query.source for chain in rationales for query in chain)
    assert {k: v / len(rationales) for k, v in sources.items()} == pytest.approx(
        {"gold": 1, "verdict": 1 / 2, "product": 1 / 2}, abs=0.04
    )


def test_without_step_queries_there_is_an_error():
    with pytest.raises(ValueError, match="no step to examine"):
        BalancedSampler([])
