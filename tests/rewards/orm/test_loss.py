"""The outcome reward model's score, losses and update: by hand, in micro-batches, on devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes import assert_trees_close, fresh_state

from she_jax.models.decoder import ModelConfig, build_model, init_params
from she_jax.models.sharding import make_mesh
from she_jax.rewards.orm.loss import (
    chain_scores,
    init_orm_params,
    make_orm_step,
    pairwise_loss,
    pointwise_loss,
)
from she_jax.rl.update import jit_update_step
from she_jax.types import LMOutput, OrmBatch

V, T = 16, 10
CONFIG = ModelConfig(vocab_size=V, dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn=16)


def lookup(params, tokens, positions):
    """The smallest language model: a token's hidden state is its row of the table."""
    del positions
    return LMOutput(hidden=params["table"][tokens], head=jnp.zeros((2, 1)))


def table():
    """Token 1 points one way, token 2 the other."""
    return {"table": jnp.array([[0.0, 0.0], [1.0, 0.0], [-2.0, 0.0]])}


@functools.cache
def model():
    return build_model(CONFIG)


def random_params(seed=0):
    key, other = jax.random.split(jax.random.PRNGKey(seed))
    params = init_orm_params(init_params(CONFIG, key), CONFIG.dim)
    return params | {"value": jax.random.normal(other, (CONFIG.dim,))}


def random_batch(rows=16, group_size=1, seed=0):
    """Chains of uneven length, padded on both sides."""
    rng = np.random.default_rng(seed)
    first, last = rng.integers(0, 3, rows), rng.integers(4, T, rows)
    slot = np.arange(T)
    real = (slot >= first[:, None]) & (slot <= last[:, None])
    right = np.tile([1.0, 0.0], rows // 2) if group_size == 2 else rng.integers(2, size=rows)
    return OrmBatch(
        tokens=jnp.asarray(rng.integers(0, V, (rows, T)), dtype=jnp.int32),
        positions=jnp.asarray(np.where(real, np.cumsum(real, axis=1) - 1, -1)),
        right=jnp.asarray(right, dtype=jnp.float32),
        group_size=group_size,
    )


@functools.cache
def compiled(micro_batches):
    step = make_orm_step(model().forward, optax.sgd(0.1), micro_batches=micro_batches)
    return jax.jit(step)


def test_a_score_is_read_at_the_last_token_of_the_chain():
    params = {"model": table(), "value": jnp.array([3.0, 5.0])}
    tokens = jnp.array([[1, 2, 0], [2, 2, 1], [0, 0, 2]])
    positions = jnp.array([[0, 1, -1], [0, 1, 2], [-1, 0, 1]])
    for score in (chain_scores, jax.jit(chain_scores, static_argnums=0)):
        np.testing.assert_array_equal(score(lookup, params, tokens, positions), [-6.0, 3.0, -6.0])


def test_the_initial_probability_of_every_chain_is_one_half():
    batch = random_batch()
    params = init_orm_params(init_params(CONFIG, jax.random.PRNGKey(0)), CONFIG.dim)
    scores = chain_scores(model().forward, params, batch.tokens, batch.positions)
    np.testing.assert_array_equal(jax.nn.sigmoid(scores), np.full(16, 0.5))


def test_padding_and_its_tokens_change_no_score():
    batch = random_batch()
    tokens = np.where(batch.positions < 0, (batch.tokens + 3) % V, batch.tokens)
    wide = [
        jnp.pad(jnp.asarray(x), ((0, 0), (2, 3)), constant_values=fill)
        for x, fill in ((tokens, 5), (batch.positions, -1))
    ]
    read = jax.jit(functools.partial(chain_scores, model().forward))
    want = read(random_params(), batch.tokens, batch.positions)
    np.testing.assert_allclose(read(random_params(), *wide), want, rtol=1e-5, atol=1e-6)


def test_pointwise_loss_by_hand():
    """A score of log 3 is a probability of 3/4, one of -log 3 of 1/4."""
    scores = jnp.log(jnp.array([3.0, 3.0, 1 / 3]))
    right = jnp.array([1.0, 0.0, 0.0])
    for loss in (pointwise_loss, jax.jit(pointwise_loss)):
        total, count = loss(scores, right)
        np.testing.assert_allclose(total, -np.log(0.75) - np.log(0.25) - np.log(0.75), rtol=1e-6)
        assert count == 3
    gradient = jax.grad(lambda s: pointwise_loss(s, right)[0])(scores)
    np.testing.assert_allclose(gradient, [-0.25, 0.75, 0.25], rtol=1e-5)


def test_pairwise_loss_by_hand():
    chosen, rejected = jnp.log(jnp.array([6.0, 2.0])), jnp.log(jnp.array([2.0, 6.0]))
    for loss in (pairwise_loss, jax.jit(pairwise_loss)):
        total, count = loss(chosen, rejected)
        np.testing.assert_allclose(total, -np.log(0.75) - np.log(0.25), rtol=1e-6)
        assert count == 2
        np.testing.assert_allclose(loss(chosen + 7, rejected + 7)[0], total, rtol=1e-5)
    gradient = jax.grad(lambda s: pairwise_loss(s, rejected)[0])(chosen)
    np.testing.assert_allclose(gradient, [-0.25, -0.75], rtol=1e-5)


def test_losses_of_extreme_scores_are_finite():
    extreme = jnp.array([1e4, -1e4])
    for loss in (pointwise_loss, pairwise_loss):
        value, gradient = jax.value_and_grad(lambda s, loss=loss: loss(s, extreme * 0)[0])(extreme)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("group_size", "gradient"), [(1, [0.75, 0.0]), (2, [1.5, 0.0])])
def test_one_update_by_hand(group_size, gradient):
    """At scores of 0 the value gains h/2 of a correct chain and loses h/2 of an incorrect one; of a
    pair it gains half of the difference. The model stays, for the value is 0."""
    optimizer = optax.sgd(1.0)
    batch = OrmBatch(
        tokens=jnp.array([[1, 1], [1, 2]]),
        positions=jnp.array([[0, -1], [0, 1]]),
        right=jnp.array([1.0, 0.0]),
        group_size=group_size,
    )
    state = fresh_state(init_orm_params(table(), 2), optimizer)
    new, metrics = jax.jit(make_orm_step(lookup, optimizer))(state, batch)
    np.testing.assert_allclose(new.params["value"], gradient, rtol=1e-6)
    np.testing.assert_array_equal(new.params["model"]["table"], table()["table"])
    assert set(metrics) == {"loss", "accuracy", "grad_norm", "tokens"}
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], gradient[0], rtol=1e-6)
    assert metrics["tokens"] == 3
    assert metrics["accuracy"] == (
        0.5 if group_size == 1 else 0.0
    )  # a tie is not a correct ranking
    assert new.step == 1


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_equal_the_full_batch(group_size, micro_batches):
    state, batch = fresh_state(random_params(), optax.sgd(0.1)), random_batch(group_size=group_size)
    whole, parts = (compiled(n)(state, batch) for n in (1, micro_batches))
    assert_trees_close(parts, whole, rtol=1e-4, atol=2e-5)  # gradients are near 100


@pytest.mark.parametrize("group_size", [1, 2])
def test_eight_devices_equal_one(group_size):
    batch = random_batch(group_size=group_size)
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = make_mesh(data=-1, fsdp=2 if len(devices) > 1 else 1, devices=devices)
        state = fresh_state(random_params(), optax.sgd(0.1))
        step = make_orm_step(model().forward, optax.sgd(0.1), micro_batches=2)
        results.append(jax.device_get(jit_update_step(step, mesh, state)(state, batch)))
    assert_trees_close(results[1], results[0], rtol=1e-4, atol=2e-5)  # gradients are near 100


def test_training_learns_an_outcome_that_depends_on_the_last_token():
    batch = random_batch(32)
    last = jnp.argmax(batch.positions, axis=1)
    right = jnp.take_along_axis(batch.tokens, last[:, None], axis=1)[:, 0] < V // 2
    batch = OrmBatch(**vars(batch) | {"right": right.astype(jnp.float32)})
    optimizer = optax.adam(0.03)
    step = jax.jit(make_orm_step(model().forward, optimizer))
    state = fresh_state(random_params(), optimizer)
    for _ in range(60):
        state, metrics = step(state, batch)
    assert metrics["accuracy"] == 1
    assert metrics["loss"] < 0.1


def test_errors():
    with pytest.raises(ValueError, match="micro_batches=0: expected at least 1"):
        make_orm_step(lookup, optax.sgd(1.0), micro_batches=0)
    state, batch = fresh_state(random_params(), optax.sgd(0.1)), random_batch(12, group_size=2)
    with pytest.raises(ValueError, match="12 rows in groups of 2 do not divide into micro_batches"):
        make_orm_step(model().forward, optax.sgd(0.1), micro_batches=4)(state, batch)
