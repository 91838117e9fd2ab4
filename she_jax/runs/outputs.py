"""What a prediction gives back to a user's table: its rows with labels, and judgment lists."""

import csv
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from she_jax.cot import CotSchema, LabelSet
from she_jax.data.content import name_of
from she_jax.data.dataset import ExampleSource, PreparedDataset, fingerprint
from she_jax.data.intake import repeated_uid
from she_jax.data.readers.copies import copy_table
from she_jax.data.readers.delimited import Record
from she_jax.data.readers.judgments import Judgments, TableConfig
from she_jax.data.sources import TABLES, DataConfig, table_config
from she_jax.evaluation.agreement_page import chain_lines
from she_jax.runs.predictions import label_type
from she_jax.training.files import printable
from she_jax.training.logging import log
from she_jax.types import Label

LABELED, JUDGMENTS = "labeled", "judgments"  # folders
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins so is a formula to a spreadsheet
_COLUMNS = ("label", "confidence", "expected", "review", "chain", "error")
_NOTHING: Mapping[str, Any] = dict.fromkeys(_COLUMNS)


class Outcome(NamedTuple):
    """What became of a record of a table.

    Attributes:
      place: of its pair among those that were judged; None if it was not judged.
      error: why it was not judged, or not for itself; None if it was.
    """

    place: int | None
    error: str | None = None

    @property
    def repeats(self) -> bool:
        """Whether an earlier record has its uid, and so its place and its label."""
        return self.place is not None and self.error is not None


class Table:
    """A user's table whose pairs were judged.

    Args:
      config: its options.
      dataset: what was prepared of it.
      examples: its pairs.
      rows: those that were judged.
      lines: their predictions.
      schema: the steps of the chain.

    Attributes:
      has_qids: whether it has ids of queries.
    """

    def __init__(
        self,
        config: TableConfig,
        dataset: PreparedDataset,
        examples: ExampleSource,
        rows: Sequence[int],
        lines: Sequence[Mapping[str, Any]],
        schema: CotSchema,
    ):
        self._config, self._judgments, self._dataset = config, Judgments(config), dataset
        self._examples, self._rows, self._lines = examples, rows, lines
        self._schema = schema
        self.has_qids = "qid" in self._judgments.columns.pair

    def outcomes(self) -> Iterator[Outcome]:
        """What became of each record, in their order."""
        repeated = {
            uid for bad in self._bad_rows() if (uid := repeated_uid(bad["reason"])) is not None
        }
        first: dict[str, int] = {}  # the places that later records repeat
        files = {str(part) for part in self._judgments.parts}
        record, bad_rows = 0, self._bad_rows()
        bad = next(bad_rows, None)
        while bad and bad["file"] not in files:  # of queries and products, which are read before
            record, bad = record + 1, next(bad_rows, None)
        judged = iter(enumerate(self._rows))
        place, row = next(judged, (None, None))
        pair = 0
        while pair < len(self._examples) or bad:
            if bad and bad["record"] == record:
                yield Outcome(first.get(repeated_uid(bad["reason"]) or ""), bad["reason"])
                bad = next(bad_rows, None)
            elif pair == row and place is not None:
                if repeated and (uid := self._lines[place]["uid"]) in repeated:
                    first[uid] = place
                yield Outcome(place)
                place, row = next(judged, (None, None))
                pair += 1
            else:
                yield Outcome(None, "not judged: data.eval_pairs")
                pair += 1
            record += 1

    def records(self) -> Iterator[tuple[int, Mapping[str, str]]]:
        """The place of each pair that was judged, with the cells of its record by field.

        ``query`` is the pair's, ``docid`` its uid if the table has none; ``qid`` may be missing.
        """
        for record, outcome in zip(self._judgments.records(), self.outcomes(), strict=True):
            if isinstance(record, Record) and outcome.place is not None and not outcome.repeats:
                cells = self._judgments.pair(record)
                if "query" not in cells:
                    cells["query"] = self._examples[self._rows[outcome.place]].query
                if "docid" not in cells:
                    cells["docid"] = self._lines[outcome.place]["uid"]
                yield outcome.place, cells

    @property
    def labels(self) -> LabelSet:
        """The label set."""
        return self._schema.labels

    def label(self, place: int) -> Label | None:
        """The label of a pair that was judged."""
        return self._lines[place]["label"]

    def ranks(self) -> Iterator[tuple[int, str, str]]:
        """The place, the system and the rank of each record that has them, repeated ones too."""
        if not (columns := self._judgments.columns.ranked):
            return
        for record, outcome in zip(self._judgments.records(), self.outcomes(), strict=True):
            if isinstance(record, Record) and outcome.place is not None:
                system, rank = (record.cells.get(name, "") for name in columns)
                if system and rank:
                    yield outcome.place, system, rank

    def write_labeled(self, folder: Path) -> None:
        """Writes the user's rows with labels; see ``copy_table``."""
        kinds = [pa.float64(), pa.float64(), pa.bool_(), pa.string(), pa.string()]
        types = [label_type(self._schema.labels), *kinds]
        names = copy_table(
            self._config.path,
            folder,
            dict(zip(_COLUMNS, types, strict=True)),
            map(self._answer, self.outcomes()),
            {**_NOTHING, "error": "empty row"},
        )
        if others := [f"{theirs} for {name}" for name, theirs in names.items() if theirs != name]:
            log(f"columns of {self._config.path} keep their names; ours: {', '.join(others)}")

    def _answer(self, outcome: Outcome) -> dict[str, Any]:
        """The new cells of a row."""
        if outcome.place is None:
            return {**_NOTHING, "error": outcome.error}
        line = self._lines[outcome.place]
        chain = " | ".join(text for text in chain_lines(line) if text)
        unread = self._schema.label_index >= 0 and line["label"] is None
        return {
            **{name: line[name] for name in ("label", "confidence", "expected", "review")},
            "chain": no_formula(printable(chain)) or None,
            "error": outcome.error or ("no label could be read in the answer" if unread else None),
        }

    def _bad_rows(self) -> Iterator[dict[str, Any]]:
        with (self._dataset.path / "bad_rows.jsonl").open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def open_judged_table(
    data: DataConfig,
    dataset: PreparedDataset,
    examples: ExampleSource,
    rows: Sequence[int],
    lines: Sequence[Mapping[str, Any]],
    schema: CotSchema,
) -> Table | None:
    """The table of the pairs; None if they are of no table, or it is not what it was."""
    if data.name not in TABLES or data.pairs is not None:
        return None
    config = table_config(data)
    if config.missing_sources() or name_of(config.options()) != fingerprint(dataset):
        log(f"{data.path} is gone or has changed: its rows are not written again with labels")
        return None
    return Table(config, dataset, examples, rows, lines, schema)


def write_outputs(table: Table, data: DataConfig, workdir: Path) -> None:
    """Writes the user's rows with labels (``labeled/``) and judgment lists (``judgments/``).

    Args:
      table: the judged one.
      data: its options.
      workdir: the folder of the prediction.
    """
    for name in (LABELED, JUDGMENTS):  # of a killed run
        shutil.rmtree(workdir / name, ignore_errors=True)
    drafts = {name: workdir / f"{name}.part" for name in (LABELED, JUDGMENTS)}
    for draft in drafts.values():
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
    write_judgments(table, drafts[JUDGMENTS])
    if data.name == "trec":  # whose rows have no room for more columns
        drafts.pop(LABELED).rmdir()
    else:
        table.write_labeled(drafts[LABELED])
        log(f"your rows with labels: {workdir / LABELED}")
    for name, draft in drafts.items():
        draft.replace(workdir / name)
    log(f"judgment lists for Quepid, OpenSearch and TREC's tools: {workdir / JUDGMENTS}")


def write_judgments(table: Table, folder: Path) -> None:
    """Writes the labels as the judgment lists of other tools.

    ``quepid.csv`` has the columns query, docid, rating; ``opensearch.json`` is a list of
    ``judgmentRatings``; ``qrels.txt`` has TREC's lines ``qid 0 docid grade`` and ``queries.tsv``
    its queries, numbered from 1 where the table has no qid. What has no label is left out, and of
    the qrels what has a blank in an id, or no id. A grade is the label if labels are whole numbers
    that rise from worst to best, else its place, 0 for the worst, see ``grades``.
    """
    grade_of = grades(table.labels)
    if any(label != grade for label, grade in grade_of.items()):
        meaning = ", ".join(f"{grade} for {label}" for label, grade in grade_of.items())
        log(f"{JUDGMENTS}: tools take the larger grade for the better: {meaning}")
    ratings: dict[str, list[str]] = {}  # by query, as JSON
    queries: dict[str, str] = {}  # by qid
    numbers: dict[str, int] = {}  # by query
    lacking = 0
    with (
        (folder / "quepid.csv").open("w", encoding="utf-8", newline="") as quepid,
        (folder / "qrels.txt").open("w", encoding="utf-8") as qrels,
    ):
        table_rows = csv.writer(quepid, lineterminator="\n")
        table_rows.writerow(["query", "docid", "rating"])
        for place, cells in table.records():
            label, query, docid = table.label(place), cells["query"], cells["docid"]
            if label is None:
                continue
            grade = str(grade_of[label])
            table_rows.writerow([query, docid, grade])
            rating = json.dumps({"docId": docid, "rating": grade}, ensure_ascii=False)
            ratings.setdefault(query, []).append(rating)
            number = "" if table.has_qids else str(numbers.setdefault(query, len(numbers) + 1))
            fields = [cells.get("qid", number), "0", docid, grade]
            if any(len(field.split()) != 1 for field in fields):
                lacking += 1
                continue
            queries.setdefault(fields[0], query)
            qrels.write(" ".join(fields) + "\n")
    with (folder / "opensearch.json").open("w", encoding="utf-8") as file:
        before = '{\n"judgmentRatings": [\n'
        for query, rows in ratings.items():
            text = json.dumps(query, ensure_ascii=False)
            file.write(f'{before}{{"query": {text}, "ratings": [{", ".join(rows)}]}}')
            before = ",\n"
        file.write("\n]}\n" if ratings else '{"judgmentRatings": []}\n')
    with (folder / "queries.tsv").open("w", encoding="utf-8") as file:
        file.writelines(f"{qid}\t{' '.join(text.split())}\n" for qid, text in queries.items())
    if lacking:
        log(
            f"{lacking:,} labels are not in {JUDGMENTS}/qrels.txt, where no id may have a blank or "
            "be missing"
        )


def grades(labels: LabelSet) -> dict[Label, int]:
    """What judgment lists of other tools have for each label: whole numbers, more for better."""
    values = labels.values
    if all(isinstance(value, int) for value in values) and list(values) == sorted(values):
        return {value: int(value) for value in values}
    return {value: place for place, value in enumerate(values)}


def no_formula(text: str) -> str:
    """A text of a model that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text
