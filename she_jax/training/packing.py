"""Packs several short sequences into one row."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from she_jax.generate.prompts import PromptFormat, positions
from she_jax.types import Example, SftBatch

# Lengths of a packed row, relative to an unpacked row; few, since each is compiled separately.
WIDTHS = (1.0, 1.2, 1.3, 1.4, 2.0)


def pack_pairs(batch: SftBatch) -> SftBatch:
    """Packs a batch into half as many rows, the longest row with the shortest, and so on.

    The two do not attend to each other, so loss and gradient are unchanged. Rows are seldom full,
    so a packed batch has fewer tokens to compute. Its row length is one of ``WIDTHS``.

    Args:
      batch: an even number of rows; without a mask, attention is causal.
    """
    arrays = [np.asarray(x) for x in (batch.tokens, batch.positions, batch.loss_weights)]
    attended = None if batch.mask is None else np.asarray(batch.mask)
    real = arrays[1] >= 0
    sizes = real.sum(axis=1)
    order = np.argsort(sizes, kind="stable")
    sources = np.stack([order[::-1], order], axis=1)[: len(order) // 2]  # of each packed row
    widths = [math.ceil(share * real.shape[1]) for share in WIDTHS]
    shape = len(sources), next(w for w in widths if w >= sizes[sources].sum(axis=1).max())
    packed = [np.full(shape, fill, x.dtype) for x, fill in zip(arrays, (0, -1, 0), strict=True)]
    mask = np.zeros((*shape, shape[1]), bool)
    for row, source_rows in enumerate(sources):
        end = 0
        for source in source_rows:
            start, end = end, end + sizes[source]
            for target, array in zip(packed, arrays, strict=True):
                target[row, start:end] = array[source, real[source]]
            if attended is None:
                block = np.tri(end - start, dtype=bool)
            else:
                block = attended[source][np.ix_(real[source], real[source])]
            mask[row, start:end, start:end] = block
    tokens, positions, weights, mask = map(jnp.asarray, (*packed, mask))
    return SftBatch(tokens=tokens, positions=positions, loss_weights=weights, mask=mask)


def completion_batch(
    prompts: PromptFormat,
    examples: Sequence[Example],
    completions: Int[np.ndarray, "B C"],
    mask: Bool[np.ndarray, "B C"],
) -> tuple[SftBatch, int]:
    """A batch of prompts and completions, trained on the latter; and the number of cut prompts.

    A completion that was cut, and so has no end token, is not trained on.
    """
    prompt, cut = prompts.encode_prompts(examples)
    ended = (np.isin(completions, prompts.eos_ids) & mask).any(axis=1, keepdims=True)
    real = np.concatenate([prompt.mask, mask], axis=1)
    trained = np.concatenate([np.zeros_like(prompt.mask), mask & ended], axis=1)
    batch = SftBatch(
        tokens=jnp.asarray(np.concatenate([prompt.tokens, completions], axis=1)),
        positions=jnp.asarray(positions(real)),
        loss_weights=jnp.asarray(trained, dtype=jnp.float32),
        prompt_length=prompts.prompt_length,
    )
    return batch, cut
