"""From hidden states to token log-probabilities, and to a loss with its gradient, in chunks.

The output head is the largest product of a small model and ``[B, T, V]`` logits its largest array:
here they exist a chunk at a time. Index ``[b, t]`` speaks of the token at t, whose log-probability
comes from the model's output at t - 1; this module is the only one that shifts.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Shaped

from she_jax.types import LMOutput, SftBatch, TrainBatch

# Bytes of float32 logits in memory at a time. Small enough to be nothing beside the parameters,
# large enough that the head, read once a chunk, is not what a chunk waits for.
LOGITS_BYTES = 64 << 20

MAXIMA = ("logp_gap_max",)  # metrics that are no sums

AnyBatch = TypeVar("AnyBatch", TrainBatch, SftBatch)
# (logps [B, C], entropy [B, C], batch of these positions) -> (sum, metrics)
TokenLoss = Callable[[Any, Any, Any], tuple[Array, dict[str, Array]]]


def token_logps(
    output: Float[Array, "B T V"] | LMOutput,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    start: int = 1,
) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
    """Log-probability and entropy of every token from ``start`` on.

        logps[b, t] = log softmax(logits[b, t - 1] / temperature)[tokens[b, t]]

    Given an ``LMOutput`` the logits are formed in chunks of about ``LOGITS_BYTES``, once in the
    forward pass and once more in the backward pass, so that [B, T, V] never exists; the head's
    gradient is accumulated in float32. For a loss that is trained on, ``fused_loss`` forms them
    once.

    Args:
      output: logits, or hidden states with the head to multiply them by.
      tokens: token ids.
      temperature: divides the logits, > 0; taken as a constant by differentiation.
      start: first token of interest, in [1, T]; static. Positions before it are never multiplied
        out.

    Returns:
      Log-probabilities, and entropies in nats of the distributions they come from; both 0 before
      ``start``. The entropy is for looking at: no gradient flows through it.

    Raises:
      ValueError: if ``start`` is outside [1, T].
    """
    length = tokens.shape[1]
    _check_start(start, length)
    targets = jnp.asarray(tokens)[:, start:]
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, dtype=jnp.float32))
    if not isinstance(output, LMOutput):
        logps, _, entropy = _read(output[:, start - 1 : -1], targets, temperature)
    elif start == length:
        logps = entropy = jnp.zeros(targets.shape, dtype=jnp.float32)
    else:
        logps, entropy = _in_chunks(output, targets, temperature, start)
    prefix = ((0, 0), (start, 0))
    return jnp.pad(logps, prefix), jnp.pad(jax.lax.stop_gradient(entropy), prefix)


def fused_loss(
    output: Float[Array, "B T V"] | LMOutput, batch: AnyBatch, loss: TokenLoss
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """A loss over the tokens of a batch, its gradient formed in the same pass over the logits.

    The same as ``loss(*token_logps(output, batch.tokens, ...), batch)``. But given an ``LMOutput``
    the loss is differentiated chunk by chunk as soon as the chunk's log-probabilities are there,
    so that no logits are kept or formed a second time: one product with the head less of four.

    Args:
      output: logits, or hidden states with the head to multiply them by.
      batch: its fields [B, T] are cut along time like the logits, from ``prompt_length`` on. It has
        none of rows alone, which would be in every chunk: leave out the ``counts``.
      loss: (logps, entropy, batch) -> (sum, metrics), all of some of the positions. Sum and metrics
        are sums over tokens, those in ``MAXIMA`` maxima; a token of weight 0 takes no part. It must
        not close over arrays: what it needs stands in the batch.

    Returns:
      (sum, metrics) of all positions.

    Raises:
      ValueError: if ``prompt_length`` is outside [1, T].
    """
    start, temperature = batch.prompt_length, getattr(batch, "temperature", 1.0)
    count = batch.tokens.shape[1] - start
    if not isinstance(output, LMOutput) or not count:
        return loss(*token_logps(output, batch.tokens, temperature=temperature, start=start), batch)
    _check_start(start, batch.tokens.shape[1])
    size = _chunk_size(batch.tokens.shape[0], count, output.head.shape[1])
    hidden = _cut(output.hidden[:, start - 1 : -1], size)
    chunks = hidden.shape[0]
    parts = jax.tree.map(
        lambda x: _cut(x[:, start:], size) if jnp.ndim(x) else jnp.broadcast_to(x, (chunks,)),
        batch,
    )
    return _fused(loss, output.head, hidden, parts)


def _check_start(start: int, length: int):
    if not 1 <= start <= length:
        raise ValueError(
            f"start={start}: expected 1 (the first token has no prediction) to {length}"
        )


def _read(
    logits: Float[Array, "B C V"],
    targets: Int[Array, "B C"],
    temperature: float | Float[Array, ""],
) -> tuple[Float32[Array, "B C"], Float32[Array, "B C"], Float32[Array, "B C"]]:
    """Log-probabilities, log-normalisers and entropies, at the temperature."""
    logits = logits.astype(jnp.float32) / temperature
    chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
    peak = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    mass = jnp.exp(logits - peak)
    total = mass.sum(axis=-1)
    norm = jnp.log(total) + peak[:, :, 0]
    # A forbidden token has the logit -inf and the mass 0; 0 * -inf is no number.
    entropy = norm - jnp.where(mass > 0, mass * logits, 0.0).sum(axis=-1) / total
    return chosen - norm, norm, entropy


def _in_chunks(
    output: LMOutput, targets: Int[Array, "B C"], temperature: Float[Array, ""], start: int
) -> tuple[Float32[Array, "B C"], Float32[Array, "B C"]]:
    """Cuts the positions into equal chunks, and puts the results together again.

    It cuts along time, not along the batch, which is the axis that devices share out.
    """
    batch, count = targets.shape
    size = _chunk_size(batch, count, output.head.shape[1])
    hidden = _cut(output.hidden[:, start - 1 : -1], size)
    found = _head_logps(hidden, output.head, _cut(targets, size), temperature)
    logps, entropy = (x.swapaxes(0, 1).reshape(batch, -1)[:, :count] for x in found)
    return logps, entropy


def _chunk_size(batch: int, count: int, vocab: int) -> int:
    """Positions a chunk, for chunks of equal size."""
    most = max(1, LOGITS_BYTES // (4 * batch * vocab))
    return math.ceil(count / math.ceil(count / most))


def _cut(x: Shaped[Array, "B C *rest"], size: int) -> Shaped[Array, "M B size *rest"]:
    """Cuts along time into chunks, the last one filled up with zeros."""
    batch, count, *rest = x.shape
    padded = jnp.pad(x, ((0, 0), (0, -count % size), *((0, 0) for _ in rest)))
    return padded.reshape(batch, -1, size, *rest).swapaxes(0, 1)


@jax.custom_vjp
def _head_logps(
    hidden: Float[Array, "M B C D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "M B C"],
    temperature: Float[Array, ""],
) -> tuple[Float32[Array, "M B C"], Float32[Array, "M B C"]]:
    """Log-probabilities and entropies of M chunks, one chunk's logits at a time.

    Own backward pass, for two reasons: the logits are formed again instead of kept, and the head's
    gradient is a sum over chunks that bfloat16 would lose.
    """
    (logps, entropy), _ = _head_logps_forward(hidden, head, targets, temperature)
    return logps, entropy


def _logits(hidden: Float[Array, "B C D"], head: Float[Array, "D V"]) -> Float32[Array, "B C V"]:
    return jnp.einsum("bcd,dv->bcv", hidden, head, preferred_element_type=jnp.float32)


def _head_logps_forward(hidden, head, targets, temperature):
    def chunk(_, xs):
        return None, _read(_logits(xs[0], head), xs[1], temperature)

    _, (logps, norm, entropy) = jax.lax.scan(chunk, None, (hidden, targets))
    return (logps, entropy), (hidden, head, targets, temperature, norm)


def _head_logps_backward(residuals, cotangents):
    hidden, head, targets, temperature, norm = residuals
    d_logps, _ = cotangents  # the entropy carries no gradient

    def chunk(d_head, xs):
        hidden, targets, norm, d_logps = xs
        read = _logits(hidden, head), targets, norm, temperature
        d_hidden, more = _gradient(hidden, head, read, d_logps)
        return d_head + more, d_hidden

    zeros = jnp.zeros(head.shape, dtype=jnp.float32)
    d_head, d_hidden = jax.lax.scan(chunk, zeros, (hidden, targets, norm, d_logps))
    return d_hidden, d_head.astype(head.dtype), None, None


_head_logps.defvjp(_head_logps_forward, _head_logps_backward)


def _gradient(hidden, head, read, d_logps):
    """By hidden states and head, of a chunk whose log-probabilities have the gradient given."""
    logits, targets, norm, temperature = read
    probs = jnp.exp(logits / temperature - norm[:, :, None])
    hit = targets[:, :, None] == jnp.arange(head.shape[1])[None, None, :]
    d_logits = (d_logps[:, :, None] / temperature * (hit - probs)).astype(head.dtype)
    d_hidden = jnp.einsum("bcv,dv->bcd", d_logits, head).astype(hidden.dtype)
    d_head = jnp.einsum("bcd,bcv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
    return d_hidden, d_head


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(loss, head, hidden, parts):
    return _fused_forward(loss, head, hidden, parts)[0]


def _fused_forward(loss, head, hidden, parts):
    def chunk(d_head, xs):
        hidden, part = xs
        temperature = getattr(part, "temperature", 1.0)
        logits = _logits(hidden, head)
        logps, norm, entropy = _read(logits, part.tokens, temperature)
        graded = jax.value_and_grad(loss, has_aux=True)
        (total, metrics), d_logps = graded(logps, jax.lax.stop_gradient(entropy), part)
        read = logits, part.tokens, norm, temperature
        d_hidden, more = _gradient(hidden, head, read, d_logps)
        return d_head + more, (total, metrics, d_hidden)

    zeros = jnp.zeros(head.shape, dtype=jnp.float32)
    d_head, (total, metrics, d_hidden) = jax.lax.scan(chunk, zeros, (hidden, parts))
    metrics = {k: v.max() if k in MAXIMA else v.sum() for k, v in metrics.items()}
    return (total.sum(), metrics), (d_head.astype(head.dtype), d_hidden)


def _fused_backward(loss, gradients, cotangents):
    scale, _ = cotangents  # metrics carry no gradient
    d_head, d_hidden = (x * scale.astype(x.dtype) for x in gradients)
    return d_head, d_hidden, None


_fused.defvjp(_fused_forward, _fused_backward)
