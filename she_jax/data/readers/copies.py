"""Writes a user's table again with further columns: every row as it stood, in its order.

CSV stays CSV, with its delimiter, quotes, line ends and encoding; Parquet keeps its types; JSON
becomes JSON lines, whose values stand as in the file. A part of a table becomes a part, what was
packed is packed.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from she_jax.data.readers.delimited import raw_rows, read_layout
from she_jax.data.readers.records import open_parquet, raw_objects
from she_jax.data.readers.table_files import open_table, table_kind, table_parts, undecoded
from she_jax.types import BadRow

PREFIX = "she_"  # of a new column whose name the table has already
UNREAD = "row"  # of JSON lines: the text of what is no object
_ROWS = 10_000  # of a Parquet file at a time
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}

Answers = Iterator[Mapping[str, Any]]  # the new cells of each record, by column


def copy_table(
    path: str,
    folder: Path,
    columns: Mapping[str, pa.DataType],
    answers: Answers,
    blank: Mapping[str, Any],
) -> dict[str, str]:
    """Writes the files of a table into a folder, under their names, with further columns.

    A row of CSV that cannot be read as cells stands whole in the first column; of JSON under the
    key ``row``.

    Args:
      path: the table, see ``table_parts``.
      folder: for the files.
      columns: the new columns with their types in Parquet: texts, numbers and booleans.
      answers: their cells for each record that ``read_records`` yields, the bad ones included;
        None is a missing value.
      blank: the same for a row of CSV whose cells are all empty, which is no record.

    Returns:
      The names that the new columns were given: a name that is taken gets ``she_`` before it.

    Raises:
      ValueError: if there are more or fewer answers than records.
    """
    parts = table_parts(path)
    names = free_names(columns, {name for part in parts for name in _names(part)})
    root = os.path.commonpath([part.absolute().parent for part in parts])
    for part in parts:
        target = folder / part.absolute().relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        kind = table_kind(part)
        if kind == "parquet":
            _copy_parquet(part, target, names, columns, answers)
        elif kind == "json":
            _copy_json(part, target, names, answers)
        else:
            _copy_delimited(part, target, names, answers, blank)
    if next(answers, None) is not None:
        raise ValueError(f"{path}: more answers than records")
    return names


def free_names(names: Iterable[str], taken: Collection[str]) -> dict[str, str]:
    """A name for each new column that no other column has."""
    free: dict[str, str] = {}
    for name in names:
        given = name
        while given in taken or given in free.values():
            given = f"{PREFIX}{given}"
        free[name] = given
    return free


def _names(part: Path) -> Iterable[str]:
    """The columns of a file; of JSON the keys of its objects."""
    kind = table_kind(part)
    if kind == "json":
        return {n for _, row, _ in raw_objects(part) if isinstance(row, dict) for n in row}
    if kind == "parquet":
        with open_parquet(part) as file:
            return file.schema_arrow.names
    return read_layout(part)[0]


def _copy_delimited(
    path: Path,
    target: Path,
    names: Mapping[str, str],
    answers: Answers,
    blank: Mapping[str, Any],
) -> None:
    header, delimiter = read_layout(path)
    rows = raw_rows(path)
    first, _ = next(rows)
    quoting = csv.QUOTE_ALL if first.lstrip().startswith('"') else csv.QUOTE_MINIMAL

    def line(cells: Iterable[str], end: str) -> str:
        buffer = io.StringIO()
        csv.writer(buffer, delimiter=delimiter, quoting=quoting, lineterminator="").writerow(cells)
        return f"{buffer.getvalue()}{end}"

    with _open_like(path, target) as file:
        end = _end(first)
        file.write(first.removesuffix(end) + delimiter + line(names.values(), end))
        for text, row in rows:
            end = _end(text)
            if row is None and not text.strip(" \r\n"):
                file.write(text)
                continue
            cells = _cells(blank if row is None else _next(answers, path), names)
            stands = text.removesuffix(end)
            if isinstance(row, BadRow) and not undecoded(text):
                stands = line([stands, *[""] * (len(header) - 1)], "")
            file.write(stands + delimiter + line(cells, end))


def _copy_json(path: Path, target: Path, names: Mapping[str, str], answers: Answers) -> None:
    with _open_like(path, target) as file:
        for _, row, text in raw_objects(path):
            answer = _next(answers, path)
            ours = {names[name]: answer[name] for name in names}
            if isinstance(row, dict):  # a line break within it is between its values
                stands = re.sub(r"\s*[\r\n]\s*", " ", text.strip()[:-1].rstrip())
            else:
                stands = "{" + json.dumps({UNREAD: text.rstrip("\r\n")})[1:-1]
            comma = ", " if row or not isinstance(row, dict) else ""
            file.write(f"{stands}{comma}{json.dumps(ours, ensure_ascii=False)[1:]}\n")


def _copy_parquet(
    path: Path,
    target: Path,
    names: Mapping[str, str],
    columns: Mapping[str, pa.DataType],
    answers: Answers,
) -> None:
    target = target.with_suffix("") if target.suffix.lower() == ".gz" else target
    with open_parquet(path) as source:
        schema = source.schema_arrow
        for name, kind in columns.items():
            schema = schema.append(pa.field(names[name], kind))
        codec = source.metadata.row_group(0).column(0).compression if source.num_row_groups else ""
        known = {"SNAPPY", "GZIP", "BROTLI", "ZSTD", "LZ4"}
        compression = codec.lower() if codec in known else "zstd"
        with pq.ParquetWriter(target, schema, compression=compression) as file:
            for batch in source.iter_batches(_ROWS, use_threads=False):
                rows = [_next(answers, path) for _ in range(len(batch))]
                cells = [pa.array([row[n] for row in rows], kind) for n, kind in columns.items()]
                file.write_batch(
                    pa.RecordBatch.from_arrays([*batch.columns, *cells], schema=schema)
                )


def _next(answers: Answers, path: Path) -> Mapping[str, Any]:
    answer = next(answers, None)
    if answer is None:
        raise ValueError(f"{path}: fewer answers than records")
    return answer


def _cells(answer: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The new cells of a row of CSV."""
    values = [answer[name] for name in names]
    return [
        "" if v is None else json.dumps(v) if isinstance(v, bool | float) else str(v)
        for v in values
    ]


def _end(text: str) -> str:
    """The line end of a row."""
    return text[len(text.rstrip("\r\n")) :]


@contextlib.contextmanager
def _open_like(path: Path, target: Path) -> Iterator[TextIO]:
    """Opens a text file for writing, encoded and packed like another one."""
    with open_table(path) as file:
        head = file.peek(4)[:4]  # type: ignore[attr-defined]
    mark = next((mark for mark in _MARKS if head.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    errors = "surrogateescape" if encoding == "utf-8" else "replace"
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(target.open("wb"))
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        if packed:  # without a name and a time, so that the same rows give the same bytes
            out = stack.enter_context(gzip.GzipFile("", "wb", fileobj=out, mtime=0))
        out.write(mark)
        text = io.TextIOWrapper(cast(Any, out), encoding, errors, newline="")
        yield stack.enter_context(text)
