"""The cost of an RL step, part by part, beside the peak rates of this machine.

    python benchmarks/rl_step.py                                     # the `tiny` work
    python benchmarks/rl_step.py --model=smollm2 --prompts=2 --micro=2  # the `smol` work

Prompts are random tokens and no completion ends early, so that the work is the same for every
implementation. Prints one JSON line. FLOPs are the model's: recomputation counts as time, not work.
"""

import dataclasses
import datetime
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from she_jax.generate.sampler import jit_sample
from she_jax.models.decoder import Model, ModelConfig, build_model, init_params
from she_jax.models.sharding import make_mesh, shardings
from she_jax.models.weights import load_model
from she_jax.rl.advantages import srpo_advantages, token_advantages
from she_jax.rl.losses import LossConfig
from she_jax.rl.update import jit_update_step, make_scorer, make_update_step
from she_jax.types import PromptBatch, Rollout, TrainBatch, TrainState

SECTIONS = ("rollout", "logprobs", "train", "step")
STEPS = 4  # reasoning steps of a completion, each a quarter of it

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "", "smollm2, a Hugging Face directory or a .gguf file; or the sizes:")
flags.DEFINE_integer("layers", 4, "Layers L.")
flags.DEFINE_integer("dim", 256, "Width D.")
flags.DEFINE_integer("ffn", 768, "Feed-forward width F.")
flags.DEFINE_integer("heads", 4, "Query heads H.")
flags.DEFINE_integer("kv_heads", 2, "Key-value heads J.")
flags.DEFINE_integer("head_dim", 64, "Head size K.")
flags.DEFINE_integer("vocab", 49_152, "Vocabulary V; the embedding is the head too.")
flags.DEFINE_integer("prompts", 8, "Prompts N.")
flags.DEFINE_integer("group", 8, "Rollouts per prompt G.")
flags.DEFINE_integer("prompt_len", 96, "Tokens of a prompt P.")
flags.DEFINE_integer("new_tokens", 96, "Tokens of a completion C.")
flags.DEFINE_string("dtype", "float32", "Of the computation; parameters are float32.")
flags.DEFINE_integer("micro", 4, "Micro-batches of the update and of scoring.")
flags.DEFINE_bool("remat", True, "Recompute layers in the backward pass.")
flags.DEFINE_bool("reference", False, "The whole step scores a reference policy too (KL).")
flags.DEFINE_float("ends", 0.0, "Share of the vocabulary that ends a completion; rollout only.")
flags.DEFINE_integer("compactions", 0, "How often a rollout drops finished rows.")
flags.DEFINE_float(
    "filled", 1.0, "Share of the C tokens that completions have; logprobs and train only."
)
flags.DEFINE_list(
    "sections", [*SECTIONS], "What to measure; alone, a section's peak memory is its own."
)
flags.DEFINE_integer("warmup", 1, "Calls before the clock runs, the first of which compiles.")
flags.DEFINE_integer("repeats", 3, "Calls on the clock.")


class Compilations:
    """The seconds of each of XLA's compilations."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, name: str, seconds: float, **_: Any) -> None:
        if "backend_compile" in name:
            self.seconds.append(seconds)


def timed(call: Callable[[], Any], compilations: Compilations) -> dict[str, Any]:
    """Seconds per call after the warm-up, compilations and peak memory."""
    heard = len(compilations.seconds)
    for _ in range(FLAGS.warmup):
        jax.block_until_ready(call())
    compiled = compilations.seconds[heard:]
    seconds = []
    for _ in range(FLAGS.repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    if len(compilations.seconds) > heard + len(compiled):
        raise RuntimeError("something was compiled while the clock ran: raise --warmup")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {
        "seconds": {
            "min": round(min(seconds), 4),
            "median": round(statistics.median(seconds), 4),
            "all": [round(s, 4) for s in seconds],
        },
        "compile_s": round(sum(compiled), 2),
        "compilations": len(compiled),
        "peak_rss_gib": round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2),
    }
    stats = jax.devices()[0].memory_stats() or {}  # None on the CPU
    if "peak_bytes_in_use" in stats:
        figures["peak_device_gib"] = round(stats["peak_bytes_in_use"] / 2**30, 2)
    return figures


def machine_rates(dtype: str) -> dict[str, float]:
    """FLOP/s of a large matrix product, and bytes/s of reading a large array, on all devices.

    Measured on one of the accelerators. Devices of the CPU share its cores, and one call takes all.
    """
    accelerator = jax.default_backend() != "cpu"
    size, elements = (8192, 1 << 29) if accelerator else (3072, 1 << 26)
    square = jnp.ones((size, size), dtype)
    long = jnp.ones(elements, jnp.float32)
    product = best(jax.jit(lambda x: x @ x), square)
    stream = best(jax.jit(jnp.sum), long)
    devices = jax.device_count() if accelerator else 1
    return {
        "matmul_flops_per_s": devices * 2 * size**3 / product,
        "bytes_per_s": devices * 4 * elements / stream,
    }


def best(call: Callable[[Any], Any], argument: Any) -> float:
    """Seconds of the fastest of ten calls."""
    jax.block_until_ready(call(argument))
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(call(argument))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs and bytes that the sizes need, whatever the implementation.

    A product of [n, a] and [a, b] is 2nab FLOPs. Attention counts the keys a query may look at.
    """

    config: ModelConfig
    prompts: int
    rows: int
    prompt_len: int
    new_tokens: int

    def _layers(self, rows: int, first: int, count: int) -> float:
        """FLOPs of ``count`` tokens a row from position ``first`` on, through the layers."""
        c = self.config
        attention = c.dim * c.head_dim * 2 * (c.heads + c.kv_heads)
        weights = c.layers * (attention + 3 * c.dim * c.ffn)
        keys = count * first + count * (count + 1) / 2
        return rows * (2 * weights * count + c.layers * 4 * c.heads * c.head_dim * keys)

    def _head(self, tokens: int) -> float:
        return 2.0 * tokens * self.config.dim * self.config.vocab_size

    def _prompts(self) -> float:
        return self._layers(self.prompts, 0, self.prompt_len)

    def rollout(self) -> float:
        """Each prompt read once, each completion decoded."""
        decoded = self._layers(self.rows, self.prompt_len, self.new_tokens - 1)
        head = self._head(self.prompts + self.rows * (self.new_tokens - 1))
        return self._prompts() + decoded + head

    def logprobs(self) -> float:
        """A forward pass: each prompt once, the head on the completions only."""
        completions = self._layers(self.rows, self.prompt_len, self.new_tokens)
        return self._prompts() + completions + self._head(self.rows * self.new_tokens)

    def train(self) -> float:
        """Forward and backward: three products where the forward pass has one."""
        return 3 * self.logprobs()

    def decode_bytes(self) -> float:
        """Weights once per token; the cache of a prompt once per group, of a completion per row."""
        c = self.config
        size = jnp.dtype(c.dtype).itemsize
        attention = c.dim * c.head_dim * 2 * (c.heads + c.kv_heads)
        weights = c.layers * (attention + 3 * c.dim * c.ffn) + c.vocab_size * c.dim
        turns = self.new_tokens - 1
        slots = self.prompts * turns * self.prompt_len + self.rows * turns * (turns + 1) / 2
        cache = slots * c.layers * 2 * c.kv_heads * c.head_dim
        return size * (turns * weights + cache)


def make_model() -> tuple[Model, Any]:
    """The model of the flags, with its parameters in float32."""
    options = {"dtype": FLAGS.dtype, "remat": FLAGS.remat}
    if FLAGS.model:
        loaded = load_model(FLAGS.model)
        return build_model(dataclasses.replace(loaded.config, **options)), loaded.params
    config = ModelConfig(
        vocab_size=FLAGS.vocab,
        dim=FLAGS.dim,
        layers=FLAGS.layers,
        heads=FLAGS.heads,
        kv_heads=FLAGS.kv_heads,
        head_dim=FLAGS.head_dim,
        ffn=FLAGS.ffn,
        **options,
    )
    return build_model(config), init_params(config, jax.random.PRNGKey(0))


def credit(rollout: Rollout, logps: jax.Array, reference: jax.Array | None) -> TrainBatch:
    """A cheap reward for each quarter of a completion, its share of even tokens; SRPO's batch."""
    rows, length = rollout.tokens.shape
    quarter = (np.arange(length) - FLAGS.prompt_len) * STEPS // FLAGS.new_tokens
    step_ids = np.broadcast_to(np.where(quarter < 0, -1, quarter), (rows, length))
    tokens = np.asarray(rollout.tokens)
    even = np.stack([(tokens[:, quarter == s] % 2 == 0).mean(axis=1) for s in range(STEPS)], axis=1)
    rewards = jnp.asarray(even, jnp.float32)
    advantages = srpo_advantages(
        rewards, rewards >= 0, rewards.mean(axis=1), group_size=FLAGS.group, critical="all"
    )
    return TrainBatch(
        tokens=rollout.tokens,
        positions=positions(rollout),
        loss_weights=rollout.completion_mask.astype(jnp.float32),
        advantages=token_advantages(advantages, jnp.asarray(step_ids), rollout.completion_mask),
        old_logps=logps,
        ref_logps=reference,
        temperature=jnp.float32(1.0),
        kl_coef=jnp.float32(0.01 if FLAGS.reference else 0.0),
        prompt_length=FLAGS.prompt_len,
        group_size=FLAGS.group,
    )


def positions(rollout: Rollout) -> jax.Array:
    """Position of each token in its row, -1 after the end."""
    mask = rollout.prompt_mask | rollout.completion_mask
    return jnp.where(mask, jnp.arange(mask.shape[1]), -1)


def measure() -> dict[str, Any]:
    """Runs the sections of the flags."""
    compilations = Compilations()
    rates = machine_rates(FLAGS.dtype)
    model, params = make_model()
    config, rows = model.config, FLAGS.prompts * FLAGS.group
    rng = np.random.default_rng(0)
    shape = (FLAGS.prompts, FLAGS.prompt_len)
    prompts = PromptBatch(
        tokens=jnp.asarray(rng.integers(10, config.vocab_size, shape), jnp.int32),
        mask=jnp.ones(shape, bool),
    )
    mesh = make_mesh(data=-1)
    # With a share of 0 no row ends early: the only id left is not in the vocabulary.
    ends = range(config.vocab_size - round(FLAGS.ends * config.vocab_size), config.vocab_size + 1)
    sample = jit_sample(
        model,
        group_size=FLAGS.group,
        max_new_tokens=FLAGS.new_tokens,
        eos_id=tuple(ends),
        pad_id=0,
        compactions=FLAGS.compactions,
        mesh=mesh,
    )
    score = make_scorer(
        model.forward, start=FLAGS.prompt_len, micro_batches=FLAGS.micro, group_size=FLAGS.group
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))
    state = TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.PRNGKey(0),
    )
    del params  # they are in the state, which is donated
    state = jax.device_put(state, shardings(state, mesh))
    update = jit_update_step(
        make_update_step(model.forward, optimizer, LossConfig(micro_batches=FLAGS.micro)),
        mesh,
        state,
    )
    length = FLAGS.prompt_len + FLAGS.new_tokens
    drawn = jnp.asarray(rng.integers(10, config.vocab_size, (rows, FLAGS.new_tokens)), jnp.int32)
    repeated = jnp.repeat(prompts.tokens, FLAGS.group, axis=0)
    fixed = jnp.concatenate([repeated, drawn], axis=1)
    slots, written = jnp.arange(length), round(FLAGS.filled * FLAGS.new_tokens)
    prompt = jnp.broadcast_to(slots < FLAGS.prompt_len, fixed.shape)
    completion = ~prompt & (slots < FLAGS.prompt_len + written)
    rollout = Rollout(
        tokens=fixed,
        prompt_mask=prompt,
        completion_mask=completion,
        logps=jnp.zeros(fixed.shape),
    )
    batch = credit(rollout, -10.0 * completion.astype(jnp.float32), None)
    reference = jax.tree.map(jnp.copy, state.params) if FLAGS.reference else None

    def train() -> Any:
        nonlocal state
        state, metrics = update(state, batch)
        return metrics

    def whole() -> Any:
        nonlocal state
        sampled = sample(state.params, prompts, jax.random.fold_in(state.key, state.step), 1.0)
        arguments = sampled.tokens, positions(sampled), jnp.float32(1.0)
        scores = score(reference, *arguments) if reference else None
        state, metrics = update(state, credit(sampled, sampled.logps, scores))
        return metrics

    calls = {
        "rollout": lambda: sample(state.params, prompts, jax.random.PRNGKey(1), 1.0),
        "logprobs": lambda: score(state.params, batch.tokens, batch.positions, jnp.float32(1.0)),
        "train": train,
        "step": whole,
    }
    work = Work(config, FLAGS.prompts, rows, FLAGS.prompt_len, written)
    forward = work.logprobs() if FLAGS.reference else 0.0
    flops = {
        "rollout": work.rollout(),
        "logprobs": work.logprobs(),
        "train": work.train(),
        "step": work.rollout() + forward + work.train(),
    }
    result: dict[str, Any] = {
        "work": {
            "model": FLAGS.model or dataclasses.asdict(config),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            **{n: FLAGS[n].value for n in ("prompts", "group", "prompt_len", "new_tokens")},
            **{n: FLAGS[n].value for n in ("dtype", "micro", "remat", "reference")},
            **{n: FLAGS[n].value for n in ("ends", "compactions", "filled")},
        },
        "machine": {
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "python": platform.python_version(),
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
            **{name: float(f"{rate:.4g}") for name, rate in rates.items()},
        },
    }
    for section in FLAGS.sections:
        figures = timed(calls[section], compilations)
        seconds = figures["seconds"]["median"]
        result[section] = figures
        if FLAGS.ends:  # the work depends on the sampled lengths
            lengths = np.asarray(calls["rollout"]().completion_mask.sum(axis=1))
            figures["tokens_per_s"] = round(float(lengths.sum()) / seconds, 1)
            figures["lengths"] = np.percentile(lengths, [0, 25, 50, 75, 100]).tolist()
            continue
        figures["tokens_per_s"] = round(rows * written / seconds, 1)
        figures["flops"] = float(f"{flops[section]:.4g}")
        rate = flops[section] / seconds
        figures["efficiency"] = round(rate / rates["matmul_flops_per_s"], 3)
        if section == "rollout":
            figures["bytes"] = float(f"{work.decode_bytes():.4g}")
            bandwidth = work.decode_bytes() / seconds
            figures["bytes_per_s"] = float(f"{bandwidth:.4g}")
            figures["bandwidth_share"] = round(bandwidth / rates["bytes_per_s"], 3)
    return result


def main(argv: list[str]) -> None:
    if unknown := set(FLAGS.sections) - set(SECTIONS):
        raise app.UsageError(f"--sections={sorted(unknown)}: expected some of {SECTIONS}")
    if FLAGS.ends and FLAGS.sections != ["rollout"]:
        raise app.UsageError("--ends is for --sections=rollout: the others need full completions")
    if FLAGS.filled < 1 and not set(FLAGS.sections) <= {"logprobs", "train"}:
        raise app.UsageError("--filled is for --sections=logprobs,train: a rollout writes all")
    print(json.dumps(measure()))


if __name__ == "__main__":
    app.run(main)
