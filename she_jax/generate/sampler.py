"""Sampling of rollout groups: each prompt is prefilled once, then decoded G times.

What all prompts begin with, such as an instruction, is prefilled once for all of them.

Letters in shapes are as in ``she_jax.types``, with C for the maximum number of new tokens, so that
T = P + C, and V for the size of the vocabulary.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Float32, Int, Shaped

from she_jax.generate.draw import draw_tokens
from she_jax.models.decoder import Model, take_rows
from she_jax.models.sharding import batch_sharding, check_batch
from she_jax.types import LMOutput, PromptBatch, Rollout


def sample(
    model: Model,
    params: Mapping[str, Any],
    prompts: PromptBatch,
    key: Array,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float | Float[Array, ""],
    eos_id: int | tuple[int, ...],
    pad_id: int,
    top_k: int = 0,
    top_p: float | Float[Array, ""] = 1.0,
    compactions: int = 0,
    shared: int = 0,
    axis: str | None = None,
) -> Rollout:
    """Samples ``group_size`` completions of every prompt; pure, compile it with ``jit_sample``.

    The token at completion index c of row b uses the b-th uniform drawn with ``fold_in(key, c)``,
    so a row does not depend on when other rows end. The same key gives the same rollouts, so fold
    the training step into it.

    ``logps`` are ``log_softmax(logits / temperature)`` over the whole vocabulary, as the trainer
    computes them. The sampling distribution is narrower (no pad id, top k, nucleus), and ``logps``
    leave its renormalization out.

    Args:
      model: the policy; static.
      params: its parameters.
      prompts: prompts padded on the left, each with at least one token.
      key: consumed.
      group_size: completions per prompt, G >= 1; static.
      max_new_tokens: C >= 1; static. Decoding stops early once every row has ended.
      temperature: divides the logits, >= 0. At 0 decoding is greedy, and ``logps`` are those at
        temperature 1. Traced.
      eos_id: the token, or tokens, that end a completion and belong to it; static.
      pad_id: fills a row after its end; never sampled, unless it is an ``eos_id`` too; static.
      top_k: sample among the k most probable tokens only; 0 for the whole vocabulary; static.
      top_p: sample among the smallest set of most probable tokens that holds this share of the top
        k's probability, in (0, 1]. Needs ``top_k``, since the whole vocabulary is never sorted.
        Traced; a traced value is ignored if ``top_k`` is 0.
      compactions: maximum number of times that, once half of the rows in the loop have ended,
        decoding continues with the other half only. The rollouts are the same, but sooner if a few
        are much longer than most. Each compiles the loop once more; static.
      shared: number of real tokens at the start of every prompt that are the same in all, fewer
        than any has; static.
      axis: of the mesh, over which the prompts are split, inside ``jax.shard_map``; the uniforms
        are those of the whole batch. None outside of it.

    Returns:
      B = N * G rows, those of a group contiguous.

    Raises:
      ValueError: if a size is out of range, or ``top_p`` is below 1 without ``top_k``.
    """
    _check_options(group_size, max_new_tokens, top_k, top_p, compactions)
    eos_ids = (eos_id,) if isinstance(eos_id, int) else eos_id
    banned = None if pad_id in eos_ids else pad_id
    count, prompt_length = prompts.tokens.shape
    batch = count * group_size

    def sample_tokens(
        hidden: Float[Array, "B D"], head: Float[Array, "D V"], rows: Array | None, done, step
    ):
        """Samples the tokens of the rows (None: all) at ``step``; also returns which have ended."""
        logits = jnp.einsum("bd,dv->bv", hidden, head, preferred_element_type=jnp.float32)
        uniform = _take(_uniforms(jax.random.fold_in(key, step), batch, axis), rows)
        token, logp = draw_tokens(logits, uniform, temperature, top_p, top_k=top_k, banned=banned)
        token = jnp.where(done, pad_id, token)
        ended = done | jnp.any(token[:, None] == jnp.asarray(eos_ids)[None], axis=1)
        return {"tokens": token, "mask": ~done, "logps": jnp.where(done, 0.0, logp)}, ended

    weights = model.decoding_params(params)
    # Each prompt is prefilled once; its group shares the keys and values.
    out, caches = prefill(model, weights, prompts, shared)
    hidden = jnp.repeat(out.hidden[:, -1], group_size, axis=0)
    lengths = jnp.repeat(prompts.mask.sum(axis=1), group_size)
    entries, done = sample_tokens(hidden, out.head, None, jnp.zeros(batch, bool), 0)
    fill = {"tokens": pad_id, "mask": False, "logps": 0.0}
    record = {
        name: jnp.full((batch, max_new_tokens), fill[name], new.dtype).at[:, 0].set(new)
        for name, new in entries.items()
    }
    cache = model.init_cache(batch, max(1, max_new_tokens - 1))  # the last token is never attended

    def decode_one(rows, prefixes, carry):
        """One iteration of the loop: feeds the last token of each active row, samples the next."""
        step, token, done, record, cache = carry
        positions = jnp.where(done, -1, _take(lengths, rows) + step - 1)[:, None]
        out, cache = model.decode(weights, token[:, None], positions, cache, step - 1, prefixes)
        entries, ended = sample_tokens(out.hidden[:, 0], out.head, rows, done, step)
        record = {
            name: jax.lax.dynamic_update_index_in_dim(record[name], new, step, axis=1)
            for name, new in entries.items()
        }
        return step + 1, entries["tokens"], ended, record, cache

    full_record, rows, prefixes = record, None, caches  # rows: those in the loop, None for all
    carry = (jnp.asarray(1), entries["tokens"], done, record, cache)
    for size in (*(batch >> h for h in range(1, compactions + 1) if batch >> h), 0):

        def more_active(carry, size=size):
            """Whether the loop continues: more than ``size`` of its rows have not ended."""
            step, _, done, _, _ = carry
            return (step < max_new_tokens) & ((~done).sum() > size)

        body = functools.partial(decode_one, rows, prefixes)
        step, token, done, record, cache = jax.lax.while_loop(more_active, body, carry)
        full_record = (
            record
            if rows is None
            else {name: full_record[name].at[rows].set(values) for name, values in record.items()}
        )
        if size:  # continue with the rows that have not ended, in their order
            active = jnp.argsort(done, stable=True)[:size]
            rows = active if rows is None else rows[active]
            prefixes = *caches[:-1], take_rows(caches[-1], rows // group_size)
            record = {name: values[active] for name, values in record.items()}
            carry = (step, token[active], done[active], record, take_rows(cache, active))

    tokens = jnp.repeat(prompts.tokens, group_size, axis=0).astype(jnp.int32)
    mask = jnp.repeat(prompts.mask, group_size, axis=0)
    return Rollout(
        tokens=jnp.concatenate([tokens, full_record["tokens"]], axis=1),
        prompt_mask=jnp.pad(mask, ((0, 0), (0, max_new_tokens))),
        completion_mask=jnp.pad(full_record["mask"], ((0, 0), (prompt_length, 0))),
        logps=jnp.pad(full_record["logps"], ((0, 0), (prompt_length, 0))),
    )


def prefill(
    model: Model, weights: Mapping[str, Any], prompts: PromptBatch, shared: int = 0
) -> tuple[LMOutput, tuple[dict[str, Any], ...]]:
    """Runs prompts through the model, their common start once.

    Args:
      model: the policy; static.
      weights: its parameters.
      prompts: padded on the left.
      shared: number of tokens of the common start, as for ``sample``; static.

    Returns:
      The output at the prompts' columns, less the first ``shared``, so that the last column is that
      of each prompt's last token; and the caches: that of the start (one row), if there is one, and
      that of the prompts.
    """
    positions = jnp.where(prompts.mask, jnp.cumsum(prompts.mask, axis=1) - 1, -1)
    tokens, caches = prompts.tokens[:, shared:], ()
    if shared:
        first = jnp.argmax(prompts.mask[0])
        start = jax.lax.dynamic_slice_in_dim(prompts.tokens[0], first, shared)[None]
        empty = model.init_cache(1, shared)
        _, cache = model.decode(weights, start, jnp.arange(shared)[None], empty, 0)
        caches = (cache,)
        positions = jnp.where(positions < shared, -1, positions)[:, shared:]
    empty = model.init_cache(*tokens.shape)
    out, cache = model.decode(weights, tokens, positions, empty, 0, caches)
    return out, (*caches, cache)


def _uniforms(key: Array, batch: int, axis: str | None) -> Float32[Array, "B"]:
    """One uniform a row; those of this device's rows among all, if they are split over an axis."""
    if axis is None:
        return jax.random.uniform(key, (batch,))
    parts = jax.lax.axis_size(axis)
    return jax.random.uniform(key, (parts, batch))[jax.lax.axis_index(axis)]


def _take(x: Shaped[Array, "B"], rows: Int[Array, "R"] | None) -> Shaped[Array, "..."]:
    """The given rows, or all; taking all by index would gather them across the mesh."""
    return x if rows is None else x[rows]


def _check_options(group_size: int, max_new_tokens: int, top_k: int, top_p: Any, compactions: int):
    if group_size < 1 or max_new_tokens < 1 or top_k < 0 or compactions < 0:
        raise ValueError(
            f"group_size={group_size}, max_new_tokens={max_new_tokens}, top_k={top_k}, "
            f"compactions={compactions}: expected at least 1, 1, 0 and 0"
        )
    if isinstance(top_p, int | float):
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p}: expected a share in (0, 1]")
        if top_p < 1 and top_k == 0:
            raise ValueError(f"top_p={top_p} with top_k=0: set top_k, top_p narrows the top k only")


def jit_sample(
    model: Model,
    *,
    group_size: int,
    max_new_tokens: int,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    top_k: int = 0,
    compactions: int = 0,
    shared: int = 0,
    mesh: Mesh | None = None,
) -> Callable[..., Rollout]:
    """Compiles ``sample``, once per shape of the prompts.

    Args:
      model, group_size, max_new_tokens, eos_id, pad_id, top_k, compactions, shared: as for
        ``sample``. ``compactions`` is ignored if a mesh shards the parameters, since rows would
        have to move between devices.
      mesh: prompts and rollouts are sharded over its ``data`` and ``fsdp`` axes; the parameters
        keep their sharding. Where each device has all parameters, each samples its own rows by
        itself, and ends with the last of them. None for one device.

    Returns:
      ``(params, prompts, key, temperature, top_p=1.0) -> Rollout``. It raises ValueError if the
      number of prompts is not divisible by the mesh.

    Raises:
      ValueError: as ``sample`` does.
    """
    eos_ids = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    row_sharding = batch_sharding(mesh) if mesh is not None else None
    alone = mesh is None or mesh.size == 1
    split = mesh is not None and not alone and mesh.shape["data"] == mesh.size

    def run(params, prompts, key, temperature, top_p):
        return sample(
            model,
            params,
            prompts,
            key,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_id=eos_ids,
            pad_id=pad_id,
            top_k=top_k,
            top_p=top_p,
            compactions=compactions if alone or split else 0,
            shared=shared,
            axis="data" if split else None,
        )

    if split:
        every, rows = PartitionSpec(), PartitionSpec("data")
        specs = (every, rows, every, every, every)
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    compiled = jax.jit(run, out_shardings=row_sharding)

    def sample_prompts(
        params: Mapping[str, Any],
        prompts: PromptBatch,
        key: Array,
        temperature: float | Float[Array, ""],
        top_p: float | Float[Array, ""] = 1.0,
    ) -> Rollout:
        _check_options(group_size, max_new_tokens, top_k, top_p, compactions)
        if mesh is not None:
            check_batch(prompts.tokens.shape[0], mesh)
            prompts = jax.device_put(prompts, row_sharding)
        # As arrays of one dtype, so that a Python number and an array share one compilation.
        return compiled(params, prompts, key, jnp.float32(temperature), jnp.float32(top_p))

    return sample_prompts
