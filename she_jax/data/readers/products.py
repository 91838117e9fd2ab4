"""The products of a table of their own, held as Arrow columns of text and found by ``docid``."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from she_jax.data.readers.records import PRODUCT, read_records
from she_jax.types import BadRow

pc: Any = pyarrow.compute  # defines its functions at import, where type checkers miss them

_BATCH = 10_000  # rows that are Python's objects at a time
_TEXT = pa.large_string()  # more than 2 GB a column


class Products:
    """Products by the text of their ``docid``; of several with one docid the first counts.

    Attributes:
      repeated: rows whose docid an earlier row has.
    """

    def __init__(self, key: str, renamed: Mapping[str, str]):
        """No products yet, see ``load``.

        Args:
          key: the column of the docid.
          renamed: field names of the columns that get another one.
        """
        self._key, self._renamed = key, renamed
        self._docids, self._parts = pa.array([], _TEXT), []
        self.repeated = 0

    def load(self, paths: Sequence[Path], left_out: Counter[str]) -> Iterator[BadRow]:
        """Reads the table, and yields the rows that cannot be used."""
        docids, stream = [self._docids], read_records(paths, left_out)
        while records := list(islice(stream, _BATCH)):
            rows = []
            for record in records:
                if isinstance(record, BadRow):
                    yield record
                elif self._key in record.cells:
                    rows.append(record.cells)
                else:
                    reason = "product without docid"
                    yield BadRow(file=record.file, line=record.line, reason=reason)
            if rows:
                docids.append(pa.array([row[self._key] for row in rows], _TEXT))
                self._parts.append(self._part(rows))
        self._docids = pa.concat_arrays(docids)
        self.repeated = len(self._docids) - pc.count_distinct(self._docids).as_py()

    def find(self, docids: Sequence[str | None]) -> list[dict[str, str] | None]:
        """The fields of each docid's product, without the empty ones; None where there is none."""
        matches = pc.index_in(pa.array(docids, _TEXT), value_set=self._docids, skip_nulls=True)
        index = pc.fill_null(matches, -1).to_numpy()
        order = np.argsort(index, kind="stable")
        firsts = np.cumsum([0, *map(len, self._parts)])
        bounds = np.searchsorted(index, firsts, sorter=order)
        found: list[dict[str, str] | None] = [None] * len(docids)
        # Part by part: Arrow takes rows from a table of several by copying all of it.
        for part, first, start, stop in zip(self._parts, firsts, bounds, bounds[1:], strict=False):
            places = order[start:stop]
            rows = part.take(pa.array(index[places] - first)).to_pylist()
            for place, row in zip(places.tolist(), rows, strict=True):
                found[place] = {name: text for name, text in row.items() if name and text}
        return found

    def _part(self, rows: Sequence[Mapping[str, str]]) -> pa.Table:
        """Some products as columns: the docid under "", the others under their field's name."""
        names = {name: None for row in rows for name in row}
        fields = {name: name.removeprefix(PRODUCT) for name in names}
        fields |= {n: field for n, field in self._renamed.items() if n in names}
        taken = set(self._renamed.values())  # a field that is named wins over one of its name
        fields = {n: f for n, f in fields.items() if n in self._renamed or f not in taken}
        fields[self._key] = ""
        return pa.table(
            {field: pa.array([row.get(n) for row in rows], _TEXT) for n, field in fields.items()}
        )
