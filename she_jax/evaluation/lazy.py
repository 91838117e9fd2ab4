"""Sequences that are not kept in memory."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, overload

import numpy as np

Item = TypeVar("Item")


class Lazy(Sequence[Item], Generic[Item]):
    """Items that are made when they are asked for, and not kept.

    Args:
      rows: what identifies each.
      get: makes an item of its row.
    """

    def __init__(self, rows: Sequence[int] | np.ndarray, get: Callable[[int], Item]):
        self._rows, self._get = rows, get

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> "Lazy[Item]": ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Lazy(self._rows[index], self._get)
        return self._get(int(self._rows[index]))
