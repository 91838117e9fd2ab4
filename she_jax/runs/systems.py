"""Ranking systems that a report compares: of a TREC run file, or of a table's columns."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from she_jax.data.readers.judgments import Judgments
from she_jax.data.readers.table_files import read_lines
from she_jax.data.sources import TABLES, DataConfig, table_config
from she_jax.runs.outputs import Table
from she_jax.training.logging import log
from she_jax.types import UserError

_FIELDS = 6  # of a run file: qid Q0 docid rank score tag


def read_systems(table: Table, run: str) -> dict[str, dict[int, float]]:
    """Where each system puts the judged pairs: by name, the place of a pair to a rank.

    Args:
      table: the judged one; its columns ``system`` and ``rank`` are read if there is no run file.
      run: a TREC run file, ``qid Q0 docid rank score tag``. The tag names the system, and as in
        trec_eval the score decides, not the rank: here it stands with its sign changed. "" for
        none.

    What is no number, or a line of another form, is left out, counted, and the first of it shown.
    """
    if run:
        return _of_run(table, Path(run))
    ranks: dict[str, dict[int, float]] = {}
    bad = []
    for place, system, rank in table.ranks():
        if (number := _number(rank)) is None:
            bad.append(f"system {system!r}: rank {rank!r}")
        else:
            ranks.setdefault(system, {}).setdefault(place, number)
    _say_bad(bad, "ranks", "a number")
    return ranks


def check_run(run: str, data: DataConfig) -> None:
    """Checks before anything is judged that a run file can be compared.

    Raises:
      FileNotFoundError: if it is missing.
      UserError: if the pairs have no qid to find it by.
    """
    if not Path(run).is_file():
        raise FileNotFoundError(f"predict.systems={run}: there is no such file")
    is_table = data.name in TABLES and data.pairs is None
    if not is_table or "qid" not in Judgments(table_config(data)).columns.pair:
        raise UserError(
            f"predict.systems={run}: its lines are found by qid and docid, and the pairs have no "
            "column qid; name it: --config.data.columns=qid=COLUMN"
        )


def _of_run(table: Table, path: Path) -> dict[str, dict[int, float]]:
    places: Mapping[tuple[str, str], int] = {
        (cells.get("qid", ""), cells["docid"]): place for place, cells in table.records()
    }
    ranks: dict[str, dict[int, float]] = {}
    unknown, bad = 0, []
    for number, text in enumerate(read_lines(path), start=1):
        fields = text.split()
        if not fields:
            continue
        if len(fields) != _FIELDS or (score := _number(fields[4])) is None:
            bad.append(f"{path}:{number}: {text.strip()!r}")
            continue
        qid, _, docid, _, _, system = fields
        place = places.get((qid, docid))
        unknown += place is None
        scores = ranks.setdefault(system, {})
        if place is not None:
            scores.setdefault(place, -score)
    _say_bad(bad, "lines", "qid Q0 docid rank score tag, with a number as score")
    if unknown:
        log(f"{path}: {unknown:,} lines are of no judged pair, and are left out")
    return ranks


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _say_bad(bad: Sequence[str], what: str, expected: str) -> None:
    if bad:
        log(f"{len(bad):,} {what} are left out, the first: {bad[0]}; expected {expected}")
