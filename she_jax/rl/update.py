"""Pure update steps, for any model.

A model is a function ``forward(params, tokens, positions)`` that returns logits [B, T, V] or an
``LMOutput``. For a batch with a ``group_size`` above 1 it also receives ``prompt_length`` and
``group_size`` by keyword, and for an ``SftBatch`` with a ``mask`` that ``mask`` (see
``she_jax.models.decoder.Model.forward``). Unless completions are
short, it is traced for several lengths T, those of ``WIDTHS``: columns at the end in which no row
has a token (a position >= 0) are dropped. Parameters are any tree of arrays. ``make_update_step``
returns a function of (state, batch) and nothing else; ``jit_update_step`` compiles it for a mesh.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from she_jax.models.sharding import batch_sharding, shardings
from she_jax.rl.checks import checked, model_output
from she_jax.rl.logprobs import MAXIMA, fused_loss, token_logps
from she_jax.rl.losses import LossConfig, check_train_batch, dpo_loss, policy_loss, sft_loss
from she_jax.types import DpoBatch, LMOutput, OrmBatch, SftBatch, TrainBatch, TrainState

Forward = Callable[..., Array | LMOutput]
Metrics = dict[str, Float[Array, ""]]
Batch = TypeVar("Batch", TrainBatch, SftBatch, DpoBatch, OrmBatch)
# (params, batch) -> (sum of the loss, {"count": its denominator, and more sums or maxima}), with
# "weight" if the metrics have another denominator.
LossSum = Callable[[Any, Any], tuple[Float[Array, ""], Metrics]]
Result = TypeVar("Result")

# A micro-batch is trimmed to its longest completion, rounded up to one of these fractions of the
# maximum completion length. Few, since each is compiled; below ``MIN_TRIMMED`` columns only 1.0.
WIDTHS = (0.6, 0.8, 1.0)
MIN_TRIMMED = 32


def make_update_step(
    forward: Forward, optimizer: optax.GradientTransformation, loss_config: LossConfig
) -> Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]:
    """Makes one policy update: the gradient of ``policy_loss`` over a batch, and an optimizer step.

    Gradients of micro-batches are summed in float32 and divided once, by the sum of the weights or
    of the batch's ``denominator``, so the result does not depend on how the batch is split.

    Args:
      forward: the model, ``forward(params, tokens [B, T], positions [B, T])``, which returns logits
        [B, T, V] or an ``LMOutput``. If the batch has a ``group_size`` above 1, it is called with
        ``prompt_length`` and ``group_size`` by keyword too: rows of a group are equal before
        ``prompt_length``, so that it may compute that part once, or ignore both.
      optimizer: any optax transformation; ``state.opt_state`` is its ``init(params)``.
      loss_config: clip range and number of micro-batches.

    Returns:
      A pure function (state, batch) -> (state, metrics). It raises ValueError if the batch does not
      divide into the micro-batches, or ``forward`` does not take or return the above.
      ``state.step`` increases by one; ``state.key`` is unchanged, since nothing here is random (the
      sampler folds the step into it). Metrics are scalars: the weighted means ``pg_loss``, ``kl``,
      ``entropy``, ``ratio``, ``clip_low``, ``clip_high`` and ``logp_gap``; ``loss``, divided by the
      sum of ``denominator`` instead if the batch has it; ``logp_gap_max``; ``grad_norm`` (before
      the optimizer clips it) and ``tokens`` (number of tokens with nonzero weight). A batch without
      weight has loss 0 and gradient 0.
    """

    def loss(logps: Array, entropy: Array, batch: TrainBatch) -> tuple[Array, Metrics]:
        (total, count), metrics = policy_loss(logps, batch, loss_config)
        entropy = (batch.loss_weights * jnp.where(batch.loss_weights != 0, entropy, 0.0)).sum()
        return total, metrics | {"entropy": entropy, "weight": count}

    def loss_sum(params: Any, batch: TrainBatch) -> tuple[Float[Array, ""], Metrics]:
        sharing = _prompt_sharing(batch.prompt_length, batch.group_size)
        output = model_output(forward, params, batch.tokens, batch.positions, **sharing)
        # A row is counted once, not once per chunk of its tokens.
        total, metrics = fused_loss(output, replace(batch, denominator=None), loss)
        count = metrics["weight"] if batch.denominator is None else batch.denominator.sum()
        return total, metrics | {"count": count}

    @checked
    def update(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        check_train_batch(batch)
        state, metrics = gradient_step(loss_sum, optimizer, state, batch, loss_config.micro_batches)
        return state, metrics | {"tokens": _trained_tokens(batch)}

    return update


def make_sft_step(
    forward: Forward, optimizer: optax.GradientTransformation, *, micro_batches: int = 1
) -> Callable[[TrainState, SftBatch], tuple[TrainState, Metrics]]:
    """Makes one step of supervised fine-tuning: as ``make_update_step``, with ``sft_loss``.

    Args:
      forward: the model.
      optimizer: any optax transformation; ``state.opt_state`` is its ``init(params)``.
      micro_batches: number of parts in which the batch is processed, >= 1.

    Returns:
      A pure function (state, batch) -> (state, metrics), with the metrics ``loss``, ``grad_norm``
      and ``tokens``.

    Raises:
      ValueError: if ``micro_batches`` is below 1.
    """
    if micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches}: expected at least 1")

    def loss(logps: Array, _: Array, batch: SftBatch) -> tuple[Array, Metrics]:
        total, count = sft_loss(logps, batch.loss_weights)
        return total, {"count": count}

    def loss_sum(params: Any, batch: SftBatch) -> tuple[Float[Array, ""], Metrics]:
        attention_mask = {} if batch.mask is None else {"mask": batch.mask}
        output = model_output(forward, params, batch.tokens, batch.positions, **attention_mask)
        return fused_loss(output, replace(batch, mask=None), loss)

    @checked
    def update(state: TrainState, batch: SftBatch) -> tuple[TrainState, Metrics]:
        state, metrics = gradient_step(loss_sum, optimizer, state, batch, micro_batches)
        return state, metrics | {"tokens": _trained_tokens(batch)}

    return update


def make_dpo_step(
    forward: Forward,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.1,
    micro_batches: int = 1,
) -> Callable[[TrainState, DpoBatch], tuple[TrainState, Metrics]]:
    """Makes one step of direct preference optimization: as ``make_update_step``, with ``dpo_loss``.

    Args:
      forward: the model; it receives ``prompt_length`` and ``group_size``, since the rows of a pair
        share their prompt.
      optimizer: any optax transformation; ``state.opt_state`` is its ``init(params)``.
      beta: see ``dpo_loss``, > 0.
      micro_batches: number of parts in which the batch is processed, >= 1.

    Returns:
      A pure function (state, batch) -> (state, metrics), with the metrics ``loss``, ``accuracy``,
      ``margin``, ``chosen``, ``rejected`` (means over the pairs, see ``dpo_loss``), ``grad_norm``
      and ``tokens``. It raises ValueError if ``group_size`` is odd, or the batch does not divide
      into the micro-batches.

    Raises:
      ValueError: if ``beta`` is not above 0 or ``micro_batches`` is below 1.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta}: expected a value above 0")
    if micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches}: expected at least 1")

    def loss_sum(params: Any, batch: DpoBatch) -> tuple[Float[Array, ""], Metrics]:
        sharing = _prompt_sharing(batch.prompt_length, batch.group_size)
        output = model_output(forward, params, batch.tokens, batch.positions, **sharing)
        logps, _ = token_logps(output, batch.tokens, start=batch.prompt_length)
        policy, reference = (
            (batch.loss_weights * jnp.where(batch.loss_weights != 0, x, 0.0)).sum(axis=1)
            for x in (logps, batch.ref_logps)
        )
        pairs = policy[0::2], policy[1::2], reference[0::2], reference[1::2]
        (total, count), metrics = dpo_loss(*pairs, beta=beta)
        return total, metrics | {"count": count}

    @checked
    def update(state: TrainState, batch: DpoBatch) -> tuple[TrainState, Metrics]:
        if batch.group_size % 2:
            raise ValueError(f"group_size={batch.group_size}: expected pairs, an even number")
        state, metrics = gradient_step(loss_sum, optimizer, state, batch, micro_batches)
        return state, metrics | {"tokens": _trained_tokens(batch)}

    return update


def make_scorer(
    forward: Forward, *, start: int, micro_batches: int = 1, group_size: int = 1
) -> Callable[[Any, Array, Array, Array], Float32[Array, "B T"]]:
    """Makes the compiled function that scores given tokens: their log-probabilities under a model.

    Args:
      forward: the model, such as a reference policy's.
      start: first token of interest, see ``token_logps``.
      micro_batches: number of parts in which the batch is processed, >= 1.
      group_size: number of contiguous rows that are equal before ``start``, see ``TrainBatch``.

    Returns:
      (params, tokens [B, T], positions [B, T], temperature) -> log-probabilities, 0 before
      ``start`` and undefined on padding (positions of -1). It raises ValueError if the batch does
      not divide into the micro-batches.
    """

    @jax.jit
    def score(params: Any, tokens: Array, positions: Array, temperature: Array) -> Array:
        def forward_logps(rows: Sequence[Array]) -> Array:
            output = model_output(forward, params, *rows, **_prompt_sharing(start, group_size))
            logps, _ = token_logps(output, rows[0], temperature=temperature, start=start)
            return jnp.pad(logps, ((0, 0), (0, tokens.shape[1] - logps.shape[1])))

        def trimmed(rows: Sequence[Array]) -> Array:
            return _apply_trimmed(forward_logps, rows, rows[1], start)

        parts = [split_rows(leaf, micro_batches, group_size) for leaf in (tokens, positions)]
        logps = jax.lax.map(trimmed, parts).reshape(micro_batches, -1, group_size, tokens.shape[1])
        return logps.swapaxes(0, 1).reshape(tokens.shape)

    return score


def jit_update_step(
    update: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    mesh: Mesh,
    state: TrainState,
    layout: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compiles an update for a mesh. The state is donated: use the returned one.

    Parameters and optimizer state are sharded by ``she_jax.models.sharding``, the rows of the batch
    over the mesh's ``data`` and ``fsdp`` axes. Metrics are replicated. One device is a mesh of one.

    Args:
      update: from ``make_update_step``, ``make_sft_step``, ``make_dpo_step`` or
        ``she_jax.rewards.orm.loss``.
      mesh: the devices, with the axes ``data``, ``fsdp`` and ``tensor``.
      state: a state of the right shapes; its values are ignored.
      layout: the sharding of each leaf of the state. Needed for parameters whose names differ from
        this package's, which are replicated by default.

    Returns:
      The compiled update. It compiles once per batch shape. Temperature, KL weight and anything in
      the optimizer's state (a learning rate of ``optax.inject_hyperparams``) may change from call
      to call.
    """
    layout = shardings(state, mesh) if layout is None else layout
    row_sharding = batch_sharding(mesh)

    def sharded_update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(x, row_sharding) if jnp.ndim(x) else x, batch
        )
        return update(state, batch)

    compiled = jax.jit(
        sharded_update,
        in_shardings=(layout, None),
        out_shardings=(layout, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    # A state that is not yet on the mesh would cost an extra compilation; one that is passes
    # through.
    return lambda state, batch: compiled(jax.device_put(state, layout), batch)


def gradient_step(
    loss_sum: LossSum,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    micro_batches: int,
) -> tuple[TrainState, Metrics]:
    """Applies the gradient of sum / count over a batch: the common part of every update here.

    Args:
      loss_sum: (params, batch) -> (sum, metrics) of a micro-batch. The metrics are sums. ``count``
        among them divides everything, once at the end; a ``weight`` among them, if present, divides
        the metrics except the loss instead.
      optimizer: any optax transformation.
      state: the state to update.
      batch: rows in groups of its ``group_size``.
      micro_batches: number of parts in which the batch is processed, >= 1.

    Returns:
      The next state, and the metrics with ``loss`` and ``grad_norm``.

    Raises:
      ValueError: if the batch does not divide into the micro-batches.
    """
    grads, metrics = _accumulate(loss_sum, state.params, batch, micro_batches)
    count, loss = metrics.pop("count"), metrics.pop("loss")
    inverse_count, inverse_weight = _inverse(count), _inverse(metrics.pop("weight", count))
    metrics = {k: v if k in MAXIMA else v * inverse_weight for k, v in metrics.items()}
    metrics["loss"] = loss * inverse_count
    grads = jax.tree.map(lambda g: g * inverse_count, grads)
    metrics["grad_norm"] = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = TrainState(step=state.step + 1, params=params, opt_state=opt_state, key=state.key)
    return state, metrics


def _inverse(count: Float[Array, ""]) -> Float[Array, ""]:
    """1 / count, or 0 if the count is 0."""
    return jnp.where(count > 0, 1.0 / jnp.where(count > 0, count, 1.0), 0.0)


def _trained_tokens(batch: TrainBatch | SftBatch | DpoBatch) -> Float32[Array, ""]:
    """Number of tokens with nonzero weight."""
    return (batch.loss_weights != 0).sum().astype(jnp.float32)


def _accumulate(
    loss_sum: LossSum, params: Any, batch: Batch, micro_batches: int
) -> tuple[Any, Metrics]:
    """Sums gradients and metrics over micro-batches, in float32."""

    def loss_and_grad(part: Any) -> tuple[tuple[Array, Metrics], Any]:
        return jax.value_and_grad(loss_sum, has_aux=True)(params, part)

    def add_micro_batch(carry: tuple[Any, Metrics], part: Any) -> tuple[tuple[Any, Metrics], None]:
        if packed:
            (total, metrics), grads = loss_and_grad(part)
        else:
            (total, metrics), grads = _apply_trimmed(loss_and_grad, part, part.positions, start)
        metrics = metrics | {"loss": total}
        sums = jax.tree.map(lambda total, g: total + g.astype(jnp.float32), carry[0], grads)
        merged = {
            k: (jnp.maximum if k in MAXIMA else jnp.add)(carry[1][k], v) for k, v in metrics.items()
        }
        return (sums, merged), None

    group_size, start = getattr(batch, "group_size", 1), getattr(batch, "prompt_length", 1)
    packed = getattr(batch, "mask", None) is not None  # packed rows have little padding to trim
    parts = jax.tree.map(lambda x: split_rows(x, micro_batches, group_size), batch)
    _, shapes = jax.eval_shape(loss_sum, params, jax.tree.map(lambda x: x[0], parts))
    zeros = {k: jnp.zeros((), dtype=jnp.float32) for k in (*shapes, "loss")}
    grads = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype=jnp.float32), params)
    return jax.lax.scan(add_micro_batch, (grads, zeros), parts)[0]


def _apply_trimmed(
    fn: Callable[[Any], Result], rows: Any, positions: Int[Array, "B T"], start: int
) -> Result:
    """Returns ``fn(rows)``, computed without most of the columns after the last token.

    No token attends to these columns and none of them may have a weight, so the result is the same.

    Args:
      fn: its result has the same shape for any number of columns.
      rows: any tree with leaves [B, T], [B] and [].
      positions: positions of the tokens, -1 on padding.
      start: the columns before this index are always kept.
    """
    length = positions.shape[1]
    completion_length = length - start
    fractions = WIDTHS if completion_length >= MIN_TRIMMED else (1.0,)
    widths = sorted({start + math.ceil(share * completion_length) for share in fractions})
    used_length = jnp.max(jnp.where(positions >= 0, jnp.arange(1, length + 1), 0))

    def trimmed(width: int) -> Callable[[Any], Result]:
        return lambda rows: fn(jax.tree.map(lambda x: x[:, :width] if x.ndim > 1 else x, rows))

    index = jnp.searchsorted(jnp.asarray(widths), used_length)
    return jax.lax.switch(index, [trimmed(width) for width in widths], rows)


def _prompt_sharing(prompt_length: int, group_size: int) -> dict[str, int]:
    """Keyword arguments for a model that can share a group's prompt; none for any other batch."""
    return {"prompt_length": prompt_length, "group_size": group_size} if group_size > 1 else {}


def split_rows(leaf: Any, micro_batches: int, group_size: int = 1) -> Array:
    """Moves micro-batches to a leading axis: [B, ...] to [M, B / M, ...], and a scalar to [M].

    Micro-batch m has the groups m, m + M, m + 2M, ...: if the rows are sharded over devices in
    blocks, each device then holds its share of every micro-batch.

    Raises:
      ValueError: if the groups do not divide.
    """
    leaf = jnp.asarray(leaf)
    if leaf.ndim == 0:
        return jnp.broadcast_to(leaf, (micro_batches,))
    rows = leaf.shape[0]
    if rows % (micro_batches * group_size):
        raise ValueError(
            f"{rows} rows in groups of {group_size} do not divide into "
            f"micro_batches={micro_batches}: change one of them so that they do"
        )
    parts = leaf.reshape(-1, micro_batches, group_size, *leaf.shape[1:]).swapaxes(0, 1)
    return parts.reshape(micro_batches, -1, *leaf.shape[1:])
