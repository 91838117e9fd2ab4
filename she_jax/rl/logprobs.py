"""Token log-probabilities from hidden states, and losses with their gradients, in chunks.

The output head is the largest matrix product of a small model, and [B, T, V] logits would be its
largest array: here only one chunk of them exists at a time. Index ``[b, t]`` refers to the token at
t, whose log-probability comes from the model's output at t - 1. Only this module shifts.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Shaped

from she_jax.rl.checks import check_range, checked, known_values
from she_jax.types import LMOutput, SftBatch, TrainBatch

# Bytes of float32 logits in memory at a time: negligible next to the parameters, and enough work
# per chunk that reading the head once per chunk is not the bottleneck.
LOGITS_BYTES = 64 << 20

MAXIMA = ("logp_gap_max",)  # metrics that are combined by maximum, all others by sum

AnyBatch = TypeVar("AnyBatch", TrainBatch, SftBatch)
# (logps [B, C], entropy [B, C], batch of these positions) -> (sum, metrics)
TokenLoss = Callable[[Any, Any, Any], tuple[Array, dict[str, Array]]]


@checked
def token_logps(
    output: Float[Array, "B T V"] | LMOutput,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    start: int = 1,
) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
    """Log-probability and entropy of every token from ``start`` on.

        logps[b, t] = log softmax(logits[b, t - 1] / temperature)[tokens[b, t]]

    Given an ``LMOutput``, the logits are computed in chunks of about ``LOGITS_BYTES``, once in the
    forward pass and again in the backward pass, so that [B, T, V] never exists. The gradient of the
    head is accumulated in float32. To train on a loss use ``fused_loss``, which computes the logits
    once.

    Args:
      output: logits, or hidden states with the head to multiply them by.
      tokens: token ids, in [0, V); those of padding, too.
      temperature: divides the logits, > 0; a constant to differentiation.
      start: first token of interest, in [1, T]; static. No logits are computed before it.

    Returns:
      Log-probabilities, and the entropies in nats of their distributions; both 0 before ``start``.
      The entropy is a metric only: no gradient flows through it.

    Raises:
      ValueError: if ``start`` is outside [1, T], or outside of ``jit`` the temperature is not above
        0 or a token from ``start`` on is not in [0, V).
    """
    length = tokens.shape[1]
    _check_start(start, length)
    check_range("temperature", temperature, "(0, inf)")
    vocab = (output.head if isinstance(output, LMOutput) else output).shape[-1]
    _check_ids(known_values(tokens), start, vocab)
    targets = jnp.asarray(tokens)[:, start:]
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, dtype=jnp.float32))
    if not isinstance(output, LMOutput):
        logps, _, entropy = _token_statistics(output[:, start - 1 : -1], targets, temperature)
    elif start == length:
        logps = entropy = jnp.zeros(targets.shape, dtype=jnp.float32)
    else:
        logps, entropy = _chunked_logps(output, targets, temperature, start)
    prefix = ((0, 0), (start, 0))
    return jnp.pad(logps, prefix), jnp.pad(jax.lax.stop_gradient(entropy), prefix)


@checked
def fused_loss(
    output: Float[Array, "B T V"] | LMOutput, batch: AnyBatch, loss: TokenLoss
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """A loss over the tokens of a batch, with its gradient computed in one pass over the logits.

    Equals ``loss(*token_logps(output, batch.tokens, ...), batch)``. Given an ``LMOutput``, the loss
    is differentiated chunk by chunk, as soon as the chunk's log-probabilities are known. No logits
    are kept or computed again, which saves one of four products with the head.

    Args:
      output: logits, or hidden states with the head to multiply them by.
      batch: its [B, T] fields are split along time like the logits, from ``prompt_length`` on. It
        must have no [B] fields, which every chunk would count again: leave out ``denominator``.
      loss: (logps, entropy, batch) -> (sum, metrics), each for some of the positions. The sum and
        the metrics are sums over tokens, or maxima if named in ``MAXIMA``; a token of weight 0 must
        not contribute. It must not close over arrays: all its inputs are in the batch.

    Returns:
      (sum, metrics) over all positions.

    Raises:
      ValueError: if ``prompt_length`` is outside [1, T].
    """
    start, temperature = batch.prompt_length, getattr(batch, "temperature", 1.0)
    count = batch.tokens.shape[1] - start
    if not isinstance(output, LMOutput) or not count:
        return loss(*token_logps(output, batch.tokens, temperature=temperature, start=start), batch)
    _check_start(start, batch.tokens.shape[1])
    size = _chunk_size(batch.tokens.shape[0], count, output.head.shape[1])
    hidden = _split(output.hidden[:, start - 1 : -1], size)
    chunks = hidden.shape[0]
    parts = jax.tree.map(
        lambda x: _split(x[:, start:], size) if jnp.ndim(x) else jnp.broadcast_to(x, (chunks,)),
        batch,
    )
    return _chunked_loss(loss, output.head, hidden, parts)


def _check_start(start: int, length: int):
    if not 1 <= start <= length:
        raise ValueError(
            f"start={start}: expected 1 (the first token has no prediction) to {length}"
        )


def _check_ids(tokens: np.ndarray | None, start: int, vocab: int):
    ids = np.zeros(0) if tokens is None else tokens[:, start:]
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab:
        raise ValueError(
            f"token ids from {ids.min()} to {ids.max()}, but the logits have {vocab} entries: "
            f"expected ids from 0 to {vocab - 1}, also for padding (whose weight is 0)"
        )


def _token_statistics(
    logits: Float[Array, "B C V"],
    targets: Int[Array, "B C"],
    temperature: float | Float[Array, ""],
) -> tuple[Float32[Array, "B C"], Float32[Array, "B C"], Float32[Array, "B C"]]:
    """Log-probabilities, log-normalizers and entropies at the temperature."""
    logits = logits.astype(jnp.float32) / temperature
    target_logits = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
    peak = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    mass = jnp.exp(logits - peak)
    total = mass.sum(axis=-1)
    norm = jnp.log(total) + peak[:, :, 0]
    # A forbidden token has logit -inf and mass 0, and 0 * -inf is NaN.
    entropy = norm - jnp.where(mass > 0, mass * logits, 0.0).sum(axis=-1) / total
    return target_logits - norm, norm, entropy


def _chunked_logps(
    output: LMOutput, targets: Int[Array, "B C"], temperature: Float[Array, ""], start: int
) -> tuple[Float32[Array, "B C"], Float32[Array, "B C"]]:
    """Log-probabilities and entropies, computed in chunks of equal size.

    Chunks are along time, since devices share the batch axis.
    """
    batch, count = targets.shape
    size = _chunk_size(batch, count, output.head.shape[1])
    hidden = _split(output.hidden[:, start - 1 : -1], size)
    chunks = _head_logps(hidden, output.head, _split(targets, size), temperature)
    logps, entropy = (chunk.swapaxes(0, 1).reshape(batch, -1)[:, :count] for chunk in chunks)
    return logps, entropy


def _chunk_size(batch: int, count: int, vocab: int) -> int:
    """Number of positions per chunk, for chunks of equal size."""
    most = max(1, LOGITS_BYTES // (4 * batch * vocab))
    return math.ceil(count / math.ceil(count / most))


def _split(x: Shaped[Array, "B C *rest"], size: int) -> Shaped[Array, "M B size *rest"]:
    """Splits along time into chunks, the last one padded with zeros."""
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
    """Log-probabilities and entropies of M chunks, with the logits of one chunk at a time.

    The backward pass is custom for two reasons: the logits are computed again instead of kept, and
    the head's gradient is a sum over chunks, too inaccurate in bfloat16.
    """
    (logps, entropy), _ = _head_logps_forward(hidden, head, targets, temperature)
    return logps, entropy


def _logits(hidden: Float[Array, "B C D"], head: Float[Array, "D V"]) -> Float32[Array, "B C V"]:
    return jnp.einsum("bcd,dv->bcv", hidden, head, preferred_element_type=jnp.float32)


def _head_logps_forward(hidden, head, targets, temperature):
    def chunk(_, xs):
        return None, _token_statistics(_logits(xs[0], head), xs[1], temperature)

    _, (logps, norm, entropy) = jax.lax.scan(chunk, None, (hidden, targets))
    return (logps, entropy), (hidden, head, targets, temperature, norm)


def _head_logps_backward(residuals, cotangents):
    hidden, head, targets, temperature, norm = residuals
    d_logps, _ = cotangents  # the entropy carries no gradient

    def chunk(d_head, xs):
        hidden, targets, norm, d_logps = xs
        distributions = _logits(hidden, head), targets, norm, temperature
        d_hidden, d_head_chunk = _head_gradients(hidden, head, distributions, d_logps)
        return d_head + d_head_chunk, d_hidden

    zeros = jnp.zeros(head.shape, dtype=jnp.float32)
    d_head, d_hidden = jax.lax.scan(chunk, zeros, (hidden, targets, norm, d_logps))
    return d_hidden, d_head.astype(head.dtype), None, None


_head_logps.defvjp(_head_logps_forward, _head_logps_backward)


def _head_gradients(hidden, head, distributions, d_logps):
    """Gradients of hidden states and head, given the gradient of a chunk's log-probabilities."""
    logits, targets, norm, temperature = distributions
    probs = jnp.exp(logits / temperature - norm[:, :, None])
    is_target = targets[:, :, None] == jnp.arange(head.shape[1])[None, None, :]
    d_logits = (d_logps[:, :, None] / temperature * (is_target - probs)).astype(head.dtype)
    d_hidden = jnp.einsum("bcv,dv->bcd", d_logits, head).astype(hidden.dtype)
    d_head = jnp.einsum("bcd,bcv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
    return d_hidden, d_head


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_loss(loss, head, hidden, parts):
    return _chunked_loss_forward(loss, head, hidden, parts)[0]


def _chunked_loss_forward(loss, head, hidden, parts):
    def chunk(d_head, xs):
        hidden, part = xs
        temperature = getattr(part, "temperature", 1.0)
        logits = _logits(hidden, head)
        logps, norm, entropy = _token_statistics(logits, part.tokens, temperature)
        loss_and_gradient = jax.value_and_grad(loss, has_aux=True)
        (total, metrics), d_logps = loss_and_gradient(logps, jax.lax.stop_gradient(entropy), part)
        distributions = logits, part.tokens, norm, temperature
        d_hidden, d_head_chunk = _head_gradients(hidden, head, distributions, d_logps)
        return d_head + d_head_chunk, (total, metrics, d_hidden)

    zeros = jnp.zeros(head.shape, dtype=jnp.float32)
    d_head, (total, metrics, d_hidden) = jax.lax.scan(chunk, zeros, (hidden, parts))
    metrics = {k: v.max() if k in MAXIMA else v.sum() for k, v in metrics.items()}
    return (total.sum(), metrics), (d_head.astype(head.dtype), d_hidden)


def _chunked_loss_backward(loss, gradients, cotangents):
    scale, _ = cotangents  # metrics carry no gradient
    d_head, d_hidden = (gradient * scale.astype(gradient.dtype) for gradient in gradients)
    return d_head, d_hidden, None


_chunked_loss.defvjp(_chunked_loss_forward, _chunked_loss_backward)
