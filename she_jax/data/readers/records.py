"""Reads the rows of CSV, TSV, JSON and Parquet files: every cell as its text, nothing guessed.

Ids keep their zeros, numbers stand as in the file, "NA" is text; only the empty cell is missing. An
object within a row gives a column for each of its scalars (``details.Color``), a list of scalars
one text (``a, b``). What is deeper is left out, and counted.
"""

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from she_jax.data.readers.delimited import Record, read_delimited, read_header
from she_jax.data.readers.table_files import (
    KINDS,
    Lines,
    open_table,
    read_lines,
    table_kind,
    undecoded,
)
from she_jax.types import BadRow, UserError

pc: Any = pyarrow.compute  # defines its functions at import, where type checkers miss them

PRODUCT = "product."  # how the columns begin that are fields of a row's own product
_BATCH = 2_000  # rows of a Parquet file decoded at once
_WHOLE = 2.0**53  # doubles from here on are not exact
_JSON: Mapping[str, Any] = {
    "parse_float": str,
    "parse_int": str,
    "parse_constant": lambda _: None,  # NaN, how pandas writes a gap
}
_BETWEEN = re.compile(r"[\s,\[\]]*")  # between the objects of a JSON array


def read_records(paths: Sequence[Path], left_out: Counter[str]) -> Iterator[Record | BadRow]:
    """The rows of the files of a table, one after the other, each with its file and line.

    In a Parquet file the line is the number of the row. Folders such as ``locale=us`` give columns.

    Args:
      paths: the files.
      left_out: counts the rows in which something cannot be a cell, by column.

    Raises:
      UserError: if a file is not what its name says, or the files differ in their columns.
    """
    readers = {"json": _read_json, "parquet": _read_parquet}
    for path in paths:
        partition, kind = _partition(path, paths), _checked_kind(path)
        reader = readers.get(kind)
        for record in reader(path, left_out) if reader else read_delimited(path):
            if partition and isinstance(record, Record):
                record = record._replace(cells=partition | record.cells)
            yield record


def column_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """The names of the columns of a table's files; of JSON every key that occurs.

    Raises:
      UserError: if the files differ in the names of their columns or in their types.
    """
    first: tuple[Path, dict[str, str]] | None = None
    names: dict[str, None] = {}
    for path in paths:
        kind, partition = _checked_kind(path), dict.fromkeys(_partition(path, paths), "text")
        if kind == "json":
            for _, row, _ in raw_objects(path):
                names |= dict.fromkeys(flatten(row, Counter()) if isinstance(row, dict) else ())
            names |= dict.fromkeys(partition)
            continue
        if kind == "delimited":
            types = dict.fromkeys(read_header(path), "text")
        else:
            with open_parquet(path) as file:
                types = {n: t for field in file.schema_arrow for n, t in _columns(field)}
        types |= partition
        first = first or (path, types)
        _compare(*first, path, types)
        names |= dict.fromkeys(types)
    return tuple(names)


def _partition(path: Path, paths: Sequence[Path]) -> dict[str, str]:
    """The columns that the folders of a part name (``locale=us``), as text."""
    root = os.path.commonpath([part.parent for part in paths])
    return dict(re.findall(r"([^/\\]+)=([^/\\]+)", str(path.parent)[len(root) :]))


def _checked_kind(path: Path) -> str:
    kind = table_kind(path)
    if not kind:
        raise UserError(f"{path}: expected a name that ends in {', '.join(KINDS)}, or one of .gz")
    return kind


def _compare(path: Path, types: Mapping[str, str], other: Path, others: Mapping[str, str]) -> None:
    """Checks that two parts of a table have the same columns."""
    if differing := sorted(types.keys() ^ others.keys()):
        raise UserError(
            f"{path} and {other} are parts of one table with different columns: {differing} "
            f"only in one; {list(types)} and {list(others)}"
        )
    for name, kind in types.items():
        if kind and others[name] and kind != others[name]:
            raise UserError(
                f"{path} and {other} are parts of one table, but the column {name!r} is {kind} in "
                f"the first and {others[name]} in the second: write both with one type"
            )


def flatten(row: Mapping[str, Any], left_out: Counter[str]) -> dict[str, str]:
    """The cells of a row of JSON or Parquet: texts by column, "" for the empty ones."""
    cells: dict[str, str] = {}
    unusable: set[str] = set()

    def add(name: str, value: Any, depth: int) -> None:
        if isinstance(value, dict) and depth:
            for key, part in value.items():
                add(f"{name}.{key}", part, depth - 1)
        elif isinstance(value, dict) or (
            isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
        ):
            unusable.add(name)
        elif isinstance(value, list):
            cells[name] = ", ".join(filter(None, map(_text, value)))
        else:
            cells[name] = _text(value)

    for key, value in row.items():
        add(key, value, 2 if f"{key}." == PRODUCT else 1)
    left_out.update(unusable)
    return cells


def _filled(cells: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in cells.items() if name and text}


def _text(value: Any) -> str:
    """A scalar as text, "" for a missing one."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < _WHOLE:
        return str(int(value))
    return str(value)


def _read_json(path: Path, left_out: Counter[str]) -> Iterator[Record | BadRow]:
    for line, row, _ in raw_objects(path):
        if isinstance(row, ValueError):
            yield BadRow(file=str(path), line=line, reason=str(row))
        elif isinstance(row, dict):
            yield Record(str(path), line, _filled(flatten(row, left_out)))
        else:
            shown = json.dumps(row, ensure_ascii=False)[:60]
            yield BadRow(file=str(path), line=line, reason=f"not an object: {shown}")


def raw_objects(path: Path) -> Iterator[tuple[int, Any, str]]:
    """The values that stand for rows, each with its line and its text as it stands in the file.

    A ValueError says why there is none. A rating of OpenSearch's judgment list has a text of its
    row alone.
    """
    lines = Lines(read_lines(path))
    first = next((line for line in lines if line.strip()), "")
    if first.strip() == "{" or first.lstrip().startswith("["):  # an array, or over several lines
        line = lines.number
        values = _concatenated(first + "".join(lines), line)
    else:
        values = _line_by_line(first, lines)
    for line, value, text in values:
        if isinstance(value, dict) and isinstance(value.get("judgmentRatings"), list):
            for row in _judgment_ratings(value):
                yield line, row, json.dumps(row, ensure_ascii=False)
        else:
            yield line, value, text


def _line_by_line(first: str, lines: Lines) -> Iterator[tuple[int, Any, str]]:
    """The value of each line, or a ValueError that says why there is none."""
    text: str | None = first
    while text is not None:
        if text.strip():
            try:
                if reason := undecoded(text):
                    raise ValueError(reason)
                yield lines.number, json.loads(text, **_JSON), text
            except (ValueError, RecursionError) as error:
                reason = str(error)
                known = reason.startswith("not UTF-8")
                yield lines.number, ValueError(reason if known else f"not JSON: {reason}"), text
        text = next(lines, None)


def _concatenated(text: str, line: int) -> Iterator[tuple[int, Any, str]]:
    """The values of a JSON array, or of objects over several lines, each with its first line."""
    decoder, end = json.JSONDecoder(**_JSON), 0
    while True:
        match = _BETWEEN.match(text, end)
        start = match.end() if match else end
        line += len(re.findall("\r\n|\r|\n", text[end:start]))
        if start == len(text):
            return
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            reason = f"not JSON: {error}; the rest of the file cannot be read"
            yield line, ValueError(reason), text[start:]
            return
        shown = text[start:end]
        yield line, ValueError(reason) if (reason := undecoded(shown)) else value, shown
        line += len(re.findall("\r\n|\r|\n", shown))


def _judgment_ratings(value: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of OpenSearch's judgment list."""
    for query in value["judgmentRatings"]:
        for row in query.get("ratings", ()):
            yield {
                "query": query.get("query"),
                "docid": row.get("docId"),
                "label": row.get("rating"),
            }


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file, packed or not, to be read batch by batch.

    Raises:
      UserError: if it is damaged.
    """
    try:
        with open_table(path) as file:
            packed = path.suffix.lower() == ".gz"
            source = pa.BufferReader(file.read()) if packed else path
        # A buffer instead of whole column chunks, as a row group may hold a million rows.
        yield pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the system, not of the content
            raise
        raise UserError(
            f"{path} cannot be read as Parquet ({error}): it may be cut short; get it again"
        ) from error


def _read_parquet(path: Path, left_out: Counter[str]) -> Iterator[Record | BadRow]:
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{path}: columns {twice} occur twice; rename one of each")
        line = 0
        for batch in file.iter_batches(_BATCH, use_threads=False):
            columns = {}
            for name, column in zip(names, batch.columns, strict=True):
                texts = None if name.startswith("__index_level_") else _values(column)
                if texts is None:
                    left_out[name] += len(batch)
                else:
                    columns[name] = texts
            for values in zip(*columns.values(), strict=True):
                line += 1
                cells = flatten(dict(zip(columns, values, strict=True)), left_out)
                yield Record(str(path), line, _filled(cells))


def _values(column: pa.Array) -> list[Any] | None:
    """A column as texts, or as Python's values where they are nested; None if that cannot be."""
    try:
        if pa.types.is_nested(column.type):
            return column.to_pylist()
        if pa.types.is_floating(column.type):
            return _number_texts(column).to_pylist()
        return pc.cast(column, pa.large_string()).to_pylist()
    except (pa.ArrowException, ValueError):  # bytes that are no text, nanoseconds in a list
        return None


def _number_texts(column: pa.Array) -> pa.Array:
    """Whole doubles as whole numbers, NaN as missing: how pandas writes a column with gaps."""
    if pa.types.is_float16(column.type):
        column = pc.cast(column, pa.float32())
    column = pc.if_else(pc.is_nan(column), None, column)
    small = pc.less(pc.abs(column), _WHOLE)
    whole = pc.and_(small, pc.equal(pc.floor(column), column))
    integers = pc.cast(pc.if_else(whole, column, 0), pa.int64())
    text = pa.large_string()
    return pc.if_else(whole, pc.cast(integers, text), pc.cast(column, text))


def _columns(field: pa.Field, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The names of the cells of a Parquet column, each with its kind; "" for a column of nulls."""
    name, kind = f"{prefix}{field.name}", field.type
    while pa.types.is_dictionary(kind):
        kind = kind.value_type
    if name.startswith("__index_level_"):
        return
    if pa.types.is_struct(kind):
        for part in kind:
            yield from _columns(part, f"{name}.")
    elif pa.types.is_null(kind):
        yield name, ""
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view():
        yield name, "text"
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        yield name, "number"
    else:
        yield name, str(kind)
