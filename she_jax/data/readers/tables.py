"""Reads a user's own pairs from tables: CSV, TSV, Parquet and JSON, and TREC's qrels.

A table of judgments has a row for each pair. Its product stands in the same row, or in a table of
products that ``docid`` finds. A JSON row may hold its product as an object::

    {"query": "red mug", "product": {"title": "Mug, red", "brand": "Acme"}, "label": 4}

All columns of a table of products become fields of the product. Of the judgments only the columns
of ``she_jax.data.readers.columns.FIELDS``, ``title``, and those that ``data.columns`` names are
read, since an explanation or a rater's comment must not reach the prompt.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import islice

from she_jax.data.dataset import ExampleBuilder
from she_jax.data.intake import Row
from she_jax.data.readers.delimited import Record
from she_jax.data.readers.judgments import Judgments, TableConfig, load_queries
from she_jax.data.readers.pairs import PairReader
from she_jax.data.readers.products import Products
from she_jax.data.readers.table_files import table_parts
from she_jax.types import BadRow

_BATCH = 20_000  # judgments whose products are looked up together


class Tables(ExampleBuilder):
    """A user's tables of judgments and products."""

    builder_config: TableConfig

    def rows(self) -> Iterator[Row | BadRow]:
        config = self.builder_config
        judgments, left_out = Judgments(config), Counter[str]()
        queries: dict[str, str] = {}
        if config.queries:
            yield from load_queries(config.queries, queries)
        products = None
        if config.products:
            products = Products(judgments.columns.key, judgments.columns.renamed)
            yield from products.load(table_parts(config.products), left_out)
        reader = PairReader(judgments, queries, config)
        yield from _joined(judgments, products, reader, left_out)
        notes = reader.notes()
        if left_out:
            names = ", ".join(f"{name} ({n:,} rows)" for name, n in left_out.items())
            notes.append(f"fields left out, because they hold objects: {names}")
        if products and products.repeated:
            notes.append(
                f"{config.products}: {products.repeated:,} rows repeat a docid; the first counts"
            )
        self.notes = notes


def _joined(
    judgments: Judgments,
    products: Products | None,
    reader: PairReader,
    left_out: Counter[str],
) -> Iterator[Row | BadRow]:
    """The rows of the judgments in their order, each with its product."""
    docid = judgments.columns.pair.get("docid", "")
    records = judgments.records(left_out)
    while batch := list(islice(records, _BATCH)):
        ids = [r.cells.get(docid) if isinstance(r, Record) else None for r in batch]
        found = [{}] * len(batch) if products is None else products.find(ids)
        for record, key, product in zip(batch, ids, found, strict=True):
            if isinstance(record, BadRow):
                yield record
                continue
            try:
                if product is None:
                    raise ValueError(f"no such product: {key!r}" if key else "empty docid")
                yield reader.row(record, product)
            except ValueError as error:
                yield BadRow(file=record.file, line=record.line, reason=str(error))
