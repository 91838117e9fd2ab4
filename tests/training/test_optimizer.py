"""The optimizer's schedule."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest

from she_jax.training.optimizer import OptimizerConfig, make_optimizer


def updates(steps, warmup, final_share=0.25):
    """The sizes of the updates for a constant gradient: with Adam, the learning rates."""
    config = OptimizerConfig(
        learning_rate=1.0,
        final_share=final_share,
        warmup=warmup,
        b1=0.0,
        b2=0.0,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    optimizer, params = make_optimizer(config, steps), jnp.ones(1)
    state, sizes = optimizer.init(params), []
    for _ in range(steps):
        update, state = optimizer.update(jnp.ones(1), state, params)
        sizes.append(-float(update[0]))
    return sizes


def test_the_warm_up_begins_above_zero_and_the_cosine_falls_toward_its_share():
    sizes = updates(steps=9, warmup=4)
    np.testing.assert_allclose(sizes[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-5)
    assert all(late < early for early, late in pairwise(sizes[4:]))
    assert 0.25 < sizes[-1] < 0.4


@pytest.mark.parametrize("warmup", [0, 1, 9])
def test_no_update_of_a_short_run_is_zero(warmup):
    assert min(updates(steps=3, warmup=warmup, final_share=0.0)) > 0


def test_a_single_update_has_the_peak():
    assert updates(steps=1, warmup=4) == [pytest.approx(1.0, rel=1e-5)]
