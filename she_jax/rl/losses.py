"""Token log-probabilities and the losses made of them.

Index ``[b, t]`` speaks of the token at t, whose log-probability comes from the model's output at t
- 1; this module is the only one that shifts. A loss is a pair (sum, count): whoever has all of a
batch's pairs adds them up and divides once, so that micro-batches and devices do not change the
result.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from she_jax.types import LMOutput, SftBatch, TrainBatch

# Bytes of float32 logits in memory at a time. Small enough to be nothing beside the parameters,
# large enough that the head, read once a chunk, is not what a chunk waits for.
LOGITS_BYTES = 64 << 20

# exp of anything beyond is of no use as a ratio, and its square overflows.
MAX_LOG_RATIO = 20.0

NORMALISATIONS = ("token", "sequence", "step")

MAXIMA = ("logp_gap_max",)  # metrics that are no sums

AnyBatch = TypeVar("AnyBatch", TrainBatch, SftBatch)
# (logps [B, C], entropy [B, C], batch of these positions) -> (sum, metrics)
TokenLoss = Callable[[Any, Any, Any], tuple[Array, dict[str, Array]]]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The constants of the policy update.

    Attributes:
      clip_low: the ratio is clipped from below at 1 - clip_low, in (0, 1].
      clip_high: the ratio is clipped from above at 1 + clip_high, > 0. 0.28 beside a clip_low of
        0.2 is DAPO's "clip-higher" (arXiv 2503.14476).
      micro_batches: the batch is worked through in this many parts.

    Raises:
      ValueError: if a value is out of its range.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    micro_batches: int = 1

    def __post_init__(self):
        if not 0 < self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low}: expected a value in (0, 1]")
        if not self.clip_high > 0:
            raise ValueError(f"clip_high={self.clip_high}: expected a value above 0")
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches={self.micro_batches}: expected at least 1")


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


def token_weights(
    completion_mask: Bool[Array | np.ndarray, "B T"],
    step_ids: Int[Array | np.ndarray, "B T"],
    normalisation: str,
) -> Float32[Array, "B T"]:
    """Weights w of the tokens, such that the loss is sum(w * l) / sum(w) over the whole batch.

    Args:
      completion_mask: True on the tokens to train.
      step_ids: step of each token, -1 outside every step.
      normalisation: what counts alike: every ``token``; every ``sequence``, its tokens sharing one
        unit; or every ``step`` of every sequence, its tokens sharing one unit (the tokens outside
        every step are together one step more).

    Raises:
      ValueError: if ``normalisation`` is unknown.
    """
    mask = jnp.asarray(completion_mask)
    weights = mask.astype(jnp.float32)
    if normalisation == "token":
        return weights
    if normalisation == "sequence":
        return weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
    if normalisation == "step":
        sizes = jax.vmap(_occurrences)(jnp.asarray(step_ids), mask)
        return weights / jnp.maximum(sizes, 1)
    raise ValueError(f"normalisation={normalisation!r}: expected one of {NORMALISATIONS}")


def policy_loss(
    logps: Float[Array, "B T"], batch: TrainBatch, config: LossConfig
) -> tuple[tuple[Float32[Array, ""], Float32[Array, ""]], dict[str, Float32[Array, ""]]]:
    """The clipped policy loss with a KL term, as a sum over tokens.

        rho = exp(logps - old_logps)
        pg  = -min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A)
        k3  = exp(ref_logps - logps) - (ref_logps - logps) - 1
        sum = sum_t w * (pg + kl_weight * k3),  count = sum_t w

    PPO (arXiv 1707.06347), equation 7, with a clip range that may be lopsided; k3 as in
    DeepSeekMath (arXiv 2402.03300), equation 4. Log-ratios are cut at +-20, beyond which exp only
    overflows. A token of weight 0 takes no part, whatever stands there.

    Args:
      logps: log-probabilities under the policy, from ``token_logps`` at ``batch.temperature``.
      batch: advantages, weights and the log-probabilities to compare with.
      config: the clip range.

    Returns:
      (sum, count), and metrics as sums to be divided by the count too: ``pg_loss``, ``kl``,
      ``ratio``, ``clip_low`` and ``clip_high`` (share of tokens whose gradient the clip cuts) and
      ``logp_gap`` = |logps - old_logps|; of these ``logp_gap_max`` alone is a maximum, not a sum.
    """
    weights = batch.weights.astype(jnp.float32)
    trained = weights != 0

    def only_trained(values: Float[Array, "B T"]) -> Float32[Array, "B T"]:
        return jnp.where(trained, values.astype(jnp.float32), 0.0)

    logps, advantages = only_trained(logps), only_trained(batch.advantages)
    log_ratio = logps - only_trained(batch.old_logps)
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    pg = -jnp.minimum(ratio * advantages, clipped * advantages)
    if batch.ref_logps is None:
        kl = jnp.zeros_like(pg)
    else:
        to_ref = jnp.clip(only_trained(batch.ref_logps) - logps, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = jnp.exp(to_ref) - to_ref - 1
    gap = jnp.abs(log_ratio)
    metrics = {
        "pg_loss": pg,
        "kl": kl,
        "ratio": ratio,
        "clip_low": (ratio < 1 - config.clip_low) & (advantages < 0),
        "clip_high": (ratio > 1 + config.clip_high) & (advantages > 0),
        "logp_gap": gap,
    }
    sums = {name: (weights * values).sum() for name, values in metrics.items()}
    total = sums["pg_loss"] + batch.kl_weight * sums["kl"]
    return (total, weights.sum()), sums | {"logp_gap_max": gap.max()}


def sft_loss(
    logps: Float[Array, "B T"], weights: Float[Array | np.ndarray, "B T"]
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Cross entropy of the tokens, as (sum_t w * -logps, sum_t w).

    Args:
      logps: log-probabilities under the model, from ``token_logps``.
      weights: weight of each token, 0 where it is not trained.
    """
    weights = jnp.asarray(weights, dtype=jnp.float32)
    return -(weights * jnp.where(weights != 0, logps, 0.0)).sum(), weights.sum()


def fused_loss(
    output: Float[Array, "B T V"] | LMOutput, batch: AnyBatch, loss: TokenLoss
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """A loss over the tokens of a batch, its gradient formed in the same pass over the logits.

    The same as ``loss(*token_logps(output, batch.tokens, ...), batch)``. But given an ``LMOutput``
    the loss is differentiated chunk by chunk as soon as the chunk's log-probabilities are there,
    so that no logits are kept or formed a second time: one product with the head less of four.

    Args:
      output: logits, or hidden states with the head to multiply them by.
      batch: its fields [B, T] are cut along time like the logits, from ``prompt_length`` on.
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


def _occurrences(ids: Int[Array, "T"], mask: Bool[Array, "T"]) -> Int[Array, "T"]:
    """How often each id occurs under the mask. By sorting: no bound on the ids is needed."""
    ordered = jnp.sort(jnp.where(mask, ids, jnp.iinfo(ids.dtype).max))
    first, end = (jnp.searchsorted(ordered, ids, side=side) for side in ("left", "right"))
    return end - first


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
