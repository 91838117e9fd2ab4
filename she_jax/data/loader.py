"""Batches of examples in a random order that depends only on the seed and the position."""

from collections.abc import Sequence
from typing import SupportsIndex

import grain
import jax
import numpy as np
from jaxtyping import Int

from she_jax.data.dataset import ExampleSource
from she_jax.types import Example, UserError


class Subset:
    """A view of some rows of a source."""

    def __init__(self, source: Sequence[Example] | ExampleSource, rows: Sequence[int]):
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Example:
        return self._source[self._rows[index.__index__()]]


def label_codes(source: Sequence[Example] | ExampleSource) -> Int[np.ndarray, "N"]:
    """A number for each example's label, from 1 on in the order of their texts; 0 for no label."""
    labels = source.labels() if isinstance(source, ExampleSource) else [e.label for e in source]
    texts = ["" if label is None else str(label) for label in labels]
    code = {text: n for n, text in enumerate(sorted({"", *texts}))}
    return np.array([code[text] for text in texts], np.int64)


def uids_of(source: Sequence[Example] | ExampleSource) -> list[str]:
    """The uid of every example."""
    return source.texts("uid") if isinstance(source, ExampleSource) else [e.uid for e in source]


def batches(
    source: Sequence[Example] | ExampleSource, batch_size: int, *, seed: int, balance: bool = False
) -> grain.MapDataset:
    """An endless data set of batches, reshuffled every epoch.

    ``batches(...)[position]`` is a list of ``batch_size`` examples. The position is the whole
    state, which a checkpoint keeps as one integer. Each of several processes reads a disjoint part
    of the rows.

    Args:
      source: the examples.
      batch_size: examples per batch and process.
      seed: seed of the order.
      balance: draw all labels equally often, so that rows of a rare label repeat more often. Skips
        rows without a label.

    Raises:
      UserError: if there are no examples, or with ``balance`` none that has a label.
    """
    if not len(source):
        raise UserError("no examples: the split is empty")
    groups = [range(len(source))]
    if balance:
        codes = label_codes(source)
        groups = [np.flatnonzero(codes == code).tolist() for code in range(1, codes.max() + 1)]
        if not groups:
            raise UserError("balance: no example has a label; set it to False")
    process, processes = jax.process_index(), jax.process_count()
    datasets = [
        grain.MapDataset.source(Subset(source, rows[process::processes]))
        # Not shuffle(seed=...), whose epoch e is epoch 0 of seed + e: then seeds share orders.
        .seed(int(np.random.SeedSequence((seed, n)).generate_state(1)[0]))
        .shuffle()
        .repeat()
        for n, rows in enumerate(groups)
    ]
    mixed = datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets)
    return mixed.batch(batch_size, batch_fn=list)
