"""Opens users' files: the parts of a table in their order, unpacked and decoded into lines.

What is no table is named as what it is, with the way out: a Git LFS pointer, a workbook, a page.
"""

import contextlib
import glob
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from she_jax.types import UserError

KINDS = {
    ".csv": "delimited",
    ".tsv": "delimited",
    ".tab": "delimited",
    ".txt": "delimited",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
}

_PACKED = "a packed file", "unpack it, or pack it with gzip"
_WORKBOOK = "a workbook or a zip archive", "unpack it, or save the sheet as CSV (UTF-8)"
_PAGE = "a web page", "download the file itself; its link may need a login"
_FOREIGN = {  # how a file begins, in lower case: what it is, and what to do
    b"version https://git-lfs": ("a Git LFS pointer, not the data", "run git lfs pull"),
    b"pk\x03\x04": _WORKBOOK,
    b"\xd0\xcf\x11\xe0": _WORKBOOK,
    b"bzh": _PACKED,
    b"\xfd7zxz": _PACKED,
    b"\x28\xb5\x2f\xfd": _PACKED,
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
}
_HEAD = 64  # bytes that tell what a file is
_UNDECODED = re.compile("[\udc80-\udcff]")  # where Python's surrogateescape puts a byte


def table_parts(path: str) -> tuple[Path, ...]:
    """The files of a table: itself, or those of a folder or a pattern, numbers sorted as numbers.

    Raises:
      UserError: if there are none, or files of several kinds.
    """
    root = Path(path)
    if root.is_dir():
        candidates = [file for file in root.rglob("*") if table_kind(file) and file.is_file()]
        # Spark leaves _SUCCESS and .part-0.csv.crc beside its parts.
        parts = [file for file in candidates if file.name[0] not in "._"]
    elif glob.has_magic(path) and not root.exists():
        parts = [Path(file) for file in glob.glob(path, recursive=True) if Path(file).is_file()]
    else:
        return (root,)
    kinds = sorted({table_kind(file) for file in parts})
    if len(kinds) != 1:
        found = f"files of several kinds ({', '.join(kinds)})" if kinds else "no table"
        raise UserError(
            f"{path}: {found}; expected the parts of one table, such as {root / '*.parquet'}"
        )
    return tuple(sorted(parts, key=_natural))


def table_kind(path: Path) -> str:
    """``delimited``, ``json`` or ``parquet``, by a file's name without .gz; "" for other files."""
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return KINDS.get(name.suffix.lower(), "")


def _natural(path: Path) -> list[tuple[int, str]]:
    pieces = re.findall(r"\d+|\D+", str(path))
    return [(int(p), p) if p.isdecimal() else (-1, p) for p in pieces]


@contextlib.contextmanager
def open_table(path: Path) -> Iterator[BinaryIO]:
    """Opens a file of a user's, unpacked if it is gzip, after a look at how it begins.

    Raises:
      UserError: if the file is empty, cut short, or something else than a table.
    """
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(path, "rb"))
            if file.peek(2)[:2] == b"\x1f\x8b":
                unpacked = stack.enter_context(gzip.GzipFile(fileobj=file))
                file = stack.enter_context(io.BufferedReader(cast(io.RawIOBase, unpacked)))
            head = file.peek(_HEAD)[:_HEAD].lower()
            if not head:
                raise UserError(f"{path} is empty: expected a table")
            for beginning, (what, way_out) in _FOREIGN.items():
                if head.startswith(beginning):
                    raise UserError(f"{path} is {what}: {way_out}")
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} cannot be unpacked ({error}): it may be cut short; get it again"
        ) from error


def read_lines(path: Path) -> Iterator[str]:
    r"""The lines of a text file with their ends, which are ``\n``, ``\r\n`` or ``\r``.

    UTF-8, with or without a byte order mark, and UTF-16 with one are decoded. For bytes that are
    not UTF-8 see ``undecoded``.
    """
    with open_table(path) as file:
        head = file.peek(_HEAD)[:_HEAD]  # type: ignore[attr-defined]
        utf16 = head[:2] in (b"\xff\xfe", b"\xfe\xff")
        nuls = max(head[::2].count(0), head[1::2].count(0))
        if nuls > len(head) // 4 and not utf16:
            raise UserError(f"{path} is no text (or UTF-16 without a mark): save it as UTF-8")
        encoding, errors = ("utf-16", "replace") if utf16 else ("utf-8-sig", "surrogateescape")
        with io.TextIOWrapper(file, encoding, errors, newline="") as text:
            yield from text


def undecoded(text: str) -> str:
    """Why a text of ``read_lines`` cannot be used: a byte that is not UTF-8; empty if it can."""
    if text.isascii() or not (match := _UNDECODED.search(text)):
        return ""
    return (
        f"not UTF-8: byte 0x{ord(match[0]) - 0xDC00:02x}; save the file as UTF-8 (Excel: CSV UTF-8)"
    )


class Lines(Iterator[str]):
    """Lines with their numbers, which can be put back.

    Attributes:
      number: that of the last line, from 1 on.
    """

    def __init__(self, lines: Iterable[str]):
        self._lines, self._back, self.number = iter(lines), [], 0

    def __next__(self) -> str:
        line = self._back.pop() if self._back else next(self._lines)
        self.number += 1
        return line

    def put_back(self, lines: list[str]) -> None:
        """Makes the last lines the next ones again."""
        self._back += reversed(lines)
        self.number -= len(lines)
