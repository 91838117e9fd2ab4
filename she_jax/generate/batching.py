"""Batches of prompts of about equal length, so that few columns are padding."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from she_jax.types import PromptBatch

STEP = 32  # widths are multiples of it, for each compiles a program of its own


def narrowed(batch: PromptBatch) -> PromptBatch:
    """The prompts without columns that are padding in all rows; a multiple of ``STEP`` stays."""
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    start = max(mask.shape[1] - math.ceil(mask.sum(axis=1).max() / STEP) * STEP, 0)
    return PromptBatch(tokens=tokens[:, start:], mask=mask[:, start:])  # pyright: ignore[reportArgumentType]


def by_length(
    batch: PromptBatch, size: int, then: Sequence[int] | None = None
) -> Iterator[tuple[Int[np.ndarray, "R"], PromptBatch]]:
    """Yields rows of a batch and their prompts, ``size`` at a time, the longest first.

    So what is too large for a device fails at once, and the time left is no less than it seems.

    Args:
      batch: all prompts, padded on the left to P.
      size: prompts at a time; the last ones are filled up with repetitions.
      then: what orders the prompts of one width, the largest first.
    """
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    widths = np.ceil(mask.sum(axis=1) / STEP)
    order = np.lexsort((-np.asarray(widths if then is None else then), -widths))
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        filled = np.pad(rows, (0, size - len(rows)), mode="edge")
        part = PromptBatch(tokens=tokens[filled], mask=mask[filled])  # pyright: ignore[reportArgumentType]
        yield rows, narrowed(part)
