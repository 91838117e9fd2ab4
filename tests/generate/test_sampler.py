"""The sampler: its distribution, its recorded log-probabilities, and its cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from she_jax.generate.draw import draw_tokens
from she_jax.generate.sampler import jit_sample, sample
from she_jax.models.decoder import Model, ModelConfig, build_model, init_params
from she_jax.models.sharding import make_mesh, shardings
from she_jax.types import PromptBatch

CONFIG = ModelConfig(vocab_size=24, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=32)
MODEL = build_model(CONFIG)
FORWARD = jax.jit(MODEL.forward)
PAD, EOS, NEW, GROUP = 0, 1, 7, 4
STATIC = {"group_size": GROUP, "max_new_tokens": NEW, "eos_id": EOS, "pad_id": PAD}


@functools.cache
def params():
    """Weights large enough that the distributions are far from uniform."""
    return jax.tree.map(lambda leaf: 4.0 * leaf, init_params(CONFIG, jax.random.key(0)))


def prompts():
    """Three prompts of 5, 3 and 1 tokens; the first holds the pad id as a real token."""
    tokens = jnp.array([[3, PAD, 7, 9, 4], [PAD, PAD, 5, 6, 7], [PAD, PAD, PAD, PAD, 8]])
    return PromptBatch(tokens=tokens, mask=jnp.arange(5)[None] >= jnp.array([[0], [2], [4]]))


@functools.cache
def sampler(**changes):
    """A compiled sampler, shared by the tests that need the same."""
    return jit_sample(MODEL, **(STATIC | changes))


def roll(seed=1, temperature=1.0, top_p=1.0, **changes):
    return sampler(**changes)(params(), prompts(), jax.random.key(seed), temperature, top_p)


def full_logps(rollout, temperature=1.0):
    """Log-probs of the rollout's tokens by the uncached forward, zero outside completions."""
    mask = rollout.prompt_mask | rollout.completion_mask
    positions = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1)
    output = FORWARD(params(), rollout.tokens, positions)
    logps = jax.nn.log_softmax(output.hidden @ output.head / temperature)
    taken = jnp.take_along_axis(logps[:, :-1], rollout.tokens[:, 1:, None], axis=2)[..., 0]
    return jnp.where(rollout.completion_mask, jnp.pad(taken, ((0, 0), (1, 0))), 0.0), logps


def test_the_layout_of_a_rollout():
    """Group rows are contiguous and carry their prompt; masks cover prompt and completion."""
    rollout = roll()
    assert rollout.tokens.shape == (3 * GROUP, 5 + NEW)
    for name in ("tokens", "prompt_mask"):
        source = prompts().tokens if name == "tokens" else prompts().mask
        prompt_part = getattr(rollout, name)[:, :5]
        np.testing.assert_array_equal(prompt_part, jnp.repeat(source, GROUP, axis=0))
    assert not rollout.prompt_mask[:, 5:].any()
    assert not rollout.completion_mask[:, :5].any()
    assert rollout.completion_mask[:, 5].all()
    assert (rollout.logps[~rollout.completion_mask] == 0).all()
    assert (rollout.logps[rollout.completion_mask] < 0).all()


@pytest.mark.parametrize("top_k", [0, 3])
def test_greedy_takes_the_most_probable_token(top_k):
    """Temperature 0 is the full forward's argmax, pad apart, with log-probs at temperature 1."""
    rollout = roll(temperature=0.0, top_k=top_k)
    expected, logps = full_logps(rollout)
    best = jnp.argmax(logps.at[:, :, PAD].set(-jnp.inf), axis=2)[:, :-1]
    drawn = rollout.completion_mask[:, 1:]
    np.testing.assert_array_equal(best[drawn], rollout.tokens[:, 1:][drawn])
    np.testing.assert_allclose(rollout.logps, expected, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"top_k": 5, "top_p": 0.7}, {"temperature": 0.6}])
def test_recorded_logps_are_those_of_the_full_forward(settings):
    """With top-k, top-p or temperature, they equal the trainer's for the same tokens."""
    rollout = roll(**settings)
    expected, _ = full_logps(rollout, settings.get("temperature", 1.0))
    np.testing.assert_allclose(rollout.logps, expected, atol=1e-5)


def chi_square(tokens, probs):
    """The statistic in standard deviations from its mean, rare entries taken together."""
    expected = probs * tokens.size
    counts = np.bincount(np.asarray(tokens), minlength=probs.size)
    assert not counts[probs == 0].any()
    often = expected >= 5
    counts = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], max(expected[~often].sum(), 1e-9))
    degrees = len(counts) - 1
    statistic = ((counts - expected) ** 2 / np.maximum(expected, 1.0)).sum()
    return (statistic - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize(
    ("vocab", "top_k", "top_p"),
    [(24, 0, 1.0), (1000, 0, 1.0), (5003, 0, 1.0), (24, 10, 1.0), (24, 10, 0.6), (1000, 10, 0.6)],
)
def test_draws_follow_the_distribution(vocab, top_k, top_p):
    """Chi-square against the exact distribution; the sizes are not multiples of the blocks."""
    temperature, banned, count = 1.3, 3, 20_000
    logits = np.random.default_rng(0).normal(size=vocab).astype(np.float32) * 2
    logits[banned] = logits.max() + 1
    exact = np.exp(logits.astype(np.float64) / temperature)
    exact[banned] = 0.0
    order = np.argsort(-exact)
    if top_k:
        exact[order[top_k:]] = 0.0
    exact /= exact.sum()
    nucleus = np.cumsum(exact[order])
    exact[order[1:][nucleus[:-1] >= top_p]] = 0.0
    exact /= exact.sum()

    @jax.jit
    def draw(logits, uniform):  # as an argument: XLA takes minutes to fold the top k of a constant
        rows = jnp.broadcast_to(logits, (500, vocab))
        return draw_tokens(rows, uniform, temperature, top_p, top_k=top_k, banned=banned)[0]

    uniform = np.random.default_rng(1).random((count // 500, 500), dtype=np.float32)
    tokens = np.concatenate([draw(logits[None], rows) for rows in uniform])
    assert abs(chi_square(tokens, exact)) < 4


def test_inversion_at_the_ends_of_the_unit_interval():
    """0 and the largest uniform fall on entries that have probability, with any neighbors."""
    logits = jnp.full((2, 300), -jnp.inf).at[:, jnp.array([5, 207])].set(0.0)
    uniform = jnp.array([0.0, 1 - 2.0**-24])
    tokens, logps = draw_tokens(logits, uniform, 1.0)
    np.testing.assert_array_equal(tokens, [5, 207])
    np.testing.assert_allclose(logps, np.log([0.5, 0.5]), rtol=1e-6)
    tokens, _ = draw_tokens(logits, uniform, 1.0, banned=207)
    np.testing.assert_array_equal(tokens, [5, 5])


def test_greedy_takes_the_first_of_equal_logits_with_and_without_top_k():
    logits = jnp.zeros((1, 40)).at[0, jnp.array([7, 30])].set(2.0)
    for top_k in (0, 4):
        tokens, _ = draw_tokens(logits, jnp.array([0.99]), 0.0, top_k=top_k)
        assert tokens[0] == 7


def test_early_exit_equals_the_full_length():
    """The loop stops when all rows have ended, and they equal those of a loop that continues."""
    every = tuple(range(2, CONFIG.vocab_size))
    rollout = roll(eos_id=every)
    turns = []

    class Counting(Model):
        def decode(self, params, tokens, *rest):
            jax.debug.callback(lambda: turns.append(1))
            return super().decode(params, tokens, *rest)

    counting = Counting(config=CONFIG, graph=MODEL.graph)
    settings = {"group_size": GROUP, "max_new_tokens": NEW, "temperature": 1.0, "pad_id": PAD}
    run = jax.jit(functools.partial(sample, counting, eos_id=every, **settings))
    run(params(), prompts(), jax.random.key(1))
    jax.effects_barrier()
    longest = int(rollout.completion_mask.sum(axis=1).max())
    assert len(turns) == longest < NEW
    long = roll(eos_id=CONFIG.vocab_size)  # a token that is never drawn
    assert long.completion_mask[:, 5:].all()
    kept = rollout.completion_mask
    np.testing.assert_array_equal(rollout.tokens[kept], long.tokens[kept])
    np.testing.assert_allclose(rollout.logps[kept], long.logps[kept], atol=1e-6)


@pytest.mark.parametrize("group_size", [1, GROUP])
def test_a_loop_with_compactions_equals_the_plain_one(group_size):
    """Rows that have ended leave the batch, and the rest are the same as in the whole batch."""
    ends = (EOS, 5, 9, 14)
    rows = []

    class Recording(Model):
        def decode(self, params, tokens, *rest):
            jax.debug.callback(lambda: rows.append(tokens.shape[0]))
            return super().decode(params, tokens, *rest)

    batch = jax.tree.map(lambda leaf: jnp.repeat(leaf, GROUP // group_size, axis=0), prompts())
    settings = {"group_size": group_size, "max_new_tokens": NEW, "eos_id": ends, "pad_id": PAD}
    plain = jit_sample(MODEL, **settings)(params(), batch, jax.random.key(3), 1.0)
    recording = Recording(config=CONFIG, graph=MODEL.graph)
    compacted = jit_sample(recording, **settings, compactions=3)(
        params(), batch, jax.random.key(3), 1.0
    )
    jax.effects_barrier()
    left = [int((plain.completion_mask.sum(axis=1) > turn).sum()) for turn in range(1, NEW)]
    expected = [min(size for size in (12, 6, 3, 1) if size >= count) for count in left if count]
    assert rows[1:] == expected
    assert set(expected) >= {12, 6}
    np.testing.assert_array_equal(compacted.tokens, plain.tokens)
    np.testing.assert_array_equal(compacted.completion_mask, plain.completion_mask)
    np.testing.assert_allclose(compacted.logps, plain.logps, atol=1e-5)


def test_other_keys_and_rows_of_a_group_give_other_samples():
    first, second = roll(seed=1), roll(seed=2)
    assert (first.tokens != second.tokens).any()
    np.testing.assert_array_equal(first.tokens, roll(seed=1).tokens)
    for group in first.tokens.reshape(3, GROUP, -1):
        assert len(np.unique(group, axis=0)) > 1


def test_steps_and_rows_draw_independently():
    """With equal logits a token is uncorrelated with the next in its row and with the next row."""
    flat = jax.tree.map(jnp.zeros_like, params())
    run = sampler(group_size=300, eos_id=CONFIG.vocab_size)
    drawn = np.asarray(run(flat, prompts(), jax.random.key(5), 1.0).tokens)[:, 5:]
    even = np.full(CONFIG.vocab_size, 1 / (CONFIG.vocab_size - 1))
    even[PAD] = 0.0
    assert abs(chi_square(drawn.ravel(), even)) < 4
    for tokens, neighbors in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:])):
        correlation = np.corrcoef(tokens.ravel(), neighbors.ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(tokens.size)


@pytest.mark.parametrize(("axes", "compactions"), [({"data": -1}, 1), ({"data": 2, "fsdp": 4}, 0)])
def test_a_mesh_changes_nothing(axes, compactions):
    """Prompts sharded over all devices give the same rollouts, each device by itself or not."""
    count = len(jax.devices())
    batch = PromptBatch(
        tokens=jnp.arange(count * 4).reshape(count, 4) % CONFIG.vocab_size,
        mask=jnp.ones((count, 4), dtype=bool),
    )
    expected = sampler()(params(), batch, jax.random.key(1), 1.0)
    mesh = make_mesh(**axes)
    run = sampler(mesh=mesh, compactions=compactions)
    placed = jax.device_put(params(), shardings(params(), mesh))
    sharded = run(placed, batch, jax.random.key(1), 1.0)
    np.testing.assert_array_equal(sharded.tokens, expected.tokens)
    np.testing.assert_allclose(sharded.logps, expected.logps, atol=1e-4)
    assert sharded.tokens.addressable_shards[0].data.shape == (GROUP, 4 + NEW)


def test_trap_1_pad_id_is_never_sampled():
    """Even if it is the most probable token; masks come from lengths, not from token ids."""
    logits = jax.random.normal(jax.random.key(0), (500, 40)).at[:, PAD].set(500.0)
    uniform = jnp.linspace(0, 1, 500, endpoint=False)
    for top_k, temperature in ((0, 1.0), (4, 1.0), (0, 0.0), (4, 0.0)):
        tokens, logps = draw_tokens(logits, uniform, temperature, top_k=top_k, banned=PAD)
        assert (tokens != PAD).all()
        assert len(jnp.unique(tokens)) > 10
        np.testing.assert_allclose(
            logps,
            jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)[:, 0],
            rtol=1e-5,
        )
    rollout = roll()
    assert (rollout.tokens[rollout.completion_mask] != PAD).all()
    assert rollout.tokens[0, 1] == PAD
    assert rollout.prompt_mask[0, 1]
    np.testing.assert_array_equal(rollout.prompt_mask.sum(axis=1), np.repeat([5, 3, 1], GROUP))


def test_pad_id_that_is_the_eos_id_ends_a_row():
    """Some tokenizers have one id for both: then it is sampled, counted and ends the row."""
    rollout = roll(pad_id=EOS)
    ended = (rollout.tokens[:, 5:] == EOS).any(axis=1)
    assert ended.any()
    last = 4 + rollout.completion_mask.sum(axis=1)
    taken = jnp.take_along_axis(rollout.tokens, last[:, None], axis=1)[:, 0]
    assert (taken[ended] == EOS).all()


@pytest.mark.parametrize("eos_id", [EOS, (EOS, 2, 3)])
def test_trap_2_eos_belongs_to_the_completion(eos_id):
    """EOS is in the mask with its log-probability; after it there is padding only."""
    rollout = roll(eos_id=eos_id)
    ids = [eos_id] if isinstance(eos_id, int) else list(eos_id)
    lengths = []
    for tokens, mask, logps in zip(
        *(np.asarray(x)[:, 5:] for x in (rollout.tokens, rollout.completion_mask, rollout.logps)),
        strict=True,
    ):
        ends = np.flatnonzero(np.isin(tokens, ids))
        length = ends[0] + 1 if ends.size else NEW
        lengths.append(length)
        np.testing.assert_array_equal(mask, np.arange(NEW) < length)
        assert (logps[:length] < 0).all()
        assert (tokens[length:] == PAD).all()
        assert (logps[length:] == 0).all()
    assert min(lengths) < NEW


def test_trap_3_key_folds_in_the_step():
    key = jax.random.PRNGKey(0)
    rollouts = [
        sampler()(params(), prompts(), jax.random.fold_in(key, step), 1.0) for step in range(3)
    ]
    assert len({np.asarray(r.tokens).tobytes() for r in rollouts}) == 3


def test_trap_4_temperature_and_top_p_do_not_recompile():
    traces = []

    class Counting(Model):
        def init_cache(self, batch, length):
            traces.append(batch)
            return super().init_cache(batch, length)

    counting = Counting(config=CONFIG, graph=MODEL.graph)
    run = jit_sample(counting, group_size=2, max_new_tokens=3, eos_id=EOS, pad_id=PAD, top_k=4)
    for temperature, top_p in (
        (1.0, 1.0),
        (0.7, 0.9),
        (0.0, 1.0),
        (jnp.float32(0.5), jnp.float32(0.8)),
    ):
        run(params(), prompts(), jax.random.key(0), temperature, top_p)
    assert len(traces) == 2  # the cache of the prompts and that of the completions, once each


def test_trap_5_top_p_without_full_sort():
    """No array as long as the vocabulary is sorted: only the top k are ordered."""
    vocab, batch = 5003, 2

    def draw(logits, uniform, top_p):
        return draw_tokens(logits, uniform, 1.0, top_p, top_k=16, banned=0)

    logits, uniform = jnp.zeros((batch, vocab)), jnp.zeros(batch)
    program = list(primitives(jax.make_jaxpr(draw)(logits, uniform, 0.9).jaxpr))
    assert "top_k" in [name for name, _ in program]
    sorted_sizes = [max(sizes) for name, sizes in program if name == "sort"]
    assert all(size < vocab for size in sorted_sizes)
    full = jax.make_jaxpr(lambda x: jnp.sort(x, axis=1))(logits).jaxpr
    assert [max(sizes) for name, sizes in primitives(full) if name == "sort"] == [batch * vocab]
    compiled = jax.jit(draw).lower(logits, uniform, 0.9).compile().as_text()
    assert " sort(" not in compiled  # nor does the compiler turn the top k into a sort


def primitives(jaxpr):
    """Every primitive of a program, with the sizes of its inputs."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, [v.aval.size for v in equation.invars]
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def test_trap_7_prompts_prefilled_once():
    """The prompt pass reads N rows, not N * G; a token pass reads N * G rows of one token."""
    shapes = []

    class Recording(Model):
        def decode(self, params, tokens, *rest):
            shapes.append(tokens.shape)
            return super().decode(params, tokens, *rest)

    recording = Recording(config=CONFIG, graph=MODEL.graph)
    run = jit_sample(recording, **STATIC)
    grouped = run(params(), prompts(), jax.random.key(1), 1.0)
    assert shapes[0] == (3, 5)
    assert set(shapes[1:]) == {(3 * GROUP, 1)}
    repeated = jax.tree.map(lambda x: jnp.repeat(x, GROUP, axis=0), prompts())
    run = jit_sample(MODEL, group_size=1, max_new_tokens=NEW, eos_id=EOS, pad_id=PAD)
    apart = run(params(), repeated, jax.random.key(1), 1.0)
    np.testing.assert_array_equal(grouped.tokens, apart.tokens)
    np.testing.assert_allclose(grouped.logps, apart.logps, atol=1e-5)


def test_a_start_that_all_prompts_share_is_read_once():
    shapes = []

    class Recording(Model):
        def decode(self, params, tokens, *rest):
            shapes.append(tokens.shape)
            return super().decode(params, tokens, *rest)

    rows = [[6, PAD, 9, 3, PAD, 7, 9, 4], [0, 0, 6, PAD, 9, 5, 6, 7], [0, 0, 0, 0, 6, PAD, 9, 8]]
    mask = jnp.arange(8)[None] >= jnp.array([[0], [2], [4]])
    batch = PromptBatch(tokens=jnp.array(rows), mask=mask)
    plain = sampler()(params(), batch, jax.random.key(1), 1.0)
    recording = Recording(config=CONFIG, graph=MODEL.graph)
    split = jit_sample(recording, **STATIC, shared=3, compactions=1)
    apart = split(params(), batch, jax.random.key(1), 1.0)
    assert shapes[:2] == [(1, 3), (3, 5)]
    np.testing.assert_array_equal(apart.tokens, plain.tokens)
    np.testing.assert_array_equal(apart.prompt_mask, plain.prompt_mask)
    np.testing.assert_allclose(apart.logps, plain.logps, atol=1e-5)


def test_one_new_token():
    rollout = roll(max_new_tokens=1)
    assert rollout.tokens.shape == (3 * GROUP, 6)
    assert rollout.completion_mask[:, 5].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 0}, "group_size=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"compactions": -1}, "compactions=-1"),
        ({"top_p": 0.9}, "top_p=0.9 with top_k=0"),
        ({"top_p": 1.5, "top_k": 5}, "top_p=1.5"),
    ],
)
def test_invalid_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        roll(**change)
