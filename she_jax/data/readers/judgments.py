"""A user's table of judgments: where it is, its columns as understood, and its rows as texts."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from she_jax.cot import CotSchema, LabelSet
from she_jax.data.readers.columns import Columns, find_columns, need_columns, parse_columns
from she_jax.data.readers.delimited import Record, read_qrels
from she_jax.data.readers.records import PRODUCT, column_names, read_records
from she_jax.data.readers.table_files import read_lines, table_kind, table_parts, undecoded
from she_jax.data.splits import HashSplitConfig
from she_jax.types import BadRow

_QUERY_COLUMNS = ("qid", "query")


@dataclass(kw_only=True, eq=False)
class TableConfig(HashSplitConfig):
    """Options of a user's tables.

    Attributes:
      path: the judgments: a file, a folder or a pattern such as ``parts/*.parquet``.
      products: the same of the table of products; "" where the products stand with the judgments.
      queries: the table of queries that ``qid`` finds, with or without a header.
      columns: see ``she_jax.data.readers.columns.find_columns``.
      qrels: the judgments are TREC's: ``qid 0 docid grade``.
      evaluation: put every row in ``test``, whatever its ``split``, to evaluate on the whole file.
      chain: the arguments of ``CotSchema.build`` for the run's chain, with its labels.
    """

    locations: ClassVar[tuple[str, ...]] = ("path", "products", "queries")
    path: str
    products: str = ""
    queries: str = ""
    columns: str = ""
    qrels: bool = False
    evaluation: bool = False
    chain: dict[str, Any] = field(default_factory=dict)

    @property
    def schema(self) -> CotSchema:
        """The steps of the chain."""
        return CotSchema.build(**self.chain)

    @property
    def label_set(self) -> LabelSet:
        return self.schema.labels

    @property
    def needs_title(self) -> bool:
        return self.schema.label_index >= 0

    def sources(self) -> tuple[Path, ...]:
        paths = filter(None, (self.path, self.products, self.queries))
        return tuple(part for path in paths for part in table_parts(path))


class Judgments:
    """The table of judgments of a config.

    Attributes:
      names: its columns.
      columns: those that are read.
      parts: its files.
    """

    names: tuple[str, ...]
    columns: Columns

    def __init__(self, config: TableConfig):
        """Looks at the columns.

        Raises:
          UserError: if one that is needed or named is missing.
        """
        self._qrels, self.parts = config.qrels, table_parts(config.path)
        self.names = ("qid", "docid", "label") if config.qrels else column_names(self.parts)
        table, products = (config.path, self.names), None
        if config.products:
            products = (config.products, column_names(table_parts(config.products)))
        needed = ["docid", *(["title"] if config.needs_title else [])]
        need_columns(self._needed(config), config.columns, table, products, needed)
        self.columns = find_columns(config.columns, table, products)

    def _needed(self, config: TableConfig) -> list[str]:
        """The fields that must have a column."""
        needed = ["qid" if config.queries else "query"]
        if config.products:
            needed.append("docid")
        elif config.needs_title:
            needed.append("title")
        others = {*self.names, *parse_columns(config.columns)} & {"raters", "rationale"}
        if config.schema.label_index >= 0 and not (config.evaluation or others):
            needed.append("label")
        return needed

    def records(self, left_out: Counter[str] | None = None) -> Iterator[Record | BadRow]:
        """The rows; ``left_out`` counts what cannot be a cell, by column."""
        if not self._qrels:
            return read_records(self.parts, Counter() if left_out is None else left_out)
        return (record for part in self.parts for record in read_qrels(part))

    def pair(self, record: Record) -> dict[str, str]:
        """The cells of a row by the field that they are read as, without the product's."""
        return {f: record.cells[c] for f, c in self.columns.pair.items() if c in record.cells}

    def rater_texts(self, record: Record) -> list[str]:
        """The labels of a row's raters; a cell may hold several with commas between them."""
        cells = (record.cells.get(column, "") for column in self.columns.raters)
        return [t for cell in cells for text in cell.split(",") if (t := text.strip())]

    def unread(self) -> list[str]:
        """The columns that are not read."""
        read = self.columns.read
        return [n for n in self.names if n not in read and not n.startswith(PRODUCT)]


def load_queries(path: str, queries: dict[str, str]) -> Iterator[BadRow]:
    """Reads queries by their ``qid`` into a dict, and yields the rows that cannot be used.

    The file is a table with the columns ``qid`` and ``query``, or has lines ``qid<TAB>query``. Of
    several rows with one qid the first counts.

    Raises:
      UserError: if a table lacks one of the columns.
    """
    for part in table_parts(path):
        first = next((line for line in read_lines(part) if line.strip()), "")
        if table_kind(part) in ("json", "parquet") or "query" in re.split("[,;\t\r\n]", first):
            names = column_names([part])
            need_columns(_QUERY_COLUMNS, "", (path, names))
            records = read_records([part], Counter())
        else:
            records = _tab_separated(part)
        for record in records:
            if isinstance(record, BadRow):
                yield record
            elif all(name in record.cells for name in _QUERY_COLUMNS):
                queries.setdefault(*(record.cells[name] for name in _QUERY_COLUMNS))
            else:
                yield BadRow(file=record.file, line=record.line, reason="query without text or qid")


def _tab_separated(path: Path) -> Iterator[Record | BadRow]:
    for line, text in enumerate(read_lines(path), start=1):
        cells = [cell.strip() for cell in text.split("\t", 1)]
        if reason := undecoded(text):
            yield BadRow(file=str(path), line=line, reason=reason)
        elif text.strip():
            named = zip(_QUERY_COLUMNS, cells, strict=False)
            yield Record(str(path), line, {name: cell for name, cell in named if cell})
