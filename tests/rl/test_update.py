"""The update step: by hand, against the naive gradient, in micro-batches, on several devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from recipes import assert_trees_close, fresh_state

from she_jax.models.decoder import ModelConfig, build_model, init_params
from she_jax.models.sharding import make_mesh
from she_jax.rl.logprobs import token_logps
from she_jax.rl.losses import LossConfig
from she_jax.rl.update import (
    jit_update_step,
    make_dpo_step,
    make_scorer,
    make_sft_step,
    make_update_step,
    split_rows,
)
from she_jax.types import DpoBatch, LMOutput, SftBatch, TrainBatch

B, T, V = 16, 10, 16
CONFIG = ModelConfig(vocab_size=V, dim=8, layers=2, heads=4, kv_heads=2, head_dim=4, ffn=16)
METRICS = {
    *("loss", "pg_loss", "kl", "entropy", "ratio", "clip_low", "clip_high"),
    *("logp_gap", "logp_gap_max", "grad_norm", "tokens"),
}


def bigram(params, tokens, positions):
    """The smallest language model: the logits depend on the previous token only."""
    del positions
    return params["table"][tokens]


def factored(params, tokens, positions):
    """A bigram model as hidden states and a head."""
    del positions
    return LMOutput(hidden=params["embed"][tokens], head=params["head"])


def random_params(seed=0):
    keys = jax.random.split(jax.random.PRNGKey(seed), 2)
    return {"embed": jax.random.normal(keys[0], (V, 4)), "head": jax.random.normal(keys[1], (4, V))}


def random_batch(seed=0, rows=B, time=T, prompt=3):
    """Rows with completions of different lengths, so that micro-batches have different weights."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, time - prompt + 1, rows)
    slot = np.arange(time)
    trained = (slot >= prompt) & (slot < prompt + lengths[:, None])
    return TrainBatch(
        tokens=jnp.asarray(rng.integers(0, V, (rows, time)), dtype=jnp.int32),
        positions=jnp.asarray(np.where(slot < prompt + lengths[:, None], slot, -1)),
        loss_weights=jnp.asarray(trained, dtype=jnp.float32),
        advantages=jnp.asarray(rng.normal(size=(rows, time)), dtype=jnp.float32),
        old_logps=jnp.asarray(-2.5 + rng.random((rows, time)) / 2, dtype=jnp.float32),
        ref_logps=jnp.asarray(-2.5 + rng.random((rows, time)) / 2, dtype=jnp.float32),
        temperature=jnp.float32(0.9),
        kl_coef=jnp.float32(0.05),
        prompt_length=prompt,
    )


@functools.cache
def compiled(forward, config):
    return jax.jit(make_update_step(forward, optax.sgd(1.0), config))


def run(batch, forward=factored, **config):
    """One update by plain SGD, from the same parameters every time."""
    state = fresh_state(random_params(), optax.sgd(1.0))
    return compiled(forward, LossConfig(**config))(state, batch)


def takes_two(params, tokens):
    return params["table"][tokens]


@pytest.mark.parametrize(
    ("forward", "fields", "message"),
    [
        (takes_two, {}, r"forward is called as forward\(params, tokens, positions\)"),
        (
            bigram,
            {"group_size": 4},
            r"'prompt_length': forward is called as forward\(params, tokens, positions, "
            r"prompt_length=..., group_size=...\); it may ignore the last two",
        ),
        (lambda *_: (jnp.zeros((B, T, V)), None), {}, r"forward returned a tuple, expected logits"),
        (lambda *_: jnp.zeros((B, V)), {}, r"returned an array \[16, 16\], expected logits \[B, T"),
        (bigram, {"tokens": None}, "^update: batch.tokens is None, expected a numpy or JAX array"),
        (bigram, {"advantages": jnp.full((B, T), np.nan)}, r"batch.advantages\[0, 3\] is nan"),
    ],
)
def test_what_does_not_fit_an_update_is_said(forward, fields, message):
    state = fresh_state({"table": jnp.zeros((V, V))}, optax.sgd(1.0))
    update = make_update_step(forward, optax.sgd(1.0), LossConfig())
    with pytest.raises(ValueError, match=message):
        update(state, dataclasses.replace(random_batch(), **fields))


def test_an_error_inside_a_model_keeps_its_traceback():
    state = fresh_state({"table": jnp.zeros((V, V))}, optax.sgd(1.0))
    update = make_update_step(lambda *_: len(None), optax.sgd(1.0), LossConfig())
    with pytest.raises(TypeError, match="NoneType"):
        update(state, random_batch())


def test_one_update_by_hand():
    """Two tokens with p = 1/2, SGD of rate 1: the gradient is -+A * (1 - p) / count."""
    optimizer = optax.sgd(1.0)
    state = fresh_state({"table": jnp.zeros((2, 2))}, optimizer)
    batch = TrainBatch(
        tokens=jnp.array([[0, 1], [1, 1]]),
        positions=jnp.array([[0, 1], [0, 1]]),
        loss_weights=jnp.array([[0.0, 1.0], [0.0, 1.0]]),
        advantages=jnp.array([[0.0, 1.0], [0.0, -0.5]]),
        old_logps=jnp.full((2, 2), -np.log(2.0), dtype=jnp.float32),
    )
    new, metrics = compiled(bigram, LossConfig())(state, batch)
    np.testing.assert_allclose(
        new.params["table"], [[-0.25, 0.25], [0.125, -0.125]], rtol=1e-6, atol=1e-7
    )
    assert set(metrics) == METRICS
    want = {"loss": -0.25, "ratio": 1, "entropy": np.log(2), "tokens": 2, "kl": 0, "logp_gap": 0}
    want |= {"grad_norm": np.sqrt(2 * 0.25**2 + 2 * 0.125**2), "clip_low": 0, "clip_high": 0}
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert new.step == 1
    np.testing.assert_array_equal(new.key, state.key)


def test_gradient_equals_that_of_the_naive_formula():
    batch = random_batch()
    params = random_params()

    def naive(params):
        logits = params["embed"][batch.tokens[:, :-1]] @ params["head"] / 0.9
        table = jax.nn.log_softmax(logits, axis=-1)
        logps = jnp.take_along_axis(table, batch.tokens[:, 1:, None], axis=-1)[:, :, 0]
        old, ref, a, w = (
            x[:, 1:]
            for x in (batch.old_logps, batch.ref_logps, batch.advantages, batch.loss_weights)
        )
        ratio = jnp.exp(logps - old)
        pg = -jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.3) * a)
        k3 = jnp.exp(ref - logps) - (ref - logps) - 1
        return (w * (pg + 0.05 * k3)).sum() / w.sum()

    loss, grads = jax.jit(jax.value_and_grad(naive))(params)
    new, metrics = run(batch, clip_low=0.2, clip_high=0.3)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_trees_close(new.params, jax.tree.map(jnp.subtract, params, grads))
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)


def test_jitted_equals_eager():
    batch = random_batch()
    optimizer = optax.sgd(1.0)
    update = make_update_step(factored, optimizer, LossConfig(micro_batches=2))
    eager = update(fresh_state(random_params(), optimizer), batch)
    assert_trees_close(run(batch, micro_batches=2), eager)


def imitating(batch):
    """The batch with every other row imitated."""
    rows = (jnp.arange(B) % 2 == 0)[:, None]
    return dataclasses.replace(batch, imitation_mask=rows & (batch.loss_weights > 0))


@pytest.mark.parametrize("kind", [lambda batch: batch, imitating])
@pytest.mark.parametrize("micro_batches", [2, 16])
def test_trap_10_micro_batches_equal_the_full_batch(micro_batches, kind):
    """Micro-batches have different weights here: a mean of their means would differ."""
    batch = kind(random_batch())
    assert len(set(np.asarray(batch.loss_weights).reshape(-1, 2, T).sum(axis=(1, 2)))) > 1
    whole, parts = run(batch), run(batch, micro_batches=micro_batches)
    assert_trees_close(parts, whole)


def constant(batch):
    """The batch with the maximum completion length as the denominator of each row."""
    return dataclasses.replace(batch, denominator=jnp.full(B, T - batch.prompt_length, jnp.float32))


@pytest.mark.parametrize("micro_batches", [1, 2, 16])
@pytest.mark.parametrize("logits_bytes", [1, 1 << 20])
def test_the_denominator_divides_the_loss_once(monkeypatch, micro_batches, logits_bytes):
    """For any number of micro-batches and of chunks of the head, loss and gradient are the sum over
    B * (T - prompt); every other metric stays a mean by weight."""
    monkeypatch.setattr("she_jax.rl.logprobs.LOGITS_BYTES", logits_bytes)
    batch = random_batch()
    plain, metrics = run(batch)
    # Not from ``compiled``, whose cache ignores the number of chunks.
    update = make_update_step(factored, optax.sgd(1.0), LossConfig(micro_batches=micro_batches))
    new, got = jax.jit(update)(fresh_state(random_params(), optax.sgd(1.0)), constant(batch))
    share = batch.loss_weights.sum() / (B * (T - 3))
    assert share < 0.9
    want = jax.tree.map(lambda p, q: p + share * (q - p), random_params(), plain.params)
    assert_trees_close(new.params, want)
    scaled = {name: metrics[name] * share for name in ("loss", "grad_norm")}
    assert_trees_close(got, metrics | scaled)


def test_with_a_constant_denominator_a_token_weighs_the_same_in_any_batch():
    """The gradient of a batch is the mean of the gradients of its halves."""
    batch = constant(random_batch())
    halves = [jax.tree.map(lambda x, i=i: x[i::2] if x.ndim else x, batch) for i in (0, 1)]
    lengths = [half.loss_weights.sum() for half in halves]
    assert lengths[0] != lengths[1]
    whole, *parts = (
        jax.tree.map(jnp.subtract, run(rows)[0].params, random_params())
        for rows in (batch, *halves)
    )
    assert_trees_close(jax.tree.map(lambda a, b: (a + b) / 2, *parts), whole)


def test_a_batch_with_a_denominator_and_without_weight_has_loss_zero():
    batch = dataclasses.replace(constant(random_batch()), loss_weights=jnp.zeros((B, T)))
    new, metrics = run(batch)
    assert_trees_close(new.params, random_params(), rtol=0, atol=0)
    assert all(value == 0 for value in metrics.values())


def test_trap_10_a_mean_of_means_is_another_loss():
    """So the tests above would notice it."""
    batch = random_batch()
    halves = [jax.tree.map(lambda x, i=i: x[i::2] if x.ndim else x, batch) for i in (0, 1)]
    mean_of_means = np.mean([run(half)[1]["loss"] for half in halves])
    assert abs(mean_of_means - run(batch)[1]["loss"]) > 1e-3


def test_gradients_accumulate_in_float32_for_bfloat16_parameters():
    """2,000 small gradients, one per micro-batch: a bfloat16 sum would stop growing at 256."""
    rows = 2000
    optimizer = optax.sgd(1.0)
    state = fresh_state({"table": jnp.zeros((2, 2), dtype=jnp.bfloat16)}, optimizer)
    batch = TrainBatch(
        tokens=jnp.zeros((rows, 2), dtype=jnp.int32),
        positions=jnp.tile(jnp.arange(2), (rows, 1)),
        loss_weights=jnp.tile(jnp.array([0.0, 1.0]), (rows, 1)),
        advantages=jnp.ones((rows, 2)),
        old_logps=jnp.full((rows, 2), -np.log(2.0), dtype=jnp.float32),
    )
    update = make_update_step(bigram, optimizer, LossConfig(micro_batches=rows))
    new, _ = jax.jit(update)(state, batch)
    assert new.params["table"].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        new.params["table"].astype(jnp.float32), [[0.5, -0.5], [0, 0]], rtol=1e-2
    )


@pytest.mark.parametrize("field", ["advantages", "old_logps", "ref_logps"])
def test_masked_tokens_change_nothing(field):
    batch = random_batch()
    junk = jnp.where(batch.loss_weights == 0, jnp.nan, getattr(batch, field))
    dirty = dataclasses.replace(batch, **{field: junk})
    for a, b in zip(jax.tree.leaves(run(batch)), jax.tree.leaves(run(dirty)), strict=True):
        np.testing.assert_array_equal(a, b)


def averaging(params, tokens, positions):
    """A model with context: the mean embedding of the tokens so far, without padding."""
    real = (positions >= 0)[:, :, None]
    total = jnp.cumsum(jnp.where(real, params["embed"][tokens], 0.0), axis=1)
    hidden = total / jnp.maximum(jnp.cumsum(real, axis=1), 1)
    return LMOutput(hidden=hidden, head=params["head"])


def test_more_padding_changes_nothing():
    """On both sides, with a model that has context."""
    batch = random_batch()
    left, right = 4, 3

    def pad(x, fill=0):
        return jnp.pad(x, ((0, 0), (left, right)), constant_values=fill)

    wider = dataclasses.replace(
        batch,
        tokens=pad(batch.tokens, 5),
        positions=pad(batch.positions, -1),
        loss_weights=pad(batch.loss_weights),
        advantages=pad(batch.advantages, 9),
        old_logps=pad(batch.old_logps, -9),
        ref_logps=pad(batch.ref_logps, -9),
        prompt_length=batch.prompt_length + left,
    )
    assert_trees_close(run(wider, forward=averaging), run(batch, forward=averaging))


def test_the_order_of_the_rows_changes_nothing():
    batch = random_batch()
    order = np.random.default_rng(5).permutation(B)
    moved = jax.tree.map(lambda x: x[order] if x.ndim else x, batch)
    assert_trees_close(run(moved), run(batch))


def test_a_model_may_return_logits_or_hidden_states():
    def multiplied(params, tokens, positions):
        output = factored(params, tokens, positions)
        return output.hidden @ output.head

    batch = random_batch()
    assert_trees_close(run(batch, forward=multiplied), run(batch))


def test_a_batch_without_weight_has_loss_zero():
    batch = dataclasses.replace(random_batch(), loss_weights=jnp.zeros((B, T)))
    new, metrics = run(batch)
    assert_trees_close(new.params, random_params(), rtol=0, atol=0)
    assert all(value == 0 for value in metrics.values())


def test_a_batch_that_does_not_divide_is_an_error():
    with pytest.raises(
        ValueError, match="16 rows in groups of 1 do not divide into micro_batches=3"
    ):
        run(random_batch(), micro_batches=3)


def grouped(batch, group_size):
    """The batch with equal prompts within each group."""
    tokens, prompt = batch.tokens, batch.prompt_length
    shared = jnp.repeat(tokens[::group_size, :prompt], group_size, axis=0)
    return dataclasses.replace(batch, tokens=tokens.at[:, :prompt].set(shared))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_groups_that_share_their_prompts_change_nothing(micro_batches):
    """With a real model, update and scores are equal to those of independent rows."""
    optimizer, model = optax.sgd(1.0), build_model(CONFIG)
    state = fresh_state(init_params(CONFIG, jax.random.PRNGKey(0)), optimizer)
    alone = grouped(random_batch(), 4)
    together = dataclasses.replace(alone, group_size=4)
    update = compiled(model.forward, LossConfig(micro_batches=micro_batches))
    assert_trees_close(update(state, together), update(state, alone), rtol=1e-3, atol=1e-5)
    score = make_scorer(model.forward, start=3, micro_batches=micro_batches, group_size=4)
    got = score(state.params, alone.tokens, alone.positions, jnp.float32(0.7))
    output = jax.jit(model.forward)(state.params, alone.tokens, alone.positions)
    expected, _ = token_logps(output, alone.tokens, temperature=0.7, start=3)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def widened(batch, columns):
    """The batch with this many more columns of padding."""
    fills = {"tokens": 1, "positions": -1, "loss_weights": 0, "advantages": 9}
    fills |= {"old_logps": -1, "ref_logps": -1}
    wide = {
        name: jnp.pad(getattr(batch, name), ((0, 0), (0, columns)), constant_values=fill)
        for name, fill in fills.items()
    }
    return dataclasses.replace(batch, **wide)


def test_columns_that_no_completion_reaches_change_nothing():
    """With a real model and groups, update and scores are equal to those without the columns."""
    optimizer, model = optax.sgd(1.0), build_model(CONFIG)
    state = fresh_state(init_params(CONFIG, jax.random.PRNGKey(0)), optimizer)
    close = dataclasses.replace(grouped(random_batch(), 4), group_size=4)
    wide = widened(close, 30)
    update = compiled(model.forward, LossConfig(micro_batches=2))
    assert_trees_close(update(state, wide), update(state, close), rtol=1e-3, atol=1e-5)
    score = make_scorer(model.forward, start=3, micro_batches=2, group_size=4)
    got, expected = (
        score(state.params, batch.tokens, batch.positions, jnp.float32(0.7))
        for batch in (wide, close)
    )
    real = np.asarray(close.positions) >= 0
    np.testing.assert_allclose(got[:, : close.tokens.shape[1]][real], expected[real], atol=1e-5)


def test_the_prompt_of_a_group_is_computed_once():
    """Four rows of 20 tokens that share the first 15: 35 tokens to compute, not 80."""
    model = build_model(CONFIG)
    state = fresh_state(init_params(CONFIG, jax.random.PRNGKey(0)), optax.sgd(1.0))
    alone = grouped(random_batch(time=20, prompt=15), 4)
    together = dataclasses.replace(alone, group_size=4)

    def flops(function, *arguments):
        return function.lower(*arguments).cost_analysis()["flops"]

    update = compiled(model.forward, LossConfig())
    assert flops(update, state, together) < 0.6 * flops(update, state, alone)
    sharing, plain = (make_scorer(model.forward, start=15, group_size=size) for size in (4, 1))
    rows = (state.params, alone.tokens, alone.positions, jnp.float32(0.7))
    assert flops(sharing, *rows) < 0.6 * flops(plain, *rows)


def width_model(params, tokens, positions):
    """The odds of token 0 depend on the number of columns."""
    del positions
    odds = params["w"] * jnp.float32(tokens.shape[1])
    return jnp.zeros((*tokens.shape, 2)).at[:, :, 0].set(odds)


def test_a_micro_batch_is_trimmed_to_its_longest_completion():
    """To one of the widths 34, 42 and 50, which the output of the model reveals."""
    lengths, tokens = np.array([18, 30, 42, 34, 46, 14]), jnp.ones((6, 50), jnp.int32)
    positions = jnp.asarray(np.where(np.arange(50) < lengths[:, None], np.arange(50), -1))
    params = {"w": jnp.float32(0.1)}
    # Micro-batch m has the rows m and m + 3.
    score = make_scorer(width_model, start=10, micro_batches=3)
    logps = score(params, tokens, positions, jnp.float32(1.0))
    widths = np.array([34, 50, 42, 34, 50, 42])
    np.testing.assert_allclose(logps[:, 10], -np.log1p(np.exp(widths / 10)), rtol=1e-5)
    assert logps.shape == (6, 50)
    np.testing.assert_array_equal((np.asarray(logps) != 0).sum(axis=1), widths - 10)
    weights = jnp.zeros((6, 50)).at[:, 10].set(1.0)
    batch = SftBatch(tokens=tokens, positions=positions, loss_weights=weights, prompt_length=10)
    update = jax.jit(make_sft_step(width_model, optax.sgd(1.0), micro_batches=3))
    _, metrics = update(fresh_state(params, optax.sgd(1.0)), batch)
    np.testing.assert_allclose(metrics["loss"], -np.mean(logps[:, 10]), rtol=1e-5)


def test_short_completions_are_not_trimmed():
    tokens, positions = jnp.ones((1, 20), jnp.int32), jnp.where(jnp.arange(20) < 12, 0, -1)[None]
    score = make_scorer(width_model, start=10)
    logps = score({"w": jnp.float32(0.1)}, tokens, positions, jnp.float32(1.0))
    np.testing.assert_allclose(logps[:, 10], -np.log1p(np.exp(2)), rtol=1e-5)


def test_micro_batches_keep_groups_whole():
    """Four groups of four rows in two parts: the groups 0 and 2, then 1 and 3."""
    parts = split_rows(jnp.arange(16), 2, 4)
    np.testing.assert_array_equal(parts[0], [0, 1, 2, 3, 8, 9, 10, 11])
    np.testing.assert_array_equal(parts[1], [4, 5, 6, 7, 12, 13, 14, 15])
    with pytest.raises(ValueError, match="16 rows in groups of 4 do not divide into micro_batches"):
        split_rows(jnp.arange(16), 8, 4)


def two_updates(mesh):
    """Two updates of a real model, with AdamW and two micro-batches; the first batch is trimmed."""
    optimizer = optax.adamw(1e-2, eps=1e-4)
    state = fresh_state(init_params(CONFIG, jax.random.PRNGKey(0)), optimizer)
    update = make_update_step(build_model(CONFIG).forward, optimizer, LossConfig(micro_batches=2))
    step = jit_update_step(update, mesh, state)
    state, _ = step(state, widened(random_batch(0), 30))
    return step(state, imitating(constant(random_batch(1))))


@pytest.fixture(scope="module")
def on_one_device():
    return two_updates(make_mesh(1, 1, 1, jax.devices()[:1]))


SLOW_MESHES = [pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((8, 1, 1), (1, 1, 8))]


@pytest.mark.parametrize("sizes", [(2, 2, 2), *SLOW_MESHES])
def test_eight_devices_equal_one(sizes, on_one_device):
    mesh = make_mesh(*sizes)
    state, metrics = two_updates(mesh)
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(state))
    assert state.params["layers"]["down"].sharding.is_fully_replicated == (sizes == (8, 1, 1))
    assert_trees_close((state, metrics), on_one_device, rtol=1e-3, atol=1e-5)


def test_the_caller_decides_the_sharding_of_parameters_with_other_names():
    """By default they and their moments would be replicated."""
    mesh, optimizer = make_mesh(fsdp=-1), optax.adam(1e-2)

    def forward(params, tokens, positions):
        return params["table"][tokens]

    state = fresh_state({"table": jnp.ones((16, 16))}, optimizer)
    update = make_update_step(forward, optimizer, LossConfig())
    whole = NamedSharding(mesh, PartitionSpec())
    shared = NamedSharding(mesh, PartitionSpec("fsdp"))
    layout = jax.tree.map(lambda x: shared if x.ndim == 2 else whole, state)
    tokens = jnp.arange(64).reshape(8, 8) % 16
    batch = TrainBatch(
        tokens=tokens,
        positions=jnp.tile(jnp.arange(8), (8, 1)),
        loss_weights=jnp.ones((8, 8)),
        advantages=jnp.ones((8, 8)),
        old_logps=jnp.zeros((8, 8)),
    )
    after, _ = jit_update_step(update, mesh, state, layout)(state, batch)
    assert after.params["table"].sharding == shared
    assert after.opt_state[0].mu["table"].sharding == shared


def test_one_compilation_for_all_steps():
    """Temperature, KL weight and learning rate may change from step to step without a new trace."""
    traces = 0

    def counted(params, tokens, positions):
        nonlocal traces
        traces += 1
        return factored(params, tokens, positions)

    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)
    state = fresh_state(random_params(), optimizer)
    update = make_update_step(counted, optimizer, LossConfig(micro_batches=2))
    step = jit_update_step(update, make_mesh(1, 1, 1, jax.devices()[:1]), state)
    losses, first = [], None
    for i in range(4):
        batch = dataclasses.replace(random_batch(), temperature=0.5 + i / 4, kl_coef=0.1 * i)
        state.opt_state.hyperparams["learning_rate"] = jnp.float32(1e-2 / (i + 1))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        first = first or traces
    assert traces == first
    assert len(set(losses)) == 4
    assert state.step == 4


def test_the_state_is_donated():
    """Its buffers are reused by the result, so that memory holds one state, not two."""
    optimizer = optax.adam(1e-2)
    state = fresh_state(random_params(), optimizer)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    step = jit_update_step(make_update_step(factored, optimizer, LossConfig()), mesh, state)
    step(state, random_batch())
    assert state.params["head"].is_deleted()


def test_a_few_updates_raise_the_probability_of_a_rewarded_token():
    """Token 3 has advantage +1, every other token -1."""
    optimizer = optax.adam(0.1)
    state = fresh_state(random_params(), optimizer)
    batch = dataclasses.replace(random_batch(), ref_logps=None, temperature=1.0)
    good = batch.tokens == 3
    batch = dataclasses.replace(batch, advantages=jnp.where(good, 1.0, -1.0))
    update = jax.jit(make_update_step(factored, optimizer, LossConfig()))

    def probability(params):
        logits = params["embed"] @ params["head"]
        return float(jax.nn.softmax(logits, axis=-1)[:, 3].mean())

    before = probability(state.params)
    for _ in range(10):
        state, _ = update(state, batch)
    assert probability(state.params) > 2 * before


def sft_batch():
    batch = random_batch()
    return SftBatch(
        tokens=batch.tokens,
        positions=batch.positions,
        loss_weights=batch.loss_weights,
        prompt_length=batch.prompt_length,
    )


def test_sft_gradient_equals_that_of_the_naive_formula():
    batch, params = sft_batch(), random_params()
    optimizer = optax.sgd(1.0)

    def naive(params):
        table = jax.nn.log_softmax(params["embed"][batch.tokens[:, :-1]] @ params["head"], axis=-1)
        logps = jnp.take_along_axis(table, batch.tokens[:, 1:, None], axis=-1)[:, :, 0]
        return -(batch.loss_weights[:, 1:] * logps).sum() / batch.loss_weights.sum()

    loss, grads = jax.jit(jax.value_and_grad(naive))(params)
    for micro_batches in (1, 4):
        update = make_sft_step(factored, optimizer, micro_batches=micro_batches)
        new, metrics = jax.jit(update)(fresh_state(params, optimizer), batch)
        assert set(metrics) == {"loss", "grad_norm", "tokens"}
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        assert_trees_close(new.params, jax.tree.map(jnp.subtract, params, grads))
        assert metrics["tokens"] == batch.loss_weights.sum()


def test_sft_checks_its_micro_batches():
    with pytest.raises(ValueError, match="micro_batches=0: expected at least 1"):
        make_sft_step(factored, optax.sgd(1.0), micro_batches=0)


def test_sft_on_a_mesh_equals_one_device():
    optimizer = optax.adam(1e-2, eps=1e-4)
    update = make_sft_step(factored, optimizer, micro_batches=2)
    results = []
    for mesh in (make_mesh(1, 1, 1, jax.devices()[:1]), make_mesh(2, 2, 2)):
        state = fresh_state(random_params(), optimizer)
        results.append(jit_update_step(update, mesh, state)(state, sft_batch()))
    assert_trees_close(results[1], results[0])


def pair_model(params, tokens, positions, **sharing):
    """A bigram model that expects the keyword arguments of pairs with a shared prompt."""
    assert sharing == {"prompt_length": 3, "group_size": 2}
    return factored(params, tokens, positions)


def dpo_batch(seed=0, rows=2 * B):
    """Pairs of completions of different lengths with a shared prompt."""
    batch = grouped(random_batch(seed, rows=rows), 2)
    fields = ("tokens", "positions", "loss_weights", "ref_logps")
    return DpoBatch(**{name: getattr(batch, name) for name in fields}, prompt_length=3)


def dpo(batch, forward=pair_model, micro_batches=1, params=None):
    """One update by plain SGD."""
    optimizer = optax.sgd(1.0)
    update = make_dpo_step(forward, optimizer, beta=0.3, micro_batches=micro_batches)
    return jax.jit(update)(fresh_state(params or random_params(), optimizer), batch)


def test_one_dpo_update_by_hand():
    """Two tokens with p = 1/2 under both models: the loss is log 2, the factor is beta / 2.

    The chosen token is 1 and the rejected one 0, both after a 0; the gradient of a log-probability
    is +-1/2.
    """
    optimizer = optax.sgd(1.0)
    state = fresh_state({"table": jnp.zeros((2, 2))}, optimizer)
    batch = DpoBatch(
        tokens=jnp.array([[0, 1], [0, 0]]),
        positions=jnp.array([[0, 1], [0, 1]]),
        loss_weights=jnp.array([[0.0, 1.0], [0.0, 1.0]]),
        ref_logps=jnp.full((2, 2), -np.log(2.0), dtype=jnp.float32),
    )
    step = make_dpo_step(lambda *args, **_: bigram(*args), optimizer, beta=0.4)
    new, metrics = jax.jit(step)(state, batch)
    np.testing.assert_allclose(new.params["table"], [[-0.2, 0.2], [0, 0]], rtol=1e-6, atol=1e-7)
    want = {"loss": np.log(2), "accuracy": 0, "margin": 0, "chosen": 0, "rejected": 0, "tokens": 2}
    want |= {"grad_norm": np.sqrt(2 * 0.2**2)}
    assert set(metrics) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    again = jax.jit(step)(new, batch)[1]
    np.testing.assert_allclose(again["margin"], 0.4 * 0.4, rtol=1e-5)  # logits 0.4 apart
    assert again["accuracy"] == 1
    assert again["loss"] < metrics["loss"]


def naive_dpo(params, batch):
    """The definition, from the full logits, pair by pair."""
    table = jax.nn.log_softmax(params["embed"][batch.tokens[:, :-1]] @ params["head"], axis=-1)
    logps = jnp.take_along_axis(table, batch.tokens[:, 1:, None], axis=-1)[:, :, 0]
    losses = []
    for m in range(0, len(batch.tokens), 2):
        pi, ref = (
            [(batch.loss_weights[i, 1:] * x[i]).sum() for i in (m, m + 1)]
            for x in (logps, batch.ref_logps[:, 1:])
        )
        losses.append(jnp.log1p(jnp.exp(-0.3 * ((pi[0] - ref[0]) - (pi[1] - ref[1])))))
    return jnp.stack(losses).mean()


def test_dpo_gradient_equals_that_of_the_naive_formula():
    batch, params = dpo_batch(), random_params()
    loss, grads = jax.jit(jax.value_and_grad(naive_dpo))(params, batch)
    for micro_batches in (1, 2, 8):
        new, metrics = dpo(batch, micro_batches=micro_batches)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        assert_trees_close(new.params, jax.tree.map(jnp.subtract, params, grads))
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
        assert metrics["tokens"] == batch.loss_weights.sum()
        np.testing.assert_allclose(
            metrics["margin"], metrics["chosen"] - metrics["rejected"], rtol=1e-4
        )


def test_dpo_ignores_reference_values_outside_the_completions():
    batch = dpo_batch()
    junk = jnp.where(batch.loss_weights == 0, jnp.nan, batch.ref_logps)
    dirty = dpo(dataclasses.replace(batch, ref_logps=junk))
    for a, b in zip(jax.tree.leaves(dpo(batch)), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)


def test_dpo_with_more_padding_changes_nothing():
    """On both sides, with a model that has context."""
    batch, left, right = dpo_batch(), 4, 3

    def pad(x, fill):
        return jnp.pad(x, ((0, 0), (left, right)), constant_values=fill)

    def forward(*args, **_):
        return averaging(*args)

    wider = dataclasses.replace(
        batch,
        tokens=pad(batch.tokens, 5),
        positions=pad(batch.positions, -1),
        loss_weights=pad(batch.loss_weights, 0),
        ref_logps=pad(batch.ref_logps, -9),
        prompt_length=batch.prompt_length + left,
    )
    assert_trees_close(dpo(wider, forward), dpo(batch, forward))


def test_dpo_pairs_that_share_their_prompts_change_nothing():
    """With a real model and two pairs per prompt, the update equals that of independent rows."""
    model = build_model(CONFIG)
    params = init_params(CONFIG, jax.random.PRNGKey(0))
    batch = dataclasses.replace(grouped(dpo_batch(rows=B), 4), group_size=4)

    def alone(params, tokens, positions, **_):
        return model.forward(params, tokens, positions)

    results = [dpo(batch, forward, 2, params) for forward in (model.forward, alone)]
    assert_trees_close(*results, rtol=1e-3, atol=1e-5)


def test_dpo_on_a_mesh_equals_one_device():
    optimizer = optax.adam(1e-2, eps=1e-4)
    update = make_dpo_step(pair_model, optimizer, micro_batches=2)
    results = []
    for mesh in (make_mesh(1, 1, 1, jax.devices()[:1]), make_mesh(8), make_mesh(2, 2, 2)):
        state = fresh_state(random_params(), optimizer)
        results.append(jax.device_get(jit_update_step(update, mesh, state)(state, dpo_batch())))
    for result in results[1:]:
        assert_trees_close(result, results[0])


def test_dpo_errors():
    for change, message in (
        ({"beta": 0.0}, "beta=0.0: expected a value above 0"),
        ({"micro_batches": 0}, "micro_batches=0: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_dpo_step(pair_model, optax.sgd(1.0), **change)
    with pytest.raises(ValueError, match="group_size=3: expected pairs, an even number"):
        dpo(dataclasses.replace(dpo_batch(), group_size=3))
    with pytest.raises(ValueError, match="12 rows in groups of 2 do not divide into micro_batches"):
        dpo(dpo_batch(rows=12), micro_batches=4)
