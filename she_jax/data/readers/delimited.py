"""Reads CSV, TSV and TREC's qrels: every cell as its text, every row with its line.

A quote that was not closed would take the rows after it into one cell (readers of CSV do that
without a word). Here the row where it opened is bad, and the rows after it are read.
"""

import contextlib
import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from she_jax.data.readers.table_files import Lines, read_lines, undecoded
from she_jax.types import BadRow, UserError

OPEN_QUOTE = "a quote was not closed: the cell runs on into the next rows"
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}


class Record(NamedTuple):
    """A row of a file: where it stands, and its cells that are not empty, by column."""

    file: str
    line: int
    cells: dict[str, str]


def read_delimited(path: Path) -> Iterator[Record | BadRow]:
    """The rows of a CSV file whose delimiter is a comma, a semicolon or a tab.

    Cells lose the blanks around them. Rows without any text are skipped like blank lines.

    Raises:
      UserError: if the header cannot be read.
    """
    return (row for _, row in raw_rows(path) if row is not None)


def raw_rows(path: Path) -> Iterator[tuple[str, Record | BadRow | None]]:
    """The rows of a CSV file as they stand, line ends included, each with what is read of it.

    The first is the header. Of it, and of rows without any text, nothing is read.

    Raises:
      UserError: if the header cannot be read.
    """
    lines = _RowLines(read_lines(path))
    header, delimiter = _header(lines, path)
    yield lines.row(), None
    for line in lines:
        number = lines.number
        cells = _cells(line, lines, delimiter, len(header))
        yield lines.row(), _read(cells, header, path, number)


def _read(
    cells: list[str] | str, header: list[str], path: Path, line: int
) -> Record | BadRow | None:
    """What is read of a row's cells, or of the reason why it has none."""
    if isinstance(cells, str):
        return BadRow(file=str(path), line=line, reason=cells)
    if not any(map(str.strip, cells)):
        return None
    if len(cells) != len(header):
        reason = f"wrong number of cells: {len(cells)}, expected {len(header)}"
        return BadRow(file=str(path), line=line, reason=reason)
    if reason := undecoded("".join(cells)):
        return BadRow(file=str(path), line=line, reason=reason)
    named = zip(header, cells, strict=True)
    return Record(
        str(path), line, {name: text for name, cell in named if name and (text := cell.strip())}
    )


class _RowLines(Lines):
    """Lines that remember those of the row at hand."""

    def __init__(self, lines: Iterable[str]):
        super().__init__(lines)
        self._taken: list[str] = []

    def __next__(self) -> str:
        self._taken.append(line := super().__next__())
        return line

    def put_back(self, lines: list[str]) -> None:
        super().put_back(lines)
        del self._taken[len(self._taken) - len(lines) :]

    def row(self) -> str:
        """What was taken since the last call."""
        text = "".join(self._taken)
        self._taken.clear()
        return text


def read_header(path: Path) -> tuple[str, ...]:
    """The names of the columns of a CSV file; columns without a name are left out.

    Raises:
      UserError: if there is no header, or a name stands in it twice.
    """
    return tuple(filter(None, read_layout(path)[0]))


def read_layout(path: Path) -> tuple[list[str], str]:
    """The names in the header of a CSV file, "" for a column without one, and the delimiter.

    Raises:
      UserError: if there is no header, or a name stands in it twice.
    """
    return _header(Lines(read_lines(path)), path)


def _header(lines: Lines, path: Path) -> tuple[list[str], str]:
    """The names in the first line that is not blank, and the delimiter between them."""
    first = next((line for line in lines if line.strip()), "")
    if reason := undecoded(first):
        raise UserError(f"{path}: the header is {reason}")
    outside = "".join(first.split('"')[::2])
    delimiters = [delimiter for delimiter in _DELIMITERS if delimiter in outside]
    if len(delimiters) != 1:
        names = [_DELIMITERS[delimiter] for delimiter in delimiters or _DELIMITERS]
        found = f"it holds {' and '.join(names)}" if delimiters else f"no {', '.join(names)} in it"
        raise UserError(
            f"{path}: the delimiter is not clear from the header {first.strip()[:80]!r}: {found}; "
            "expected names with one kind of delimiter between them"
        )
    cells = _cells(first, lines, delimiters[0], 0)
    if isinstance(cells, str):
        raise UserError(f"{path}: the header cannot be read: {cells}")
    header = [" ".join(cell.split()) for cell in cells]
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise UserError(f"{path}: columns {twice} stand twice in the header; rename one of each")
    return header, delimiters[0]


def _cells(first: str, lines: Lines, delimiter: str, width: int) -> list[str] | str:
    """The cells of the row that begins with a line, or why it cannot be read.

    Takes the further lines of the row from ``lines``, except where a quote was not closed: that is
    seen where a line within a cell splits into as many cells as the header, where text follows the
    closing quote of a cell of several lines, and at the end of the file.

    Args:
      first: its first line.
      lines: those after it.
      delimiter: between the cells.
      width: number of columns.
    """
    if '"' not in first:
        return first.rstrip("\r\n").split(delimiter)
    if first.count('"') % 2 == 0:  # most rows are whole, and need no generator
        with contextlib.suppress(csv.Error):
            return next(csv.reader([first], delimiter=delimiter, strict=True))
    taken = [first]

    def row_lines() -> Iterator[str]:
        yield first
        for line in lines:
            taken.append(line)
            if '"' not in line.replace('""', "") and line.count(delimiter) + 1 == width:
                return  # the reader below finds the quote open
            yield line

    try:
        cells = next(csv.reader(row_lines(), delimiter=delimiter, strict=True))
        # A tab in a cell of several lines is no text: two rows share a pair of quotes.
        if len(taken) == 1 or delimiter != "\t" or not any("\t" in cell for cell in cells):
            return cells
    except csv.Error as error:
        if len(taken) == 1 and "unexpected end" not in str(error):
            return _lenient(first, delimiter)
    lines.put_back(taken[1:])
    return OPEN_QUOTE


def _lenient(line: str, delimiter: str) -> list[str] | str:
    """The cells of a line with text behind a closing quote, such as ``"classic" fan``."""
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error as error:
        return f"not readable: {error}"


def read_qrels(path: Path) -> Iterator[Record | BadRow]:
    """The rows of TREC's relevance judgments, ``qid 0 docid grade``, under these names."""
    for line, text in enumerate(read_lines(path), start=1):
        cells = text.split()
        if not cells:
            continue
        if len(cells) != 4 or undecoded(text):
            reason = undecoded(text) or f"wrong number of cells: {len(cells)}, expected 4"
            yield BadRow(file=str(path), line=line, reason=reason)
        else:
            qid, _, docid, label = cells
            yield Record(str(path), line, {"qid": qid, "docid": docid, "label": label})
