"""Which pairs are annotated: quotas by hand, whole numbers, doubt, and a choice that covers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from she_jax.annotation.quotas import (
    OTHER,
    apportion,
    categories,
    cell_errors,
    choose,
    deciding_step,
    doubt,
    entropy,
    quotas,
)
from she_jax.cot import CotSchema
from she_jax.types import Example


def test_the_quotas_of_four_cells_by_hand():
    wanted = quotas(np.array([0.4, 0.1, 0.05, 0.25]), 100)
    assert wanted == pytest.approx([43.75, 15.625, 10.9375, 29.6875])
    assert apportion(wanted, np.full(4, 100), 100).tolist() == [44, 15, 11, 30]


def test_without_errors_the_quotas_are_even():
    assert quotas(np.zeros(4), 10) == pytest.approx([2.5] * 4)


def test_the_coverage_of_four_cells_by_hand():
    assert entropy([0.3, 0.3, 0.3, 0.1]) == pytest.approx(1.31383, abs=1e-5)
    assert entropy([0.25] * 4) == pytest.approx(1.38629, abs=1e-5)
    assert entropy([1.0, 0.0]) == 0


CELLS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 30)), min_size=1, max_size=12)


@given(CELLS, st.integers(1, 200))
def test_whole_numbers_sum_to_what_is_asked_and_no_cell_gives_more_than_it_has(cells, n):
    wanted, available = quotas(np.array([e for e, _ in cells]), n), np.array([a for _, a in cells])
    counts = apportion(wanted, available, n)
    assert counts.sum() == min(n, available.sum())
    assert (counts <= available).all()
    assert (counts >= np.minimum(np.floor(wanted - 1e-6), available)).all()


def test_what_a_full_cell_cannot_take_goes_to_the_others_in_proportion():
    counts = apportion(np.array([60.0, 30, 10]), np.array([20, 100, 100]), 100)
    assert counts.tolist() == [20, 60, 20]


@pytest.mark.parametrize(
    ("category", "attributes", "step"),
    [
        ("match", "met", ""),
        ("match", "conflict", "attributes"),
        ("near", "conflict", "category"),
        (None, "unstated", "attributes"),
        (None, None, ""),
    ],
)
def test_the_first_verdict_that_is_not_the_best_decides(category, attributes, step):
    verdicts = {"category": category, "attributes": attributes, "label": "1"}
    assert deciding_step(verdicts, CotSchema.build()) == step


def test_the_category_is_the_head_of_the_first_field_that_says_it():
    def pair(**product):
        return Example(uid="", query="", product={"title": "t", **product})

    named = [pair(Category="Lamps > Floor lamps"), pair(Category="Sofas / Corner"), pair()]
    assert categories(named) == ["Lamps", "Sofas", ""]
    many = [pair(product_type=f"type {n}") for n in range(20)]
    assert categories([*many, *many[:5]]).count(OTHER) == 8
    assert categories([pair(color="red")]) == [""]


def test_errors_of_rare_cells_are_drawn_toward_the_mean():
    a, b = ("", "a", ""), ("", "b", "")
    errors = cell_errors([a] * 96 + [b] * 4, [0.0] * 48 + [1.0] * 48 + [1.0] * 4)
    assert errors[a] == pytest.approx((48 + 4 * 0.52) / 100)
    assert errors[b] == pytest.approx((4 + 4 * 0.52) / 8)


def test_an_unread_chain_is_in_more_doubt_than_divided_votes_and_these_than_one_voice():
    def line(label, shares, confidence):
        return {"label": label, "probabilities": shares, "confidence": confidence}

    doubts = [
        doubt(line(3, None, None)),
        doubt(line(3, {"3": 1.0, "4": 0.0}, 1.0)),
        doubt(line(3, {"3": 0.5, "4": 0.5}, 0.5)),
        doubt(line(3, {"2": 0.25, "3": 0.5, "4": 0.25}, 0.5)),
        doubt(line(None, {"2": 0.4, "3": 0.3, "4": 0.3}, None)),
        doubt(line(None, None, None)),
    ]
    assert doubts == sorted(doubts)
    assert doubts[0] == doubts[1] == (0, 0)


def test_every_beginning_of_the_choice_covers_the_cells_with_their_most_doubtful_pairs():
    a, b, c = ("", "a", ""), ("", "b", ""), ("", "c", "")
    cells = [a] * 50 + [b] * 50 + [c] * 2
    doubts = [(n % 50 / 50, 0.0) for n in range(100)] + [(0.0, 0.0), (0.9, 0.0)]
    errors = {a: 0.6, b: 0.2, c: 0.0}
    chosen = choose(cells, doubts, errors, 40)
    assert len(set(chosen)) == 40
    assert [[cells[k] for k in chosen].count(cell) for cell in (a, b, c)] == [27, 11, 2]
    assert sorted(k for k in chosen if k < 50) == list(range(23, 50))
    for n in (10, 20, 30):  # whoever stops early has nearly these shares
        assert abs([cells[k] for k in chosen[:n]].count(a) - n * 27 / 40) <= 1.5
    assert choose(cells, doubts, errors, 1000) == choose(cells, doubts, errors, 1000)
    assert sorted(choose(cells, doubts, {}, 1000)) == list(range(102))
    assert choose([], [], {}, 5) == []
