"""Draws of chains that an outcome reward model is trained on."""

import numpy as np
import pytest

from she_jax.rewards.orm.dataset import Outcome, OutcomeSampler, contrastive_pairs
from she_jax.types import Example, UserError


def outcome(uid, right):
    pair = Example(uid=uid, query="mug", product={"title": "mug"})
    return Outcome(example=pair, source="sft", tokens=(5,), text="mug", right=right)


def test_draws_of_pairs_are_a_correct_and_an_incorrect_chain_of_one_pair():
    pool = [outcome("a", True), outcome("b", False), outcome("b", True), outcome("b", True)]
    assert contrastive_pairs(pool) == ([([2, 3], [1])], 1, 0)
    drawn = OutcomeSampler(pool, "pairwise").draw(40, np.random.default_rng(0))
    assert [chain.right for chain in drawn] == [True, False] * 20
    assert {id(chain) for chain in drawn} == {id(chain) for chain in pool[1:]}
    drawn = OutcomeSampler(pool, "pointwise").draw(40, np.random.default_rng(0))
    assert {id(chain) for chain in drawn} == {id(chain) for chain in pool}
    with pytest.raises(UserError, match="no chains: raise"):
        OutcomeSampler([], "pointwise")
    with pytest.raises(UserError, match=r"no pair with a right and a wrong chain: raise orm\."):
        OutcomeSampler(pool[:2], "pairwise")
