"""Token log-probabilities and losses: golden values, gradients, masks, chunks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from she_jax.rl import losses
from she_jax.rl.losses import LossConfig, policy_loss, sft_loss, token_logps, token_weights
from she_jax.types import LMOutput, TrainBatch

B, T, D, V = 3, 9, 5, 7


def random_output(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.PRNGKey(seed), 3)
    output = LMOutput(
        hidden=jax.random.normal(keys[0], (B, T, D)).astype(dtype),
        head=jax.random.normal(keys[1], (D, V)).astype(dtype),
    )
    return output, jax.random.randint(keys[2], (B, T), 0, V)


def naive_logps(logits, tokens, temperature=1.0):
    """The definition, all at once."""
    table = jax.nn.log_softmax(logits / temperature, axis=-1)[:, :-1]
    chosen = jnp.take_along_axis(table, tokens[:, 1:, None], axis=-1)[:, :, 0]
    return jnp.pad(chosen, ((0, 0), (1, 0)))


def random_batch(seed=0):
    rng = np.random.default_rng(seed)
    fields = {
        "tokens": rng.integers(0, V, (B, T)),
        "positions": np.tile(np.arange(T), (B, 1)),
        "weights": (rng.random((B, T)) < 0.7).astype(np.float32),
        "advantages": rng.normal(size=(B, T)).astype(np.float32),
        "old_logps": -rng.random((B, T)).astype(np.float32),
        "ref_logps": -rng.random((B, T)).astype(np.float32),
        "kl_weight": np.float32(0.1),
    }
    return TrainBatch(**{name: jnp.asarray(field) for name, field in fields.items()})


def test_token_logps_by_hand():
    """The logits at 0 are 0, log 2, log 5: shares 1/8, 2/8, 5/8 for the token at 1."""
    logits = jnp.log(jnp.array([[[1.0, 2.0, 5.0], [1.0, 1.0, 2.0], [9.0, 9.0, 9.0]]]))
    logps, entropy = token_logps(logits, jnp.array([[0, 2, 1]]))
    np.testing.assert_allclose(logps, [[0, np.log(5 / 8), np.log(1 / 4)]], rtol=1e-6)
    p = np.array([1, 2, 5]) / 8
    np.testing.assert_allclose(entropy, [[0, -(p * np.log(p)).sum(), np.log(2) * 1.5]], rtol=1e-6)


def test_token_logps_by_hand_at_temperature_two():
    """Square roots of 1, 4, 25: shares 1/8, 2/8, 5/8."""
    logits = jnp.log(jnp.array([[[1.0, 4.0, 25.0], [1.0, 1.0, 1.0]]]))
    logps, _ = token_logps(logits, jnp.array([[0, 1]]), temperature=2.0)
    np.testing.assert_allclose(logps, [[0, np.log(2 / 8)]], rtol=1e-6)


@pytest.mark.parametrize(
    ("start", "positions_a_chunk"), [(1, 0), (1, 1), (1, 3), (4, 3), (4, 100), (T, 1)]
)
def test_chunks_equal_the_whole(monkeypatch, start, positions_a_chunk):
    """Values and both gradients, for chunks that divide the positions and chunks that do not."""
    monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * B * V * positions_a_chunk)
    output, tokens = random_output()
    weights = jax.random.normal(jax.random.PRNGKey(9), (B, T)).at[:, :start].set(0)

    def chunked(hidden, head):
        logps, entropy = token_logps(
            LMOutput(hidden=hidden, head=head), tokens, temperature=0.7, start=start
        )
        return (weights * logps).sum(), (logps, entropy)

    def whole(hidden, head):
        return (weights * naive_logps(hidden @ head, tokens, 0.7)).sum()

    args = (output.hidden, output.head)
    (_, (logps, entropy)), grads = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(*args)
    naive = naive_logps(output.hidden @ output.head, tokens, 0.7).at[:, :start].set(0)
    np.testing.assert_allclose(logps, naive, rtol=1e-5, atol=1e-6)
    _, by_logits = token_logps(output.hidden @ output.head, tokens, temperature=0.7, start=start)
    np.testing.assert_allclose(entropy, by_logits, rtol=1e-5, atol=1e-6)
    for got, want in zip(grads, jax.jit(jax.grad(whole, (0, 1)))(*args), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_gradient_agrees_with_finite_differences():
    output, tokens = random_output()

    def total(hidden, head):
        output = LMOutput(hidden=hidden, head=head)
        return token_logps(output, tokens, start=2)[0].sum()

    check_grads(jax.jit(total), (output.hidden, output.head), order=1, modes=["rev"], rtol=1e-2)


def test_trap_6_full_logits_never_exist(monkeypatch):
    """Forward and backward together need a few chunks' memory, a tenth of what [B, T, V] would."""
    monkeypatch.setattr(losses, "LOGITS_BYTES", 2 << 20)
    batch, time, vocab = 4, 512, 20_000
    output = LMOutput(hidden=jnp.zeros((batch, time, 8)), head=jnp.zeros((8, vocab)))
    tokens = jnp.zeros((batch, time), dtype=jnp.int32)

    def total(output):
        return token_logps(output, tokens, start=128)[0].sum()

    compiled = jax.jit(jax.grad(total)).lower(output).compile()
    held = compiled.memory_analysis().temp_size_in_bytes
    assert 0 < held < 4 * batch * (time - 128) * vocab / 10


def test_trap_6_positions_before_start_are_not_read():
    """NaN in the hidden states of the prompt reaches neither the values nor the gradients."""
    output, tokens = random_output()
    start = 4
    # The output at start - 1 predicts the token at start: that one is read.
    bad = output.hidden.at[:, : start - 1].set(jnp.nan)

    def total(hidden):
        return token_logps(LMOutput(hidden=hidden, head=output.head), tokens, start=start)[0].sum()

    assert np.isfinite(total(bad))
    grads = jax.grad(total)(bad)
    assert np.all(np.isfinite(grads))
    assert not np.any(np.asarray(grads)[:, : start - 1])


def test_bfloat16_hidden_gives_float32_statistics():
    output, tokens = random_output(dtype=jnp.bfloat16)
    logps, entropy = token_logps(output, tokens)
    assert logps.dtype == entropy.dtype == jnp.float32
    wide = LMOutput(hidden=output.hidden.astype(jnp.float32), head=output.head.astype(jnp.float32))
    np.testing.assert_allclose(logps, token_logps(wide, tokens)[0], rtol=1e-5, atol=1e-5)


def test_the_head_gradient_is_summed_in_float32(monkeypatch):
    """One bfloat16 sum over many chunks would lose the small ones: 256 + 1 = 256 there."""
    monkeypatch.setattr(losses, "LOGITS_BYTES", 1)
    time = 600
    output = LMOutput(
        hidden=jnp.ones((1, time, 1), dtype=jnp.bfloat16), head=jnp.zeros((1, 2), jnp.bfloat16)
    )
    tokens = jnp.zeros((1, time), dtype=jnp.int32)
    grads = jax.grad(lambda output: token_logps(output, tokens)[0].sum())(output)
    np.testing.assert_allclose(grads.head.astype(jnp.float32), [[299.5, -299.5]], rtol=1e-2)


def test_no_gradient_flows_through_the_entropy():
    output, tokens = random_output()
    for source in (output, output.hidden @ output.head):
        grads = jax.grad(lambda source: token_logps(source, tokens)[1].sum())(source)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_forbidden_tokens_keep_everything_finite():
    """A logit of -inf is a token that cannot come; 1e30 is one that must."""
    logits = jnp.zeros((1, 3, 4)).at[:, :, 3].set(-jnp.inf).at[:, 1, 0].set(1e30)
    tokens = jnp.array([[0, 1, 0]])

    def total(logits):
        logps, entropy = token_logps(logits, tokens)
        return logps.sum(), (logps, entropy)

    (_, (logps, entropy)), grads = jax.value_and_grad(total, has_aux=True)(logits)
    np.testing.assert_allclose(logps, [[0, -np.log(3), 0]], rtol=1e-6)
    np.testing.assert_allclose(entropy, [[0, np.log(3), 0]], rtol=1e-6, atol=1e-6)
    assert np.all(np.isfinite(grads))


@pytest.mark.parametrize("start", [0, T + 1])
def test_a_start_outside_the_sequence_is_an_error(start):
    output, tokens = random_output()
    with pytest.raises(ValueError, match=f"start={start}: expected 1 .* to {T}"):
        token_logps(output, tokens, start=start)


MASK = np.array([[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]], dtype=bool)
IDS = np.array([[-1, 0, 0, 0, 7, -1], [-1, 7, 7, -1, -1, -1]])


@pytest.mark.parametrize(
    ("normalisation", "want"),
    [
        ("token", [[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]]),
        ("sequence", [[0, 0.2, 0.2, 0.2, 0.2, 0.2], [0, 0.5, 0.5, 0, 0, 0]]),
        # Three steps in the first row: 0 with three tokens, 7 with one, and the one outside.
        ("step", [[0, 1 / 3, 1 / 3, 1 / 3, 1, 1], [0, 0.5, 0.5, 0, 0, 0]]),
    ],
)
def test_token_weights_by_hand(normalisation, want):
    np.testing.assert_allclose(token_weights(MASK, IDS, normalisation), want, rtol=1e-6)
    more = (np.pad(MASK, ((0, 0), (0, 3))), np.pad(IDS, ((0, 0), (0, 3)), constant_values=-1))
    padded = token_weights(*more, normalisation)
    np.testing.assert_allclose(padded, np.pad(want, ((0, 0), (0, 3))), rtol=1e-6)


def test_token_weights_of_nothing_are_zero():
    for normalisation in losses.NORMALISATIONS:
        assert not np.any(token_weights(np.zeros_like(MASK), IDS, normalisation))


def test_an_unknown_normalisation_lists_the_choices():
    with pytest.raises(ValueError, match=r"normalisation='batch': expected one of .*'sequence'"):
        token_weights(MASK, IDS, "batch")


def test_policy_loss_by_hand():
    """Ratios 2 and 1/2, each with a positive and a negative advantage; clip at 0.8 and 1.4."""
    log2 = np.log(2.0, dtype=np.float32)
    batch = TrainBatch(
        tokens=jnp.zeros((1, 5), dtype=jnp.int32),
        positions=jnp.arange(5)[None],
        weights=jnp.array([[0.0, 1.0, 1.0, 2.0, 1.0]]),
        advantages=jnp.array([[9.0, 1.0, -1.0, 1.0, -1.0]]),
        old_logps=jnp.full((1, 5), -3.0),
        ref_logps=jnp.full((1, 5), -3.0),
        kl_weight=0.5,
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
    np.testing.assert_allclose(grads, -batch.weights * batch.advantages, rtol=1e-6)


def test_policy_loss_gradient_equals_the_naive_formula():
    batch = random_batch()
    config = LossConfig(clip_low=0.1, clip_high=0.3)
    logps = batch.old_logps + jax.random.normal(jax.random.PRNGKey(3), (B, T)) / 4

    def naive(logps):
        ratio = jnp.exp(logps - batch.old_logps)
        pg = jnp.minimum(ratio * batch.advantages, jnp.clip(ratio, 0.9, 1.3) * batch.advantages)
        back = batch.ref_logps - logps
        return (batch.weights * (0.1 * (jnp.exp(back) - back - 1) - pg)).sum()

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
    """Neither values nor gradients, whatever stands where the weight is 0."""
    batch = random_batch()
    masked = batch.weights == 0
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


def test_far_off_policy_stays_finite():
    """A log-ratio of 500 would be inf."""
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


@pytest.mark.parametrize(("start", "positions_a_chunk"), [(1, 0), (1, 1), (1, 3), (4, 3), (4, 100)])
def test_the_fused_loss_equals_the_plain_one(monkeypatch, start, positions_a_chunk):
    """Value, metrics and both gradients, scaled by what comes after, as by hidden @ head."""
    monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * B * V * positions_a_chunk)
    output, tokens = random_output()
    batch = dataclasses.replace(
        random_batch(),
        tokens=tokens,
        weights=random_batch().weights.at[:, :start].set(0),
        temperature=jnp.float32(0.7),
        prompt_length=start,
    )

    def loss(logps, entropy, batch):
        (total, _), metrics = policy_loss(logps, batch, LossConfig())
        seen = jnp.where(batch.weights != 0, entropy, 0.0)
        return total, metrics | {"entropy": seen.sum()}

    def fused(hidden, head):
        total, metrics = losses.fused_loss(LMOutput(hidden=hidden, head=head), batch, loss)
        return 3.0 * total, metrics

    def plain(hidden, head):
        logits = hidden @ head
        logps = naive_logps(logits, tokens, 0.7)
        _, entropy = token_logps(logits, tokens, temperature=0.7)
        total, metrics = loss(logps, entropy, batch)
        return 3.0 * total, metrics

    args = (output.hidden, output.head)
    found = jax.jit(jax.value_and_grad(fused, (0, 1), has_aux=True))(*args)
    expected = jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(*args)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_fused_loss_forms_the_logits_once():
    """Three products with the head for value and gradient, where the plain way has four."""
    output, tokens = random_output()
    batch = dataclasses.replace(random_batch(), tokens=tokens, prompt_length=2)

    def loss(logps, _, batch):
        (total, _), metrics = policy_loss(logps, batch, LossConfig())
        return total, metrics

    def fused(output):
        return losses.fused_loss(output, batch, loss)[0]

    def plain(output):
        return loss(*token_logps(output, tokens, start=2), batch)[0]

    products = [
        str(jax.make_jaxpr(jax.grad(way))(output)).count("dot_general[") for way in (fused, plain)
    ]
    assert products == [3, 4]


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
