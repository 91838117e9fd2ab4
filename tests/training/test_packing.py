"""Supervised fine-tuning's batches: two pairs a row, and what that must not change."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from she_jax.generate.prompts import positions
from she_jax.models.decoder import ModelConfig, build_model, init_params
from she_jax.rl.update import make_sft_step
from she_jax.training import packing
from she_jax.training.packing import WIDTHS, pack_pairs
from she_jax.types import SftBatch, TrainState

PROMPT, CHAIN, VOCAB = 6, 18, 40


def padded_batch(sizes):
    """Rows with (prompt, chain) tokens as said, padded on both sides."""
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
    """Those of the package, not the one that the small runs of other tests have."""
    monkeypatch.setattr(packing, "WIDTHS", WIDTHS)


def teach_alike(batch, packed):
    """Asserts that both have the same loss and gradient."""
    config = ModelConfig(
        vocab_size=VOCAB, dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn=24
    )
    model, optimizer = build_model(config), optax.sgd(1.0)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 3 * x, params)  # so that what a token sees makes a difference
    update = jax.jit(make_sft_step(model.forward, optimizer))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.PRNGKey(0),
    )
    (one, told), (two, told_too) = update(state, batch), update(state, packed)
    np.testing.assert_allclose(told_too["loss"], told["loss"], rtol=1e-5)
    assert told_too["tokens"] == told["tokens"]
    np.testing.assert_allclose(told_too["grad_norm"], told["grad_norm"], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(told["grad_norm"]))


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
def test_a_row_of_two_is_as_long_as_its_width_and_keeps_all_tokens(sizes, width):
    batch = padded_batch(sizes)
    packed = pack_pairs(batch)
    assert packed.tokens.shape == (len(sizes) // 2, width)
    for name in ("tokens", "loss_weights"):
        whole, real = np.asarray(getattr(batch, name)), np.asarray(batch.positions) >= 0
        now, kept = np.asarray(getattr(packed, name)), np.asarray(packed.positions) >= 0
        assert sorted(now[kept].tolist()) == sorted(whole[real].tolist())


@pytest.mark.parametrize(
    "sizes", [[(6, 3), (3, 12), (5, 2), (4, 9), (6, 18), (2, 6)], [(6, 17), (6, 17)]]
)
def test_a_row_of_two_teaches_what_two_rows_do(sizes):
    batch = padded_batch(sizes)
    teach_alike(batch, pack_pairs(batch))


def test_a_row_of_two_keeps_what_each_token_sees():
    batch = padded_batch([(6, 18), (6, 5), (4, 9), (2, 3)])
    real = np.asarray(batch.positions) >= 0
    seen = np.random.default_rng(0).random((*real.shape, real.shape[1])) < 0.5
    seen |= np.eye(real.shape[1], dtype=bool)
    seen &= np.tri(real.shape[1], dtype=bool) & real[:, None] & real[:, :, None]
    batch = replace(batch, mask=jnp.asarray(seen))
    packed = pack_pairs(batch)
    assert packed.tokens.shape[0] == 2
    teach_alike(batch, packed)


def test_a_row_holds_the_longest_with_the_shortest():
    packed = pack_pairs(padded_batch([(6, 18), (6, 10), (6, 5), (6, 1)]))
    assert (np.asarray(packed.positions) >= 0).sum(axis=1).tolist() == [24 + 7, 16 + 11]
    assert np.asarray(packed.positions)[0, [0, 23, 24, 30, 31]].tolist() == [0, 23, 0, 6, -1]
    mask = np.asarray(packed.mask)[0]
    assert mask[23, :24].all()
    assert not mask[24:31, :24].any()
    assert not mask[:24, 24:].any()
