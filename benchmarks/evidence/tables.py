"""Renders ``docs/results/*.json`` into ``docs/results.md``.

Run ``python -m benchmarks.evidence.tables``. Each JSON file holds one table. Its keys:

* ``schema``: 1. ``title``, ``note``, ``command``, ``date``, ``hardware``, ``source``: strings.
* ``commit``: where the figures were measured, or null if unknown (the note says so).
* ``seeds``: a list of integers.
* ``columns``: column names. ``rows``: objects with ``name`` and a value for each column.
* ``order`` (optional): position on the page. Without it a file comes last, sorted by name.
* ``digits`` (optional): the decimals of a column, 3 if it is not listed.

A value is a number, a string, null, or an object: ``{"mean", "sd"}`` over seeds, ``{"mean", "low",
"high"}`` for a difference and its 95% interval, or ``{"mean", "values"}`` for a difference and
the difference of each seed.
"""

import json
import math
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXTS = ("title", "date", "hardware", "command", "source", "note")
LISTS = ("seeds", "columns", "rows")
REQUIRED = {"schema": int, "commit": (str, type(None))}
REQUIRED |= dict.fromkeys(TEXTS, str) | dict.fromkeys(LISTS, list)
OPTIONAL = {"order": int, "digits": dict}
COMPOUND = ({"mean", "sd"}, {"mean", "low", "high"}, {"mean", "values"})


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _is_value(value: Any) -> bool:
    """Whether a cell holds one of the documented kinds of values."""
    if not isinstance(value, dict):
        return value is None or isinstance(value, str) or _is_number(value)
    parts = dict(value)
    seeds = parts.pop("values", [0])
    is_list = isinstance(seeds, list) and len(seeds) > 0
    return set(value) in COMPOUND and is_list and all(map(_is_number, [*parts.values(), *seeds]))


def check(table: Any) -> None:
    """Raises ValueError that names the first part of a table that breaks the schema."""
    if not isinstance(table, dict):
        raise ValueError(f"expected an object, got {type(table).__name__}")
    if missing := [key for key in REQUIRED if key not in table]:
        raise ValueError(f"missing keys: {', '.join(missing)}")
    if unknown := [key for key in table if key not in REQUIRED | OPTIONAL]:
        raise ValueError(f"unknown keys: {', '.join(unknown)}")
    for key, kind in (REQUIRED | OPTIONAL).items():
        if key in table and (not isinstance(table[key], kind) or isinstance(table[key], bool)):
            raise ValueError(f"{key}: unexpected {table[key]!r}")
    if table["schema"] != 1:
        raise ValueError(f"schema: expected 1, got {table['schema']}")
    if not table["seeds"] or not all(type(seed) is int for seed in table["seeds"]):
        raise ValueError(f"seeds: expected a list of integers, got {table['seeds']}")
    columns = table["columns"]
    names = ["name", *columns]
    if (
        not columns
        or not all(isinstance(name, str) for name in names)
        or len(set(names)) != len(names)
    ):
        raise ValueError(f"columns: expected distinct names other than 'name', got {columns}")
    for column, digits in table.get("digits", {}).items():
        if column not in columns or type(digits) is not int or digits < 0:
            raise ValueError(f"digits: expected a column and a count, got {column!r}: {digits!r}")
    for index, row in enumerate(table["rows"]):
        if not isinstance(row, dict) or set(row) != {"name", *columns}:
            keys = sorted(row) if isinstance(row, dict) else row
            raise ValueError(f"rows[{index}]: expected 'name' and the columns, got {keys!r}")
        for column, value in row.items():
            if not (isinstance(value, str) if column == "name" else _is_value(value)):
                raise ValueError(f"rows[{index}] {row['name']!r}, {column!r}: unexpected {value!r}")


def cell(value: Any, digits: int = 3) -> str:
    """Returns a value as Markdown: a signed difference if it has an interval or seeds' values."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("|", "\\|").replace("\n", " ")
    if not isinstance(value, dict):
        return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"
    if "sd" in value:
        return f"{value['mean']:.{digits}f} ± {value['sd']:.{digits}f}"
    signed = [f"{number:+.{digits}f}" for number in value.get("values", [])]
    if "low" in value:
        return (
            f"{value['mean']:+.{digits}f} [{value['low']:+.{digits}f}, {value['high']:+.{digits}f}]"
        )
    return f"{value['mean']:+.{digits}f} ({', '.join(signed)})"


def section(table: dict[str, Any]) -> str:
    """Returns one table as Markdown: title, note, origin, rows."""
    commit = f"`{table['commit']}`" if table["commit"] else "commit unknown"
    seeds = f"seed{'s'[: len(table['seeds']) > 1]} {', '.join(map(str, table['seeds']))}"
    origin = [f"`{table['command']}`", commit, table["date"], table["hardware"], seeds]
    digits = table.get("digits", {})
    rows = [["", *map(cell, table["columns"])], ["---"] * (len(table["columns"]) + 1)]
    for row in table["rows"]:
        cells = (cell(row[column], digits.get(column, 3)) for column in table["columns"])
        rows.append([cell(row["name"]), *cells])
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    text = f"{table['note']} *Measured:* {'; '.join(origin)}. *Source:* {table['source']}."
    return "\n".join([f"## {table['title']}", text, "", *lines])


def render(folder: Path) -> str:
    """Returns the page: ``preface.md`` of the folder, then its tables in order."""
    tables = []
    for path in sorted(folder.glob("*.json")):
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            check(table)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        tables.append((table.get("order", math.inf), path.name, table))
    preface = (folder / "preface.md").read_text(encoding="utf-8").strip()
    return "\n\n".join([preface, *(section(table) for *_, table in sorted(tables))]) + "\n"


if __name__ == "__main__":
    (DOCS / "results.md").write_text(render(DOCS / "results"), encoding="utf-8")
