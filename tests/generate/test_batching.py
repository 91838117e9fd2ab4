"""Batches of prompts of about equal length."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from she_jax.generate.batching import STEP, by_length, narrowed
from she_jax.types import PromptBatch


def padded(lengths, width):
    """Prompts of the given lengths; each token names its row."""
    mask = np.arange(width)[None] >= width - np.array(lengths)[:, None]
    return PromptBatch(tokens=np.where(mask, np.arange(len(lengths))[:, None], -1), mask=mask)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(1, 7))
def test_every_prompt_is_in_one_batch_whole_and_the_longest_come_first(lengths, size):
    seen, widths = [], []
    for rows, batch in by_length(padded(lengths, 100), size):
        assert batch.tokens.shape == batch.mask.shape == (size, batch.mask.shape[1])
        for row, tokens, mask in zip(rows, batch.tokens, batch.mask, strict=False):
            assert tokens[mask].tolist() == [row] * lengths[row]
        longest = max(lengths[row] for row in rows)
        assert longest <= batch.mask.shape[1] < longest + STEP
        seen += rows.tolist()
        widths.append(batch.mask.shape[1])
    assert sorted(seen) == list(range(len(lengths)))
    assert widths == sorted(widths, reverse=True)


def test_what_orders_prompts_of_one_width():
    batches = list(by_length(padded([3, 40, 5, 9], 100), 2, then=[1, 0, 3, 2]))
    assert [rows.tolist() for rows, _ in batches] == [[1, 2], [3, 0]]
    assert narrowed(padded([3, 33], 100)).mask.shape == (2, 2 * STEP)
