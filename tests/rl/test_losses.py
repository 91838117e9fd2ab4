"""Losses: golden values, gradients, masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from she_jax.rl import losses
from she_jax.rl.logprobs import token_logps
from she_jax.rl.losses import (
    LossConfig,
    dpo_loss,
    loss_denominators,
    policy_loss,
    sft_loss,
    token_weights,
)
from she_jax.types import TrainBatch

B, T, V = 3, 9, 7


def random_batch(seed=0):
    rng = np.random.default_rng(seed)
    fields = {
        "tokens": rng.integers(0, V, (B, T)),
        "positions": np.tile(np.arange(T), (B, 1)),
        "loss_weights": (rng.random((B, T)) < 0.7).astype(np.float32),
        "advantages": rng.normal(size=(B, T)).astype(np.float32),
        "old_logps": -rng.random((B, T)).astype(np.float32),
        "ref_logps": -rng.random((B, T)).astype(np.float32),
        "kl_coef": np.float32(0.1),
    }
    return TrainBatch(**{name: jnp.asarray(field) for name, field in fields.items()})


MASK = np.array([[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]], dtype=bool)
IDS = np.array([[-1, 0, 0, 0, 7, -1], [-1, 7, 7, -1, -1, -1]])


@pytest.mark.parametrize(
    ("aggregation", "want"),
    [
        ("token", [[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]]),
        ("sequence", [[0, 0.2, 0.2, 0.2, 0.2, 0.2], [0, 0.5, 0.5, 0, 0, 0]]),
        # Three steps in the first row: 0 with three tokens, 7 with one, outside of steps one token.
        ("step", [[0, 1 / 3, 1 / 3, 1 / 3, 1, 1], [0, 0.5, 0.5, 0, 0, 0]]),
        ("constant", [[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]]),
    ],
)
def test_token_weights_by_hand(aggregation, want):
    np.testing.assert_allclose(token_weights(MASK, IDS, aggregation), want, rtol=1e-6)
    more = (np.pad(MASK, ((0, 0), (0, 3))), np.pad(IDS, ((0, 0), (0, 3)), constant_values=-1))
    padded = token_weights(*more, aggregation)
    np.testing.assert_allclose(padded, np.pad(want, ((0, 0), (0, 3))), rtol=1e-6)


def test_token_weights_of_an_empty_mask_are_zero():
    for aggregation in losses.AGGREGATIONS:
        assert not np.any(token_weights(np.zeros_like(MASK), IDS, aggregation))


def test_an_unknown_aggregation_lists_the_choices():
    with pytest.raises(ValueError, match=r"aggregation='batch': expected one of .*'sequence'"):
        token_weights(MASK, IDS, "batch")


def test_the_constant_denominator_is_the_maximum_completion_length():
    np.testing.assert_array_equal(loss_denominators(3, 40, "constant"), [40.0, 40.0, 40.0])
    for aggregation in ("token", "sequence", "step"):
        assert loss_denominators(3, 40, aggregation) is None


def test_the_denominator_changes_only_the_count():
    batch = random_batch()
    logps = batch.old_logps + 0.3
    (total, count), metrics = policy_loss(logps, batch, LossConfig())
    np.testing.assert_allclose(count, batch.loss_weights.sum())
    constant = dataclasses.replace(batch, denominator=jnp.array([8.0, 8.0, 9.0]))
    (constant_total, constant_count), constant_metrics = policy_loss(logps, constant, LossConfig())
    assert constant_count == 25
    assert constant_total == total
    assert constant_metrics == metrics


def test_policy_loss_by_hand():
    """Ratios 2 and 1/2, each with a positive and a negative advantage; clip at 0.8 and 1.4."""
    log2 = np.log(2.0, dtype=np.float32)
    batch = TrainBatch(
        tokens=jnp.zeros((1, 5), dtype=jnp.int32),
        positions=jnp.arange(5)[None],
        loss_weights=jnp.array([[0.0, 1.0, 1.0, 2.0, 1.0]]),
        advantages=jnp.array([[9.0, 1.0, -1.0, 1.0, -1.0]]),
        old_logps=jnp.full((1, 5), -3.0),
        ref_logps=jnp.full((1, 5), -3.0),
        kl_coef=0.5,
    )
    logps = jnp.array([[9.0, -3 + log2, -3 + log2, -3 - log2, -3 - log2]])
    (total, count), metrics = policy_loss(logps, batch, LossConfig(clip_low=0.2, clip_high=0.4))
    # -min(2, 1.4), -min(-2, -1.4), -min(0.5, 0.8), -min(-0.5, -0.8)
    pg = -1.4 + 2.0 - 2 * 0.5 + 0.8
    # Toward the reference: log-ratio -log 2 twice, then +log 2.
    kl = 2 * (0.5 + log2 - 1) + 3 * (2 - log2 - 1)
    want = {
        "pg_loss": pg,
        "kl": kl,
        "ratio": 2 + 2 + 2 * 0.5 + 0.5,
        "clip_low": 1.0,
        "clip_high": 1.0,
        "logp_gap": 5 * log2,
        "logp_gap_max": log2,
    }
    assert set(metrics) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(total, pg + 0.5 * kl, rtol=1e-5)
    np.testing.assert_allclose(count, 5)


def test_on_policy_gradient_is_the_policy_gradient():
    """At ratio 1 without a KL term the gradient by logps is -w * A."""
    batch = dataclasses.replace(random_batch(), ref_logps=None)
    grads = jax.grad(lambda logps: policy_loss(logps, batch, LossConfig())[0][0])(batch.old_logps)
    np.testing.assert_allclose(grads, -batch.loss_weights * batch.advantages, rtol=1e-6)


def test_imitated_tokens_have_the_gradient_of_the_weighted_cross_entropy():
    """Whatever the log-probabilities of the behavior policy and of the reference are."""
    batch = random_batch()
    logps = batch.old_logps + jax.random.normal(jax.random.PRNGKey(3), (B, T))
    imitation_mask = jnp.asarray(np.tile(np.arange(T) % 2 == 0, (B, 1)))

    def graded(batch):
        def loss(logps):
            (total, count), metrics = policy_loss(logps, batch, LossConfig())
            return total, (count, metrics)

        (total, (count, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(logps)
        return total, count, metrics, grads

    total, count, metrics, grads = graded(dataclasses.replace(batch, imitation_mask=imitation_mask))
    plain = graded(batch)
    want = jnp.where(imitation_mask, -batch.loss_weights * batch.advantages, plain[3])
    np.testing.assert_allclose(grads, want, rtol=1e-5)
    np.testing.assert_allclose(count, plain[1])
    # Metrics: those of the other tokens; an imitated one adds a ratio of 1 and a pg_loss of -A.
    rest = dataclasses.replace(batch, loss_weights=batch.loss_weights * ~imitation_mask)
    others = graded(rest)[2]
    imitated = {"ratio": (batch.loss_weights * imitation_mask).sum()}
    imitated["pg_loss"] = -(batch.loss_weights * imitation_mask * batch.advantages).sum()
    for name in metrics:
        np.testing.assert_allclose(
            metrics[name], others[name] + imitated.get(name, 0), rtol=1e-5, err_msg=name
        )
    np.testing.assert_allclose(total, metrics["pg_loss"] + 0.1 * metrics["kl"], rtol=1e-5)
    for field in ("old_logps", "ref_logps"):
        other = jnp.where(imitation_mask, jnp.nan, getattr(batch, field))
        same = graded(dataclasses.replace(batch, imitation_mask=imitation_mask, **{field: other}))
        np.testing.assert_array_equal(same[3], grads)


def test_an_empty_imitation_mask_is_the_plain_loss():
    batch = random_batch()
    logps = batch.old_logps + 0.3
    empty = dataclasses.replace(batch, imitation_mask=jnp.zeros((B, T), bool))
    plain, masked = (policy_loss(logps, rows, LossConfig()) for rows in (batch, empty))
    assert jax.tree.map(float, plain) == jax.tree.map(float, masked)


def test_policy_loss_gradient_equals_the_naive_formula():
    batch = random_batch()
    config = LossConfig(clip_low=0.1, clip_high=0.3)
    logps = batch.old_logps + jax.random.normal(jax.random.PRNGKey(3), (B, T)) / 4

    def naive(logps):
        ratio = jnp.exp(logps - batch.old_logps)
        pg = jnp.minimum(ratio * batch.advantages, jnp.clip(ratio, 0.9, 1.3) * batch.advantages)
        back = batch.ref_logps - logps
        return (batch.loss_weights * (0.1 * (jnp.exp(back) - back - 1) - pg)).sum()

    def ours(logps):
        return policy_loss(logps, batch, config)[0][0]

    np.testing.assert_allclose(ours(logps), naive(logps), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(logps), jax.grad(naive)(logps), rtol=1e-4, atol=1e-6)
    check_grads(
        lambda x: ours(jnp.asarray(x)), (logps,), order=1, modes=["rev"], rtol=1e-2, eps=1e-3
    )


def test_policy_loss_jitted_equals_eager():
    batch = random_batch()
    logps = batch.old_logps + 0.3
    eager = policy_loss(logps, batch, LossConfig())
    jitted = jax.jit(policy_loss, static_argnums=2)(logps, batch, LossConfig())
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e30])
def test_masked_tokens_change_nothing(junk):
    """Whatever the values are where the weight is 0: neither the loss nor the gradient changes."""
    batch = random_batch()
    masked = batch.loss_weights == 0
    dirty = dataclasses.replace(
        batch,
        **{
            name: jnp.where(masked, junk, getattr(batch, name))
            for name in ("advantages", "old_logps", "ref_logps")
        },
    )

    def total(logps, batch):
        (total, _), metrics = policy_loss(logps, batch, LossConfig())
        return total, metrics

    logps = batch.old_logps + 0.1
    clean = jax.value_and_grad(total, has_aux=True)(logps, batch)
    spoilt = jax.value_and_grad(total, has_aux=True)(jnp.where(masked, junk, logps), dirty)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(spoilt), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_policy_far_from_the_behavior_policy_stays_finite():
    """exp(500) would be inf."""
    batch = random_batch()
    for shift in (-500.0, 500.0):
        (total, _), metrics = policy_loss(batch.old_logps + shift, batch, LossConfig())
        assert np.all(np.isfinite([total, *metrics.values()]))


def test_sft_loss_by_hand():
    logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0], [1.0, 1.0]]]))
    weights = np.array([[0.0, 2.0, 1.0]], dtype=np.float32)
    logps, _ = token_logps(logits, jnp.array([[0, 1, 0]]))
    total, count = sft_loss(logps, weights)
    np.testing.assert_allclose(total, -2 * np.log(3 / 4) + np.log(2), rtol=1e-6)
    assert count == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_low": 0.0}, "clip_low=0.0: expected a value in"),
        ({"clip_low": 1.5}, "clip_low=1.5: expected a value in"),
        ({"clip_high": -0.1}, "clip_high=-0.1: expected a value above 0"),
        ({"micro_batches": 0}, "micro_batches=0: expected at least 1"),
    ],
)
def test_loss_config_checks_its_values(change, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**change)


def test_dpo_loss_by_hand():
    """beta 1/2: rewards log 3 and 0, then 0 and log 3: the odds are 3/4 and 1/4."""
    chosen, rejected = jnp.array([-5 + 2 * np.log(3), -7.0]), jnp.array([-6.0, -8 + 2 * np.log(3)])
    reference = np.array([-5.0, -7.0], dtype=np.float32), np.array([-6.0, -8.0], dtype=np.float32)
    for loss in (dpo_loss, jax.jit(dpo_loss)):
        (total, count), metrics = loss(chosen, rejected, *reference, beta=0.5)
        np.testing.assert_allclose(total, -np.log(3 / 4) - np.log(1 / 4), rtol=1e-5)
        assert count == 2
        want = {"accuracy": 1, "margin": 0, "chosen": np.log(3), "rejected": np.log(3)}
        assert set(metrics) == set(want)
        for name, value in want.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_dpo_gradient_by_hand():
    """-beta times the probability of a wrong ranking (equation 8's weight); rejected: plus."""
    chosen = jnp.array([-5 + 2 * np.log(3), -7.0])
    rejected = jnp.array([-6.0, -8 + 2 * np.log(3)])
    reference = jnp.array([-5.0, -7.0]), jnp.array([-6.0, -8.0])
    grads = jax.grad(lambda *pair: dpo_loss(*pair, *reference, beta=0.5)[0][0], (0, 1))
    for got, sign in zip(grads(chosen, rejected), (-1, 1), strict=True):
        np.testing.assert_allclose(got, sign * 0.5 * np.array([1 / 4, 3 / 4]), rtol=1e-5)


def test_dpo_starts_at_log_two_and_stays_finite():
    """At the reference the margin is 0, which is not correct; far from it all is finite."""
    logps = jnp.array([-3.0, -40.0])
    (total, _), metrics = dpo_loss(logps, logps - 1, logps, logps - 1, beta=0.1)
    np.testing.assert_allclose(total, 2 * np.log(2), rtol=1e-6)
    assert all(value == 0 for value in metrics.values())
    for shift in (-1e5, 1e5):
        value, grads = jax.value_and_grad(
            lambda chosen: dpo_loss(chosen, logps, logps, logps, beta=1.0)[0][0]
        )(logps + shift)
        assert np.isfinite(value)
        assert np.isfinite(grads).all()


def test_swapping_the_pairs_of_dpo_adds_the_margins():
    """-log sigmoid(-x) = x - log sigmoid(x)."""
    rng = np.random.default_rng(0)
    chosen, rejected, ref_chosen, ref_rejected = (
        jnp.asarray(rng.normal(size=6), dtype=jnp.float32) for _ in range(4)
    )
    (total, _), metrics = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.7)
    (swapped_total, _), swapped = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta=0.7)
    np.testing.assert_allclose(swapped_total, total + metrics["margin"], rtol=1e-5)
    np.testing.assert_allclose(swapped["margin"], -metrics["margin"], rtol=1e-5, atol=1e-6)
    assert swapped["accuracy"] == 6 - metrics["accuracy"]
