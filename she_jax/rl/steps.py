"""Assignment of tokens to the steps of a chain."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from she_jax.rl.checks import check_step_ids, checked, described


@checked
def step_ids(
    tokens: Int[Array | np.ndarray, "B T"],
    completion_mask: Bool[Array | np.ndarray, "B T"],
    newlines: Int[Array | np.ndarray, "V"],
    line_steps: Sequence[Sequence[int]],
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
      line_steps: for each row, the step of each line of the completion's text, ``line_steps`` of
        the chain that ``cot.CotSchema.parse`` reads; -1 outside every step. The text must be the
        decoded tokens, neither stripped nor cleaned up, so that the lines are the same.

    Returns:
      Step of each token; -1 outside every step, beyond the last line and outside the completion.

    Raises:
      ValueError: if the numbers of rows differ, or a token of the completion is not in [0, V); also
        inside of ``jit``, where there is no text.
    """
    if any(isinstance(array, Tracer) for array in (tokens, completion_mask, newlines)):
        raise ValueError(
            "step_ids works on the host, beside the text: call it outside of jax.jit, and pass its "
            "result to the compiled function"
        )
    for row, steps in enumerate(line_steps):
        if not hasattr(steps, "__len__"):
            raise ValueError(
                f"line_steps[{row}] is {described(steps)}, expected a step for each line of the "
                "text: pass [chain.line_steps for chain in chains]"
            )
    mask, counts = np.asarray(completion_mask), np.asarray(newlines)
    ids = np.where(mask, np.asarray(tokens), 0)
    if len(line_steps) != len(ids):
        raise ValueError(
            f"line_steps has {len(line_steps)} rows and tokens {len(ids)}: expected one per rollout"
        )
    if ids.size and not 0 <= ids.min() <= ids.max() < len(counts):
        raise ValueError(
            f"token ids from {ids.min()} to {ids.max()}, but newlines has {len(counts)} entries: "
            "expected one for each id of the vocabulary, added tokens included"
        )
    lines = max(map(len, line_steps), default=0) + 1  # the last one lies beyond every text
    padded = np.full((len(ids), lines), -1, np.int32)
    for row, steps in zip(padded, line_steps, strict=True):
        row[: len(steps)] = steps
    newline_counts = np.where(mask, counts[ids], 0)
    line = np.cumsum(newline_counts, axis=1) - newline_counts
    token_steps = np.take_along_axis(padded, np.minimum(line, lines - 1), axis=1)
    return np.where(mask, token_steps, -1).astype(np.int32)


@checked
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

    Raises:
      ValueError: if outside of ``jit`` an id is not in [-1, S).
    """
    check_step_ids(step_ids, steps)
    in_step = jnp.asarray(step_ids)[:, :, None] == jnp.arange(steps)[None, None, :]
    return (in_step & jnp.asarray(completion_mask)[:, :, None]).sum(axis=1)
