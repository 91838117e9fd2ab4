"""Batches of examples in a random order that is a function of the seed and the position."""

from collections.abc import Sequence
from typing import SupportsIndex

import grain
import jax

from she_jax.data.dataset import ExampleSource
from she_jax.types import Example


class Subset:
    """Some rows of a source, by index."""

    def __init__(self, source: Sequence[Example] | ExampleSource, rows: Sequence[int]):
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Example:
        return self._source[self._rows[index.__index__()]]


def batches(
    source: Sequence[Example] | ExampleSource, batch_size: int, *, seed: int, balance: bool = False
) -> grain.MapDataset:
    """An endless series of batches, shuffled anew each epoch.

    ``batches(...)[position]`` is a list of ``batch_size`` examples. The whole state of the series
    is the position, which a checkpoint keeps as one integer. With several processes each one sees
    its own share of the rows.

    Args:
      source: the examples.
      batch_size: examples a batch (a process).
      seed: of the order.
      balance: draw from the labels in equal shares, so that the rows of a rare label come round
        more often; reads every row once, and leaves out those without a label.

    Raises:
      ValueError: if there are no examples (with a label, where ``balance``).
    """
    if not len(source):
        raise ValueError("no examples: the split is empty")
    groups = [range(len(source))]
    if balance:
        labels = [source[i].label for i in range(len(source))]
        groups = [
            rows
            for label in (1, 2, 3, 4)
            if (rows := [i for i, own in enumerate(labels) if own == label])
        ]
        if not groups:
            raise ValueError("balance: no example has a label; set it to False")
    process, processes = jax.process_index(), jax.process_count()
    parts = [
        grain.MapDataset.source(Subset(source, rows[process::processes]))
        .shuffle(seed=seed + n)
        .repeat()
        for n, rows in enumerate(groups)
    ]
    mixed = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts)
    return mixed.batch(batch_size, batch_fn=list)
