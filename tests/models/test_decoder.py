"""The decoder: cached equals uncached, padding changes nothing, and each part by its definition."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from she_jax.models.decoder import (
    ModelConfig,
    RopeScaling,
    attention,
    build_model,
    init_params,
    rms_norm,
    rotary,
    rotate,
)

LLAMA = ModelConfig(
    vocab_size=53, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, rope_theta=100.0
)
QWEN2 = dataclasses.replace(LLAMA, qkv_bias=True, tie_embeddings=False)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, kv_heads=4, head_dim=6)
FAMILIES = pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])


def random_params(config, seed=0):
    """Parameters none of which is at a value, 0 or 1, that hides its use."""
    params = init_params(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


def batch():
    """Three rows of ten tokens: one whole, one with three of left padding, one all padding."""
    tokens = jax.random.randint(jax.random.key(7), (3, 10), 0, LLAMA.vocab_size)
    positions = np.tile(np.arange(10), (3, 1))
    positions[1] -= 3
    positions[2] = -1
    return tokens, jnp.asarray(np.maximum(positions, -1))


@functools.cache
def forward(config):
    """One compilation a config and a shape, for all tests."""
    return jax.jit(build_model(config).forward)


def logits(output):
    return output.hidden @ output.head


@FAMILIES
def test_parameters_are_the_documented_plain_dict(config):
    depth, dim, heads, kv = config.layers, config.dim, config.heads, config.kv_heads
    size, ffn, vocab = config.head_dim, config.ffn, config.vocab_size
    layers = {
        "attn_norm": (depth, dim),
        "q": (depth, dim, heads, size),
        "k": (depth, dim, kv, size),
        "v": (depth, dim, kv, size),
        "o": (depth, heads, size, dim),
        "mlp_norm": (depth, dim),
        "gate": (depth, dim, ffn),
        "up": (depth, dim, ffn),
        "down": (depth, ffn, dim),
    }
    if config is QWEN2:
        layers |= {"q_bias": (depth, heads, size)}
        layers |= {"k_bias": (depth, kv, size), "v_bias": (depth, kv, size)}
    if config is QWEN3:
        layers |= {"q_norm": (depth, size), "k_norm": (depth, size)}
    expected = {"embed": (vocab, dim), "layers": layers, "norm": (dim,)}
    if config is QWEN2:
        expected["head"] = (dim, vocab)
    params = init_params(config, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == expected
    assert type(params) is dict
    assert type(params["layers"]) is dict
    assert all(type(leaf) is type(jnp.ones(1)) for leaf in jax.tree.leaves(params))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_initial_scales():
    config = dataclasses.replace(LLAMA, dim=128, head_dim=32, ffn=384)
    params = init_params(config, jax.random.key(0))
    std = math.sqrt(2 / (5 * 128))
    for name in ("q", "k", "v", "gate", "up"):
        np.testing.assert_allclose(params["layers"][name].std(), std, rtol=0.05)
    for name in ("o", "down"):
        np.testing.assert_allclose(params["layers"][name].std(), std / math.sqrt(4), rtol=0.05)
    np.testing.assert_allclose(params["embed"].std(), 0.02, rtol=0.05)
    layer = params["layers"]["q"]
    assert not np.allclose(layer[0], layer[1])
    assert not np.allclose(params["layers"]["gate"], params["layers"]["up"])


@FAMILIES
def test_cached_decoding_equals_the_full_forward(config):
    """Prefill six tokens, then one at a time, at traced slots of a cache that is too long."""
    model, params = build_model(config), random_params(config)
    tokens, positions = batch()
    full = forward(config)(params, tokens, positions)
    decode = jax.jit(model.decode)
    out, cache = decode(params, tokens[:, :6], positions[:, :6], model.init_cache(3, 14), 0)
    hidden, weights = [out.hidden], model.decoding_params(params)  # decode takes either form
    for t in range(6, 10):
        now = slice(t, t + 1)
        out, cache = decode(weights, tokens[:, now], positions[:, now], cache, t)
        hidden.append(out.hidden)
    real = positions >= 0
    cached = jnp.concatenate(hidden, axis=1)
    np.testing.assert_allclose(cached[real], full.hidden[real], atol=1e-5)
    np.testing.assert_array_equal(out.head, full.head)
    np.testing.assert_array_equal(cache["positions"][:, :10], positions)
    assert (cache["positions"][:, 10:] == -1).all()


def test_decoding_rounds_no_scale_of_a_norm():
    """The trainer reads them in float32, where a bfloat16 near 1 moves by steps of 0.008."""
    config = dataclasses.replace(QWEN3, dtype="bfloat16")
    params = jax.tree.map(lambda leaf: 1.003 * jnp.ones_like(leaf), random_params(config))
    weights = build_model(config).decoding_params(params)
    scales = [weights["norm"]]
    for layer in weights["layers"]:
        scales += [layer[name] for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm")]
        assert layer["gate"].dtype == jnp.bfloat16
    assert len(scales) == 1 + 4 * config.layers
    for scale in scales:
        np.testing.assert_array_equal(scale, jnp.float32(1.003))


@FAMILIES
def test_padding_changes_nothing(config):
    params = random_params(config)
    tokens, positions = batch()
    padded = forward(config)(params, tokens, positions).hidden[1, 3:]
    alone = forward(config)(params, tokens[1:2, 3:], positions[1:2, 3:]).hidden[0]
    np.testing.assert_allclose(padded, alone, atol=1e-5)
    other = forward(config)(params, tokens.at[1, :3].set(0), positions).hidden[1, 3:]
    np.testing.assert_array_equal(other, padded)


def test_rows_of_padding_are_finite_in_both_directions():
    model, params = build_model(QWEN3), random_params(QWEN3)
    tokens, positions = batch()

    @jax.jit
    def grads_and_logits(params, positions):
        def loss(params):
            output = logits(model.forward(params, tokens, positions))
            return jnp.sum(jnp.where(positions[..., None] >= 0, output, 0.0) ** 2), output

        return jax.grad(loss, has_aux=True)(params)

    grads, output = grads_and_logits(params, positions)
    assert jnp.isfinite(output).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(grads))
    none, _ = grads_and_logits(params, jnp.full_like(positions, -1))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(none))


def test_a_token_sees_nothing_after_it():
    params = random_params(LLAMA)
    tokens, positions = batch()
    before = forward(LLAMA)(params, tokens, positions).hidden[0]
    after = forward(LLAMA)(params, tokens.at[0, 6].add(1), positions).hidden[0]
    np.testing.assert_array_equal(before[:6], after[:6])
    assert (jnp.abs(before[6:] - after[6:]).max(axis=1) > 1e-3).all()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("prompts", [0, 1, 2, 4])
def test_attention_equals_its_definition(kv_heads, prompts):
    """Head by head in NumPy, with the keys of a prompt per group, and of a start that all share."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(4, 4, 5, 8))
    k, v = rng.normal(size=(2, 4, kv_heads, 7, 8))
    mask = rng.random((4, 5, 7)) < 0.6
    mask[..., 0] = True
    prefixes, count = [], max(prompts, 1)
    before_k, before_v = rng.normal(size=(2, count, kv_heads, 3, 8)) + 1.0
    real = rng.random((count, 3)) < (0.7 if prompts else 0.0)
    start_k, start_v = rng.normal(size=(2, 1, kv_heads, 2, 8)) - 1.0

    def flat(x):
        return jnp.asarray(x.reshape(-1, *x.shape[2:]), jnp.float32)

    if prompts:
        prefixes.append((flat(before_k).swapaxes(1, 2), flat(before_v), jnp.asarray(real)))
    if prompts > 1:
        prefixes.append((flat(start_k).swapaxes(1, 2), flat(start_v), jnp.ones((1, 2), bool)))
    expected = np.empty_like(q)
    for b, h, t in np.ndindex(4, 4, 5):
        j, n = h // (4 // kv_heads), b // (4 // count)
        keys = np.concatenate([start_k[0, j], before_k[n, j], k[b, j]])
        values = np.concatenate([start_v[0, j], before_v[n, j], v[b, j]])
        seen = np.concatenate([[prompts > 1] * 2, real[n], mask[b, t]])
        weights = np.where(seen, np.exp(keys @ q[b, h, t] / np.sqrt(8)), 0.0)
        expected[b, h, t] = weights @ values / weights.sum()
    queries = jnp.asarray(q, jnp.float32)
    outputs = attention(queries, flat(k).swapaxes(1, 2), flat(v), jnp.asarray(mask), prefixes)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


@FAMILIES
def test_a_shared_prompt_equals_a_repeated_one(config):
    """Values and gradients of a group whose prompt is computed once, with padding."""
    model, params = build_model(config), random_params(config)
    group, prompt = 3, 4
    tokens = jax.random.randint(jax.random.key(1), (6, 9), 0, config.vocab_size)
    tokens = tokens.at[:, :prompt].set(jnp.repeat(tokens[::group, :prompt], group, axis=0))
    mask = jnp.ones((6, 9), bool).at[:group, :2].set(False).at[4, 6:].set(False)
    positions = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1)
    weights = jax.random.normal(jax.random.key(2), (6, 9 - prompt + 1, config.dim))

    def hidden(params, **shared):
        states = model.forward(params, tokens, positions, **shared).hidden
        return jnp.where(mask[:, :, None], states, 0.0)[:, prompt - 1 :]

    plain, plain_vjp = jax.vjp(hidden, params)
    shared, shared_vjp = jax.vjp(
        lambda params: hidden(params, prompt_length=prompt, group_size=group), params
    )
    np.testing.assert_allclose(shared, plain, atol=1e-5)
    for grad, wanted in zip(
        jax.tree.leaves(shared_vjp(weights)), jax.tree.leaves(plain_vjp(weights)), strict=True
    ):
        atol = 1e-4 * float(jnp.abs(wanted).max())
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=atol)


@pytest.mark.parametrize(("group", "prompt"), [(4, 3), (3, 0), (3, 9)])
def test_a_prompt_that_cannot_be_shared_is_refused(group, prompt):
    tokens = jnp.zeros((6, 9), jnp.int32)
    with pytest.raises(ValueError, match=f"group_size={group}, prompt_length={prompt}"):
        build_model(LLAMA).forward(
            random_params(LLAMA), tokens, tokens, prompt_length=prompt, group_size=group
        )


@FAMILIES
def test_packed_continuations_of_a_text_equal_separate_rows(config):
    """Four tokens and two continuations of them: one of three, one of three from position 3 on."""
    params = random_params(config)
    tokens = jax.random.randint(jax.random.key(3), (1, 10), 0, config.vocab_size)
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 6, 3, 4, 5]])
    mask = np.tri(10, dtype=bool)
    mask[7:, 3:7] = False
    packed = forward(config)(params, tokens, positions, mask=jnp.asarray(mask)[None])
    model = build_model(config)
    for row, kept in (([0, 1, 2, 3, 4, 5, 6], slice(7)), ([0, 1, 2, 7, 8, 9], slice(7, 10))):
        alone = model.forward(params, tokens[:, row], jnp.arange(len(row))[None])
        hidden = packed.hidden[:, kept]
        expected = alone.hidden[:, -hidden.shape[1] :]
        np.testing.assert_allclose(hidden, expected, rtol=2e-4, atol=2e-5)


def test_a_mask_together_with_groups_is_refused():
    tokens, positions = batch()
    model, mask = build_model(LLAMA), jnp.ones((3, 10, 10), bool)
    with pytest.raises(ValueError, match="do not go together"):
        model.forward(
            random_params(LLAMA), tokens, positions, mask=mask, prompt_length=4, group_size=3
        )


def test_rms_norm_golden():
    normed = rms_norm(jnp.array([[3.0, 4.0]]), jnp.array([1.0, 2.0]), 0.5)
    np.testing.assert_allclose(normed, [[3 / math.sqrt(13), 8 / math.sqrt(13)]], rtol=1e-6)


def test_rotation_turns_each_pair_by_its_angle():
    config = dataclasses.replace(LLAMA, head_dim=4, rope_theta=16.0)  # frequencies 1 and 1/4
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    rotated = rotate(x, *rotary(jnp.array([[2]]), config))[0, 0, 0]
    expected = [
        1 * math.cos(2) - 3 * math.sin(2),
        2 * math.cos(0.5) - 4 * math.sin(0.5),
        3 * math.cos(2) + 1 * math.sin(2),
        4 * math.cos(0.5) + 2 * math.sin(0.5),
    ]
    np.testing.assert_allclose(rotated, expected, rtol=1e-5)


def test_rope_scaling_stretches_long_waves_and_keeps_short_ones():
    scaling = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
    )
    config = dataclasses.replace(LLAMA, head_dim=16, rope_theta=10000.0, rope_scaling=scaling)
    position = jnp.array([[1]])
    plain = rotary(position, dataclasses.replace(config, rope_scaling=None))[1][0, 0, 0]
    scaled = rotary(position, config)[1][0, 0, 0]
    frequency = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    turns = 64 * frequency / (2 * np.pi)  # 10.2, 3.2, 1.02, 0.3, ...
    np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(scaled[3:], np.sin(frequency[3:] / 8), rtol=1e-5)
    keep = (turns[1] - 1) / 3
    blended = frequency[1] * keep + frequency[1] / 8 * (1 - keep)
    np.testing.assert_allclose(scaled[1], np.sin(blended), rtol=1e-5)


def test_rematerialization_changes_no_gradient():
    tokens, positions = batch()
    params = random_params(LLAMA)

    def grads(config):
        model = build_model(config)

        def loss(params):
            return jnp.mean(logits(model.forward(params, tokens, positions)) ** 2)

        return jax.jit(jax.grad(loss))(params)

    kept, again = grads(LLAMA), grads(dataclasses.replace(LLAMA, remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), kept, again)


def test_depth_does_not_grow_the_program():
    def program(depth):
        config = dataclasses.replace(LLAMA, layers=depth)
        params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        return str(jax.make_jaxpr(build_model(config).forward)(params, *batch()))

    assert program(2).count("=") == program(9).count("=")


def test_decode_traces_once_for_all_slots():
    model, params = build_model(LLAMA), random_params(LLAMA)
    tokens, positions = batch()
    traces = []

    @jax.jit
    def decode(cache, slot):
        traces.append(1)
        return model.decode(params, tokens[:, :1], positions[:, :1], cache, slot)[1]

    cache = model.init_cache(3, 4)
    for slot in range(4):
        cache = decode(cache, slot)
    assert len(traces) == 1


def test_bfloat16_computes_in_bfloat16_and_is_close_to_float32():
    half = dataclasses.replace(LLAMA, dtype="bfloat16")
    params = random_params(LLAMA)
    tokens, positions = batch()
    output = forward(half)(params, tokens, positions)
    exact = forward(LLAMA)(params, tokens, positions)
    assert output.hidden.dtype == output.head.dtype == jnp.bfloat16
    assert jnp.abs(output.hidden - exact.hidden)[:2].mean() < 0.05
    cache = build_model(half).init_cache(1, 2)
    assert cache["layers"][0]["k"].dtype == jnp.bfloat16


def test_models_of_one_config_are_one_static_argument():
    assert build_model(LLAMA) == build_model(dataclasses.replace(LLAMA))
    assert hash(build_model(LLAMA)) == hash(build_model(dataclasses.replace(LLAMA)))
    assert build_model(LLAMA) != build_model(QWEN2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "heads=4, kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"layers": 0}, "layers=0"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_an_invalid_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **change)
