"""Batches by position."""

from collections import Counter

import pytest

from she_jax.data.loader import batches
from she_jax.types import Example

LABELS = [1] * 4 + [2] * 8 + [3] * 16 + [4] * 36
EXAMPLES = [
    Example(uid=str(i), query="q", product={"title": "t"}, label=label)
    for i, label in enumerate(LABELS)
]


def uids(batch):
    return [example.uid for example in batch]


def test_trap_11_the_order_is_a_function_of_seed_and_position():
    """A position restores the series: no cursor, no shuffling buffer to forget."""
    first, again = batches(EXAMPLES, 8, seed=3), batches(EXAMPLES, 8, seed=3)
    order = [uids(first[i]) for i in range(20)]
    assert [uids(again[i]) for i in (17, 2, 17)] == [order[17], order[2], order[17]]
    assert uids(batches(EXAMPLES, 8, seed=4)[0]) != order[0]


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    series = batches(EXAMPLES, 8, seed=0)
    epochs = [[uid for i in range(e * 8, e * 8 + 8) for uid in uids(series[i])] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(e.uid for e in EXAMPLES)
    assert epochs[0] != epochs[1]


def test_seeds_share_no_order():
    """Nor do the labels of one seed: in no epoch does one repeat an order of another."""
    orders = set()
    for seed in range(4):
        series = batches(EXAMPLES, 8, seed=seed)
        orders |= {
            tuple(uid for i in range(e * 8, e * 8 + 8) for uid in uids(series[i])) for e in range(4)
        }
    assert len(orders) == 16


def test_balance_draws_the_labels_in_equal_shares():
    series = batches(EXAMPLES, 8, seed=0, balance=True)
    drawn = Counter(e.label for i in range(10) for e in series[i])
    assert drawn == {1: 20, 2: 20, 3: 20, 4: 20}
    rare = Counter(e.uid for i in range(8) for e in series[i] if e.label == 1)
    assert set(rare.values()) == {4}


def test_a_source_without_usable_examples_is_an_error():
    with pytest.raises(ValueError, match="split is empty"):
        batches([], 8, seed=0)
    unlabeled = [Example(uid="0", query="q", product={"title": "t"})]
    with pytest.raises(ValueError, match="no example has a label"):
        batches(unlabeled, 1, seed=0, balance=True)
