"""Log-probabilities by hand and in chunks, and the fused loss against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from she_jax.rl import logprobs
from she_jax.rl.logprobs import fused_loss, token_logps
from she_jax.rl.losses import LossConfig, policy_loss
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


def policy_batch(tokens, start):
    """The inputs of a policy loss from ``start`` on; some tokens have no weight."""
    fields = jax.random.normal(jax.random.PRNGKey(1), (4, B, T))
    return TrainBatch(
        tokens=tokens,
        positions=jnp.zeros((B, T), dtype=jnp.int32),
        loss_weights=jax.nn.relu(fields[0]).at[:, :start].set(0),
        advantages=fields[1],
        old_logps=fields[2] - 2,
        ref_logps=fields[3] - 2,
        temperature=jnp.float32(0.7),
        kl_coef=jnp.float32(0.1),
        prompt_length=start,
    )


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
    ("start", "chunk_positions"), [(1, 0), (1, 1), (1, 3), (4, 3), (4, 100), (T, 1)]
)
def test_chunks_equal_the_whole(monkeypatch, start, chunk_positions):
    """Values and both gradients, for chunks that divide the positions and chunks that do not."""
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 4 * B * V * chunk_positions)
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
    """Forward and backward together use less than a tenth of the memory of [B, T, V] logits."""
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 2 << 20)
    batch, time, vocab = 4, 512, 20_000
    output = LMOutput(hidden=jnp.zeros((batch, time, 8)), head=jnp.zeros((8, vocab)))
    tokens = jnp.zeros((batch, time), dtype=jnp.int32)

    def total(output):
        return token_logps(output, tokens, start=128)[0].sum()

    compiled = jax.jit(jax.grad(total)).lower(output).compile()
    used = compiled.memory_analysis().temp_size_in_bytes
    assert 0 < used < 4 * batch * (time - 128) * vocab / 10


def test_trap_6_positions_before_start_are_not_read():
    """NaN in the hidden states of the prompt reaches neither the values nor the gradients."""
    output, tokens = random_output()
    start = 4
    # The output at start - 1 predicts the token at start, so it is read.
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
    """A bfloat16 sum over many chunks would lose small terms: 256 + 1 = 256 there."""
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 1)
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
    """A logit of -inf gives probability 0, a logit of 1e30 probability 1."""
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


@pytest.mark.parametrize(("start", "chunk_positions"), [(1, 0), (1, 1), (1, 3), (4, 3), (4, 100)])
def test_the_fused_loss_equals_the_plain_one(monkeypatch, start, chunk_positions):
    """Value, metrics and both gradients, with a factor applied to the loss, as by hidden @ head."""
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 4 * B * V * chunk_positions)
    output, tokens = random_output()
    batch = policy_batch(tokens, start)

    def loss(logps, entropy, batch):
        (total, _), metrics = policy_loss(logps, batch, LossConfig())
        trained = jnp.where(batch.loss_weights != 0, entropy, 0.0)
        return total, metrics | {"entropy": trained.sum()}

    def fused(hidden, head):
        total, metrics = fused_loss(LMOutput(hidden=hidden, head=head), batch, loss)
        return 3.0 * total, metrics

    def plain(hidden, head):
        logits = hidden @ head
        logps = naive_logps(logits, tokens, 0.7)
        _, entropy = token_logps(logits, tokens, temperature=0.7)
        total, metrics = loss(logps, entropy, batch)
        return 3.0 * total, metrics

    args = (output.hidden, output.head)
    got = jax.jit(jax.value_and_grad(fused, (0, 1), has_aux=True))(*args)
    expected = jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_fused_loss_forms_the_logits_once():
    """Value and gradient take three products with the head; without fusion they take four."""
    output, tokens = random_output()
    batch = policy_batch(tokens, 2)

    def loss(logps, _, batch):
        (total, _), metrics = policy_loss(logps, batch, LossConfig())
        return total, metrics

    def fused(output):
        return fused_loss(output, batch, loss)[0]

    def plain(output):
        return loss(*token_logps(output, tokens, start=2), batch)[0]

    products = [
        str(jax.make_jaxpr(jax.grad(total))(output)).count("dot_general[")
        for total in (fused, plain)
    ]
    assert products == [3, 4]
