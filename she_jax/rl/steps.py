"""Assignment of tokens to the steps of a chain."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


def step_ids(
    tokens: Int[Array | np.ndarray, "B T"],
    completion_mask: Bool[Array | np.ndarray, "B T"],
    newlines: Int[np.ndarray, "V"],
    line_steps: Int[np.ndarray, "B L"],
) -> Int[np.ndarray, "B T"]:
    """Returns the step of every token, that of the line in which the token's first byte lies.

    A newline belongs to the line it ends, as does a token that begins with one. A token without
    bytes (end of sequence) belongs to the line it ends, and so to the last step.

    Runs in numpy on the host, next to the parser: the number of lines L is that of the longest
    text, and JAX would compile anew for each L.

    Args:
      tokens: token ids.
      completion_mask: True on the sampled tokens, the end-of-sequence token included.
      newlines: number of newlines in the bytes of each token id; 0 for special tokens.
      line_steps: step of each line of the completion's text, as in ``cot.Chain.line_steps``; -1
        outside every step and beyond the last line. The text must be the decoded tokens, neither
        stripped nor cleaned up, so that the lines are the same.

    Returns:
      Step of each token; -1 outside every step and outside the completion.
    """
    mask = np.asarray(completion_mask)
    newline_counts = np.where(mask, newlines[np.asarray(tokens)], 0)
    line = np.cumsum(newline_counts, axis=1) - newline_counts
    lines = line_steps.shape[1]
    token_steps = np.take_along_axis(line_steps, np.minimum(line, lines - 1), axis=1)
    return np.where(mask & (line < lines), token_steps, -1).astype(np.int32)


def step_token_counts(
    step_ids: Int[Array | np.ndarray, "B T"],
    completion_mask: Bool[Array | np.ndarray, "B T"],
    steps: int,
) -> Int[Array, "B S"]:
    """Number of completion tokens of each step; 0 for a step that is absent.

    Args:
      step_ids: step of each token, in [-1, S); tokens outside every step (-1) are not counted.
      completion_mask: True on the sampled tokens.
      steps: S, the number of steps.
    """
    in_step = jnp.asarray(step_ids)[:, :, None] == jnp.arange(steps)[None, None, :]
    return (in_step & jnp.asarray(completion_mask)[:, :, None]).sum(axis=1)
