"""The prompt pool: sampling weights by pass rate, and the same order after a restart."""

import json
from collections import Counter

import numpy as np
import pytest

from she_jax.data.curriculum import LEAST, PromptPool, difficulty_weight
from she_jax.types import Example

EXAMPLES = [
    Example(uid=f"u{n}", query=f"q{n}", product={"title": "t"}, label=1 + (n >= 90))
    for n in range(100)
]


def draw_uids(pool, count):
    return [[example.uid for example in pool.draw()] for _ in range(count)]


@pytest.mark.parametrize(
    ("difficulty", "expected"),
    [
        ("even", [1, 1, 1, 1, 1]),
        ("easy", [0, 2**-0.5, 1, 1, 1]),
        ("medium", [0, 2**-0.5, 1, 2**-0.5, 0]),
        ("hard", [0.25, 1, 1, 2**-0.5, 0]),
    ],
)
def test_difficulty_weights_by_hand(difficulty, expected):
    rates = np.array([0, 0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(difficulty_weight(rates, difficulty), expected, atol=1e-12)


def test_an_unknown_difficulty_lists_the_known_ones():
    with pytest.raises(ValueError, match="difficulty='soft': expected one of"):
        PromptPool(EXAMPLES, 4, seed=0, difficulty="soft")


def test_even_draws_every_prompt_once_an_epoch_and_keeps_no_rates():
    pool = PromptPool(EXAMPLES, 10, seed=3)
    pool.learn(EXAMPLES[:2], [0.0, 1.0])
    assert pool.state == {"position": 0, "rates": {}}
    assert {uid for batch in draw_uids(pool, 10) for uid in batch} == {e.uid for e in EXAMPLES}


def test_prompts_are_drawn_by_weight_and_never_twice_in_a_batch():
    rates = {f"u{n}": 1.0 if n < 50 else 0.5 for n in range(100)}
    pool = PromptPool(EXAMPLES, 10, seed=0, difficulty="medium", rates=rates)
    batches = draw_uids(pool, 400)
    assert all(len(set(batch)) == 10 for batch in batches)
    counts = Counter(int(uid[1:]) < 50 for batch in batches for uid in batch)
    assert 0 < counts[True] / counts[False] < 2 * LEAST


def test_new_pass_rates_change_the_weights():
    pool = PromptPool(EXAMPLES, 10, seed=0, difficulty="medium", rates={"u0": 0.5})
    assert pool.weights()[0] == pool.weights()[1] == 1.0  # never measured: the largest weight
    pool.learn(EXAMPLES[:2], [1.0, 1.0])
    # u0 had 0.5 before, so its running rate is 0.75; u1 is new, so it is 1.
    assert pool.state["rates"] == {"u0": 0.75, "u1": 1.0}
    np.testing.assert_allclose(pool.weights()[:3], [2**-0.5, LEAST, 1.0])


@pytest.mark.parametrize("difficulty", ["even", "hard"])
def test_a_restored_pool_draws_the_same_batches(difficulty):
    def draw_and_learn(pool):
        uids = []
        for _ in range(6):
            batch = pool.draw()
            pool.learn(batch, [int(example.uid[1:]) % 5 / 4 for example in batch])
            uids.append([example.uid for example in batch])
        return uids

    whole = PromptPool(EXAMPLES, 8, seed=1, difficulty=difficulty)
    first = draw_and_learn(whole)
    state = json.loads(json.dumps(whole.state))
    rest = draw_and_learn(whole)
    other = PromptPool(EXAMPLES, 8, seed=1, difficulty=difficulty)
    other.restore(state)
    assert draw_and_learn(other) == rest != first
    assert other.state == whole.state


def test_balance_holds_when_one_label_has_easier_prompts():
    """A label whose prompts are all easy is drawn as often as one whose prompts are not."""
    rates = {example.uid: 0.875 if example.label == 1 else 0.5 for example in EXAMPLES}
    pool = PromptPool(EXAMPLES, 2, seed=0, difficulty="medium", balance=True, rates=rates)
    uids = Counter(uid for batch in draw_uids(pool, 1_000) for uid in batch)
    second = sum(count for uid, count in uids.items() if int(uid[1:]) >= 90)
    assert second / 2_000 == pytest.approx(0.5, abs=0.04)


def test_balance_draws_the_labels_in_equal_shares():
    pool = PromptPool(EXAMPLES, 10, seed=0, difficulty="medium", balance=True)
    labels = Counter(example.label for _ in range(300) for example in pool.draw())
    # Without repetition in a batch the ten of label 2 fall a little short of one half.
    assert 0.3 < labels[2] / labels.total() < 0.5


def test_a_small_pool_repeats_and_an_empty_one_is_an_error():
    pool = PromptPool(EXAMPLES[:3], 8, seed=0, difficulty="hard")
    assert len(pool.draw()) == 8
    with pytest.raises(ValueError, match="no examples"):
        PromptPool([], 8, seed=0, difficulty="hard")
    unlabeled = [Example(uid="a", query="q", product={"title": "t"})]
    with pytest.raises(ValueError, match="no example has a label"):
        PromptPool(unlabeled, 1, seed=0, difficulty="hard", balance=True).draw()
