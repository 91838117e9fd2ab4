"""Draws tokens from logits, in blocks of the vocabulary (B rows, V tokens)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int


def draw_tokens(
    logits: Float32[Array, "B V"],
    uniform: Float32[Array, "B"],
    temperature: float | Float[Array, ""],
    top_p: float | Float[Array, ""] = 1.0,
    *,
    top_k: int = 0,
    banned: int | None = None,
) -> tuple[Int[Array, "B"], Float32[Array, "B"]]:
    """Draws one token per row by inverting the cumulative distribution at one uniform per row.

    Args:
      logits: of the policy.
      uniform: in [0, 1).
      temperature, top_p, top_k: as for ``sample``.
      banned: a token id that is never drawn, or None.

    Returns:
      Token ids, and their log-probabilities over the whole vocabulary at the temperature.
    """
    greedy = jnp.asarray(temperature) == 0
    scale = 1.0 / jnp.where(greedy, 1.0, temperature)
    blocks = _blocks(logits)
    is_banned = _banned_mask(banned, *blocks.shape[1:])
    peaks = jnp.where(is_banned, -jnp.inf, blocks).max(axis=2)
    # Relative to the best allowed token: relative to a banned one far above, all would round to 0.
    best = peaks.max(axis=1, keepdims=True)
    masses = jnp.exp((blocks - best[:, :, None]) * scale)
    sums = jnp.where(is_banned, 0.0, masses).sum(axis=2)
    norm = jnp.log(sums.sum(axis=1)) + best[:, 0] * scale
    if banned is not None:
        norm = jnp.logaddexp(norm, logits[:, banned] * scale)
    if top_k:
        allowed = logits if banned is None else logits.at[:, banned].set(-jnp.inf)
        values, ids = jax.lax.top_k(allowed, min(top_k, logits.shape[1]))
        probs = jnp.exp((values - best) * scale)
        preceding = jnp.cumsum(probs, axis=1) - probs
        in_nucleus = preceding < top_p * probs.sum(axis=1, keepdims=True)
        index, _ = _invert_cdf(jnp.where(in_nucleus, probs, 0.0), uniform)
        token = jnp.take_along_axis(ids, jnp.where(greedy, 0, index)[:, None], axis=1)
    else:
        # Two levels, a block and a token in it: a cumulative sum over the whole vocabulary costs
        # several passes over it, and an argmax over all of it is slow on any device.
        block, rest = _invert_cdf(sums, uniform)
        block = jnp.where(greedy, jnp.argmax(peaks, axis=1), block)[:, None]
        within = jnp.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0]
        if banned is not None:
            token_ids = block * within.shape[1] + jnp.arange(within.shape[1])[None]
            within = jnp.where(token_ids == banned, -jnp.inf, within)
        index, _ = _invert_cdf(jnp.exp((within - best) * scale), rest)
        index = jnp.where(greedy, jnp.argmax(within, axis=1), index)
        token = block * within.shape[1] + index[:, None]
    logp = jnp.take_along_axis(logits, token, axis=1)[:, 0] * scale - norm
    return token[:, 0], logp


def _blocks(logits: Float32[Array, "B V"]) -> Float32[Array, "B N X"]:
    """Splits the vocabulary into blocks of about sqrt(V), padded only if no such size divides V."""
    vocab = logits.shape[1]
    root = 1 << math.ceil(math.log2(vocab) / 2)
    size = math.gcd(vocab, root)
    size = size if 8 * size >= root else root
    padded = jnp.pad(logits, ((0, 0), (0, -vocab % size)), constant_values=-jnp.inf)
    return padded.reshape(logits.shape[0], -1, size)


def _banned_mask(banned: int | None, blocks: int, size: int) -> Bool[Array, "1 N X"] | bool:
    """True at the banned token, in the layout of ``_blocks``."""
    if banned is None:
        return False
    return (jnp.arange(blocks * size) == banned).reshape(1, blocks, size)


def _invert_cdf(
    probs: Float32[Array, "B X"], uniform: Float32[Array, "B"]
) -> tuple[Int[Array, "B"], Float32[Array, "B"]]:
    """The first index whose cumulative sum exceeds ``uniform`` times the total.

    Returns:
      The index, and the relative position of the target within its mass, which is again uniform.
    """
    cumulative = jnp.cumsum(probs, axis=1)
    target = uniform[:, None] * cumulative[:, -1:]
    # Rounding may raise the sum at an entry of probability 0, which must not be drawn. If rounding
    # leaves no entry at all, the argmax is the most probable one.
    reached = (cumulative > target) & (probs > 0)
    index = jnp.argmax(jnp.where(reached, jnp.inf, probs), axis=1, keepdims=True)
    mass = jnp.take_along_axis(probs, index, axis=1)
    offset = target - (jnp.take_along_axis(cumulative, index, axis=1) - mass)
    rest = jnp.where(mass > 0, offset / mass, 0.0)
    return index[:, 0], jnp.clip(rest, 0.0, 1.0 - 2.0**-24)[:, 0]
