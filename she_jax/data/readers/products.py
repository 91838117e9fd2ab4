"""The products of a table of their own, held as Arrow columns of text and found by ``docid``."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

from she_jax.data.readers.delimited import Record
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
        self._docids, self._fields = pa.array([], _TEXT), pa.table({})
        self.repeated = 0

    def load(self, paths: Sequence[Path], left_out: Counter[str]) -> Iterator[BadRow]:
        """Reads the table, and yields the rows that cannot be used."""
        tables, stream = [pa.table({})], read_records(paths, left_out)
        while records := list(islice(stream, _BATCH)):
            yield from (record for record in records if isinstance(record, BadRow))
            good = [record for record in records if isinstance(record, Record)]
            yield from (
                BadRow(file=record.file, line=record.line, reason="product without docid")
                for record in good
                if self._key not in record.cells
            )
            tables.append(_text_table([r.cells for r in good if self._key in r.cells]))
        table = pa.concat_tables(tables, promote_options="default")
        del tables
        columns = {}
        while table.num_columns:  # in one piece each, which a search needs, and one at a time
            columns[table.column_names[0]] = table.column(0).combine_chunks()
            table = table.remove_column(0)
        self._docids = columns.pop(self._key, self._docids)
        names = {name: self._field(name) for name in columns}
        taken = set(self._renamed.values())  # a field that is named wins over one of its name
        self._fields = pa.table(
            {
                field: columns[name]
                for name, field in names.items()
                if name in self._renamed or field not in taken
            }
        )
        self.repeated = len(self._docids) - pc.count_distinct(self._docids).as_py()

    def find(self, docids: Sequence[str | None]) -> list[dict[str, str] | None]:
        """The fields of each docid's product, without the empty ones; None where there is none."""
        wanted = pa.array(docids, _TEXT)
        index = pc.index_in(wanted, value_set=self._docids, skip_nulls=True)
        found = pc.is_valid(index).to_pylist()
        if not self._fields.num_columns:
            return [{} if known else None for known in found]
        rows = self._fields.take(index).to_pylist()
        return [
            {name: text for name, text in row.items() if text} if known else None
            for row, known in zip(rows, found, strict=True)
        ]

    def _field(self, column: str) -> str:
        return self._renamed.get(column, column.removeprefix(PRODUCT))


def _text_table(rows: Sequence[Mapping[str, str]]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows], _TEXT) for name in names})
