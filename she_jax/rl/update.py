"""The pure update step, for any model.

A model enters as ``forward(params, tokens, positions)``, which returns logits [B, T, V] or an
``LMOutput``; where a batch says that its groups share their prompts, it is told ``prompt_length``
and ``group_size`` by name too (see ``she_jax.models.transformer.Model.forward``). It is traced for
several lengths T, those of ``WIDTHS``, where there is room for them: columns at the end in which no
row has a token (a position of 0 or more) are left out. Parameters are any tree of arrays.
``make_update_step`` returns a function of (state, batch) and nothing else; ``jit_update_step``
compiles it for a mesh.
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
from she_jax.rl.head import MAXIMA, fused_loss, token_logps
from she_jax.rl.losses import LossConfig, dpo_loss, policy_loss, sft_loss
from she_jax.types import DpoBatch, LMOutput, OutcomeBatch, SftBatch, TrainBatch, TrainState

Forward = Callable[..., Array | LMOutput]
Metrics = dict[str, Float[Array, ""]]
Batch = TypeVar("Batch", TrainBatch, SftBatch, DpoBatch, OutcomeBatch)
# (params, batch) -> (sum of the loss, {"count": what to divide it by, and more sums or maxima}),
# with "weight" where the metrics are divided by something else.
LossSum = Callable[[Any, Any], tuple[Float[Array, ""], Metrics]]
Result = TypeVar("Result")

# A micro-batch is read as far as its longest completion: to one of these shares of the room that
# there is. Few, as each is compiled; and where there is room for less than ``NARROW`` columns, one.
WIDTHS = (0.6, 0.8, 1.0)
NARROW = 32


def make_update_step(
    forward: Forward, optimizer: optax.GradientTransformation, loss_config: LossConfig
) -> Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]:
    """Makes one policy update: the gradient of ``policy_loss`` over a batch, and the optimizer's
    step.

    Micro-batches add up sums of gradients in float32, which are divided once by the sum of the
    weights, or of the batch's ``counts``: however the batch is cut, the result is the same.

    Args:
      forward: the model.
      optimizer: any optax transformation; ``state.opt_state`` is its ``init(params)``.
      loss_config: clip range and number of micro-batches.

    Returns:
      A pure function (state, batch) -> (state, metrics). It raises ValueError if the batch does not
      divide into the micro-batches. ``state.step`` goes up by one; ``state.key`` is handed on as it
      is, since nothing here is random (who samples folds the step into it). Metrics are scalars:
      ``loss``, ``pg_loss``, ``kl``, ``entropy``, ``ratio``, ``clip_low``, ``clip_high``,
      ``logp_gap`` (means by weight; the loss alone is divided by ``counts`` where the batch has
      them), ``logp_gap_max``, ``grad_norm`` (before the optimizer clips it) and ``tokens`` (how
      many carry weight). A batch without weight has loss 0 and gradient 0.
    """

    def loss(logps: Array, entropy: Array, batch: TrainBatch) -> tuple[Array, Metrics]:
        (total, count), metrics = policy_loss(logps, batch, loss_config)
        entropy = (batch.weights * jnp.where(batch.weights != 0, entropy, 0.0)).sum()
        return total, metrics | {"entropy": entropy, "weight": count}

    def loss_sum(params: Any, batch: TrainBatch) -> tuple[Float[Array, ""], Metrics]:
        shared = _shared(batch.prompt_length, batch.group_size)
        output = forward(params, batch.tokens, batch.positions, **shared)
        # A row has its count once, not once a chunk of its tokens.
        total, metrics = fused_loss(output, replace(batch, counts=None), loss)
        count = metrics["weight"] if batch.counts is None else batch.counts.sum()
        return total, metrics | {"count": count}

    def update(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        state, metrics = gradient_step(loss_sum, optimizer, state, batch, loss_config.micro_batches)
        return state, metrics | {"tokens": _trained(batch)}

    return update


def make_sft_step(
    forward: Forward, optimizer: optax.GradientTransformation, *, micro_batches: int = 1
) -> Callable[[TrainState, SftBatch], tuple[TrainState, Metrics]]:
    """Makes one step of supervised fine-tuning: as ``make_update_step``, with ``sft_loss``.

    Args:
      forward: the model.
      optimizer: any optax transformation; ``state.opt_state`` is its ``init(params)``.
      micro_batches: the batch is worked through in this many parts, >= 1.

    Returns:
      A pure function (state, batch) -> (state, metrics), with the metrics ``loss``, ``grad_norm``
      and ``tokens``.

    Raises:
      ValueError: if ``micro_batches`` is below 1.
    """
    if micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches}: expected at least 1")

    def loss(logps: Array, _: Array, batch: SftBatch) -> tuple[Array, Metrics]:
        total, count = sft_loss(logps, batch.weights)
        return total, {"count": count}

    def loss_sum(params: Any, batch: SftBatch) -> tuple[Float[Array, ""], Metrics]:
        seen = {} if batch.mask is None else {"mask": batch.mask}
        output = forward(params, batch.tokens, batch.positions, **seen)
        return fused_loss(output, replace(batch, mask=None), loss)

    def update(state: TrainState, batch: SftBatch) -> tuple[TrainState, Metrics]:
        state, metrics = gradient_step(loss_sum, optimizer, state, batch, micro_batches)
        return state, metrics | {"tokens": _trained(batch)}

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
      forward: the model; it is told ``prompt_length`` and ``group_size``, since the rows of a pair
        share their prompt.
      optimizer: any optax transformation; ``state.opt_state`` is its ``init(params)``.
      beta: see ``dpo_loss``, > 0.
      micro_batches: the batch is worked through in this many parts, >= 1.

    Returns:
      A pure function (state, batch) -> (state, metrics), with the metrics ``loss``, ``accuracy``,
      ``margin``, ``chosen``, ``rejected`` (means over the pairs, see ``dpo_loss``), ``grad_norm``
      and ``tokens``. It raises ValueError if a group is no whole number of pairs, or the batch
      does not divide into the micro-batches.

    Raises:
      ValueError: if ``beta`` is not above 0 or ``micro_batches`` is below 1.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta}: expected a value above 0")
    if micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches}: expected at least 1")

    def loss_sum(params: Any, batch: DpoBatch) -> tuple[Float[Array, ""], Metrics]:
        shared = _shared(batch.prompt_length, batch.group_size)
        output = forward(params, batch.tokens, batch.positions, **shared)
        logps, _ = token_logps(output, batch.tokens, start=batch.prompt_length)
        policy, reference = (
            (batch.weights * jnp.where(batch.weights != 0, x, 0.0)).sum(axis=1)
            for x in (logps, batch.ref_logps)
        )
        pairs = policy[0::2], policy[1::2], reference[0::2], reference[1::2]
        (total, count), metrics = dpo_loss(*pairs, beta=beta)
        return total, metrics | {"count": count}

    def update(state: TrainState, batch: DpoBatch) -> tuple[TrainState, Metrics]:
        if batch.group_size % 2:
            raise ValueError(f"group_size={batch.group_size}: expected pairs, an even number")
        state, metrics = gradient_step(loss_sum, optimizer, state, batch, micro_batches)
        return state, metrics | {"tokens": _trained(batch)}

    return update


def make_scorer(
    forward: Forward, *, start: int, micro_batches: int = 1, group_size: int = 1
) -> Callable[[Any, Array, Array, Array], Float32[Array, "B T"]]:
    """Makes the compiled function that gives log-probabilities of given tokens, a reference's say.

    Args:
      forward: the model.
      start: first token of interest, see ``token_logps``.
      micro_batches: the batch is worked through in this many parts, >= 1.
      group_size: so many rows share what stands before ``start``, see ``TrainBatch``.

    Returns:
      (params, tokens [B, T], positions [B, T], temperature) -> log-probabilities, 0 before
      ``start`` and of no meaning where there is no token, at positions of -1. It raises ValueError
      if the batch does not divide into the micro-batches.
    """

    @jax.jit
    def score(params: Any, tokens: Array, positions: Array, temperature: Array) -> Array:
        def read(rows: Sequence[Array]) -> Array:
            output = forward(params, *rows, **_shared(start, group_size))
            logps, _ = token_logps(output, rows[0], temperature=temperature, start=start)
            return jnp.pad(logps, ((0, 0), (0, tokens.shape[1] - logps.shape[1])))

        def part(rows: Sequence[Array]) -> Array:
            return _read_to_the_end(read, rows, rows[1], start)

        parts = [split_rows(leaf, micro_batches, group_size) for leaf in (tokens, positions)]
        logps = jax.lax.map(part, parts).reshape(micro_batches, -1, group_size, tokens.shape[1])
        return logps.swapaxes(0, 1).reshape(tokens.shape)

    return score


def jit_update_step(
    update: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    mesh: Mesh,
    state: TrainState,
    layout: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compiles an update for a mesh. The state is donated: use the one that comes back.

    Parameters and optimizer state lie as ``she_jax.models.sharding`` says, the rows of the batch
    are shared out over the mesh's ``data`` and ``fsdp`` axes, metrics come back whole on every
    device. One device is a mesh of one.

    Args:
      update: from ``make_update_step``, ``make_sft_step``, ``make_dpo_step`` or
        ``she_jax.rl.scalar``.
      mesh: the devices, with the axes ``data``, ``fsdp`` and ``tensor``.
      state: a state of the right shape (its values are not read).
      layout: the sharding of each leaf of the state, for parameters that have other names than this
        package's, which are replicated by default.

    Returns:
      The compiled update. It compiles once a shape of batch; temperature, KL weight and anything in
      the optimizer's state (a learning rate of ``optax.inject_hyperparams``) may change from call
      to call.
    """
    layout = shardings(state, mesh) if layout is None else layout
    rows = batch_sharding(mesh)

    def placed(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(x, rows) if jnp.ndim(x) else x, batch
        )
        return update(state, batch)

    compiled = jax.jit(
        placed,
        in_shardings=(layout, None),
        out_shardings=(layout, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    # A state that does not yet lie on the mesh would cost a compilation of its own; one that does
    # passes through.
    return lambda state, batch: compiled(jax.device_put(state, layout), batch)


def gradient_step(
    loss_sum: LossSum,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    micro_batches: int,
) -> tuple[TrainState, Metrics]:
    """The gradient of sum / count over a batch, applied: what every update of this package does.

    Args:
      loss_sum: (params, batch) -> (sum, metrics), of a micro-batch; ``count`` among the metrics,
        which are sums, is what everything is divided by once at the end; where there is a
        ``weight`` among them, the metrics but for the loss are divided by that instead.
      optimizer: any optax transformation.
      state: where to start.
      batch: rows of groups of its ``group_size``.
      micro_batches: the batch is worked through in this many parts, >= 1.

    Returns:
      The next state, and the metrics with ``loss`` and ``grad_norm``.

    Raises:
      ValueError: if the batch does not divide into the micro-batches.
    """
    grads, metrics = _accumulate(loss_sum, state.params, batch, micro_batches)
    count, loss = metrics.pop("count"), metrics.pop("loss")
    scale, by_weight = _inverse(count), _inverse(metrics.pop("weight", count))
    metrics = {k: v if k in MAXIMA else v * by_weight for k, v in metrics.items()}
    metrics["loss"] = loss * scale
    grads = jax.tree.map(lambda g: g * scale, grads)
    metrics["grad_norm"] = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = TrainState(step=state.step + 1, params=params, opt_state=opt_state, key=state.key)
    return state, metrics


def _inverse(count: Float[Array, ""]) -> Float[Array, ""]:
    """1 / count; 0 where there is nothing to divide by."""
    return jnp.where(count > 0, 1.0 / jnp.where(count > 0, count, 1.0), 0.0)


def _trained(batch: TrainBatch | SftBatch | DpoBatch) -> Float32[Array, ""]:
    """How many tokens carry weight."""
    return (batch.weights != 0).sum().astype(jnp.float32)


def _accumulate(
    loss_sum: LossSum, params: Any, batch: Batch, micro_batches: int
) -> tuple[Any, Metrics]:
    """Sums of gradients and metrics over micro-batches, in float32."""

    def graded(part: Any) -> tuple[tuple[Array, Metrics], Any]:
        return jax.value_and_grad(loss_sum, has_aux=True)(params, part)

    def one(carry: tuple[Any, Metrics], part: Any) -> tuple[tuple[Any, Metrics], None]:
        if packed:
            (total, metrics), grads = graded(part)
        else:
            (total, metrics), grads = _read_to_the_end(graded, part, part.positions, start)
        metrics = metrics | {"loss": total}
        sums = jax.tree.map(lambda total, g: total + g.astype(jnp.float32), carry[0], grads)
        merged = {
            k: (jnp.maximum if k in MAXIMA else jnp.add)(carry[1][k], v) for k, v in metrics.items()
        }
        return (sums, merged), None

    group_size, start = getattr(batch, "group_size", 1), getattr(batch, "prompt_length", 1)
    packed = getattr(batch, "mask", None) is not None  # rows of several texts are full anyway
    parts = jax.tree.map(lambda x: split_rows(x, micro_batches, group_size), batch)
    _, shapes = jax.eval_shape(loss_sum, params, jax.tree.map(lambda x: x[0], parts))
    zeros = {k: jnp.zeros((), dtype=jnp.float32) for k in (*shapes, "loss")}
    grads = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype=jnp.float32), params)
    return jax.lax.scan(one, (grads, zeros), parts)[0]


def _read_to_the_end(
    read: Callable[[Any], Result], rows: Any, positions: Int[Array, "B T"], start: int
) -> Result:
    """``read(rows)`` without the columns behind the last token, or without most of them.

    No token looks at these, and none of them may have weight: so the result is the same.

    Args:
      read: its result has one shape, however many columns it is given.
      rows: any tree with leaves [B, T], [B] and [].
      positions: of the tokens, -1 on padding.
      start: the columns before this index are always read.
    """
    length = positions.shape[1]
    room = length - start
    shares = WIDTHS if room >= NARROW else (1.0,)
    widths = sorted({start + math.ceil(share * room) for share in shares})
    needed = jnp.max(jnp.where(positions >= 0, jnp.arange(1, length + 1), 0))

    def up_to(width: int) -> Callable[[Any], Result]:
        return lambda rows: read(jax.tree.map(lambda x: x[:, :width] if x.ndim > 1 else x, rows))

    which = jnp.searchsorted(jnp.asarray(widths), needed)
    return jax.lax.switch(which, [up_to(width) for width in widths], rows)


def _shared(prompt_length: int, group_size: int) -> dict[str, int]:
    """What a model that can share a group's prompt has to know; nothing for any other batch."""
    return {"prompt_length": prompt_length, "group_size": group_size} if group_size > 1 else {}


def split_rows(leaf: Any, micro_batches: int, group_size: int = 1) -> Array:
    """Puts the micro-batches on a leading axis: [B, ...] to [M, B / M, ...]; a scalar to [M].

    Micro-batch m has the groups m, m + M, m + 2M, ...: of rows that lie in blocks on several
    devices, each device then holds its share of every micro-batch.

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
