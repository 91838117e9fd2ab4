"""Which step of the chain a token belongs to."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


def step_ids(
    tokens: Int[Array | np.ndarray, "B T"],
    completion_mask: Bool[Array | np.ndarray, "B T"],
    newlines: Int[np.ndarray, "V"],
    line_steps: Int[np.ndarray, "B L"],
) -> Int[np.ndarray, "B T"]:
    """Names the step of every token, by the line in which the token's first byte lies.

    A newline ends its line and belongs to it, as does a token that begins with one. A token without
    bytes (end of sequence) belongs to the line it ends, so the last step owns it.

    On the host, beside the parser: the number of lines is whatever the longest text has, and numpy
    does not compile anew for it.

    Args:
      tokens: token ids.
      completion_mask: True on the sampled tokens, the end-of-sequence token included.
      newlines: how many newlines the bytes of each token id hold; 0 for special tokens.
      line_steps: step of each line of the completion's text, as in ``cot.Chain.line_steps``, -1
        outside every step and beyond the last line. The text must be what the completion's tokens
        decode to, neither stripped nor tidied up, or the lines will not be the same lines.

    Returns:
      Step of each token; -1 outside every step and outside the completion.
    """
    mask = np.asarray(completion_mask)
    held = np.where(mask, newlines[np.asarray(tokens)], 0)
    line = np.cumsum(held, axis=1) - held
    lines = line_steps.shape[1]
    own = np.take_along_axis(line_steps, np.minimum(line, lines - 1), axis=1)
    return np.where(mask & (line < lines), own, -1).astype(np.int32)


def step_token_counts(
    step_ids: Int[Array | np.ndarray, "B T"],
    completion_mask: Bool[Array | np.ndarray, "B T"],
    steps: int,
) -> Int[Array, "B S"]:
    """How many tokens of the completion each step has; 0 for a step that is not there.

    Args:
      step_ids: step of each token, in [-1, S); tokens outside every step (-1) are not counted.
      completion_mask: True on the sampled tokens.
      steps: S, the number of steps.
    """
    own = jnp.asarray(step_ids)[:, :, None] == jnp.arange(steps)[None, None, :]
    return (own & jnp.asarray(completion_mask)[:, :, None]).sum(axis=1)
