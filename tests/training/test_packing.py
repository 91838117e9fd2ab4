"""Packing of supervised fine-tuning: two pairs a row, with the same loss and gradient."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes import assert_trees_close, fresh_state

from she_jax.generate.prompts import positions
from she_jax.models.decoder import ModelConfig, build_model, init_params
from she_jax.rl.update import make_sft_step
from she_jax.training import packing
from she_jax.training.packing import WIDTHS, pack_pairs
from she_jax.types import SftBatch

PROMPT, CHAIN, VOCAB = 6, 18, 40


def padded_batch(sizes):
    """Rows with these numbers of (prompt, chain) tokens, padded on both sides."""
    rng, mask = np.random.default_rng(0), np.zeros((len(sizes), PROMPT + CHAIN), bool)
    for row, (prompt, chain) in zip(mask, sizes, strict=True):
        row[PROMPT - prompt : PROMPT + chain] = True
    tokens = np.where(mask, rng.integers(2, VOCAB, mask.shape), 0)
    weights = (mask & (np.arange(mask.shape[1]) >= PROMPT)).astype(np.float32)
    return SftBatch(
        tokens=jnp.asarray(tokens),
        positions=jnp.asarray(positions(mask)),
        loss_weights=jnp.asarray(weights),
        prompt_length=PROMPT,
    )


@pytest.fixture(autouse=True)
def widths(monkeypatch):
    """Those of the package, not the one width of the small runs of other tests."""
    monkeypatch.setattr(packing, "WIDTHS", WIDTHS)


def assert_same_update(batch, packed):
    """Asserts that both have the same loss and gradient."""
    config = ModelConfig(
        vocab_size=VOCAB, dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn=24
    )
    model, optimizer = build_model(config), optax.sgd(1.0)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 3 * x, params)  # so that what a token sees makes a difference
    update = jax.jit(make_sft_step(model.forward, optimizer))
    state = fresh_state(params, optimizer)
    expected, metrics = update(state, batch)
    actual, packed_metrics = update(state, packed)
    np.testing.assert_allclose(packed_metrics["loss"], metrics["loss"], rtol=1e-5)
    assert packed_metrics["tokens"] == metrics["tokens"]
    np.testing.assert_allclose(packed_metrics["grad_norm"], metrics["grad_norm"], rtol=1e-4)
    atol = 1e-4 * float(metrics["grad_norm"])
    assert_trees_close(actual.params, expected.params, rtol=1e-7, atol=atol)


@pytest.mark.parametrize(
    ("sizes", "width"),
    [
        ([(6, 3), (3, 12), (5, 2), (4, 9), (6, 18), (2, 6)], 32),  # 24 + 7 tokens: 1.3 rows
        ([(6, 18), (2, 3)], 29),
        ([(6, 18), (4, 6)], 34),
        ([(6, 17), (6, 17)], 48),
        ([(2, 3), (5, 3)], 24),
    ],
)
def test_a_packed_row_has_one_of_the_widths_and_keeps_all_tokens(sizes, width):
    batch = padded_batch(sizes)
    packed = pack_pairs(batch)
    assert packed.tokens.shape == (len(sizes) // 2, width)
    for name in ("tokens", "loss_weights"):
        real, kept = (np.asarray(rows.positions) >= 0 for rows in (batch, packed))
        before, after = (np.asarray(getattr(rows, name)) for rows in (batch, packed))
        assert sorted(after[kept].tolist()) == sorted(before[real].tolist())


@pytest.mark.parametrize(
    "sizes",
    [
        [(6, 3), (3, 12), (5, 2), (4, 9), (6, 18), (2, 6)],
        pytest.param([(6, 17), (6, 17)], marks=pytest.mark.slow),
    ],
)
def test_a_packed_batch_has_the_same_loss_and_gradient(sizes):
    batch = padded_batch(sizes)
    assert_same_update(batch, pack_pairs(batch))


def test_a_packed_batch_keeps_its_attention_mask():
    batch = padded_batch([(6, 18), (6, 5), (4, 9), (2, 3)])
    real = np.asarray(batch.positions) >= 0
    attended = np.random.default_rng(0).random((*real.shape, real.shape[1])) < 0.5
    attended |= np.eye(real.shape[1], dtype=bool)
    attended &= np.tri(real.shape[1], dtype=bool) & real[:, None] & real[:, :, None]
    batch = replace(batch, mask=jnp.asarray(attended))
    packed = pack_pairs(batch)
    assert packed.tokens.shape[0] == 2
    assert_same_update(batch, packed)


def test_the_longest_sequence_shares_a_row_with_the_shortest():
    packed = pack_pairs(padded_batch([(6, 18), (6, 10), (6, 5), (6, 1)]))
    assert (np.asarray(packed.positions) >= 0).sum(axis=1).tolist() == [24 + 7, 16 + 11]
    assert np.asarray(packed.positions)[0, [0, 23, 24, 30, 31]].tolist() == [0, 23, 0, 6, -1]
    mask = np.asarray(packed.mask)[0]
    assert mask[23, :24].all()
    assert not mask[24:31, :24].any()
    assert not mask[:24, 24:].any()
