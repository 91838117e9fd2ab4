"""Reads Wayfair's WANDS data set (Chen et al., ECIR 2022).

The data are three tab-separated files, ``query.csv``, ``product.csv`` and ``label.csv``. Exact,
Partial and Irrelevant become 4, 3 and 1, so no pair has class 2. Products (43 thousand) are held in
memory, and labels are streamed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from she_jax.cot import LabelSet
from she_jax.data.dataset import ExampleBuilder
from she_jax.data.intake import Row
from she_jax.data.rationales import implied_steps
from she_jax.data.readers.delimited import read_delimited, read_header
from she_jax.data.splits import HashSplitConfig, split_bounds
from she_jax.types import BadRow, Example, UserError

WANDS_LABELS = {"Exact": 4, "Partial": 3, "Irrelevant": 1}

_FIELDS = {
    "title": "product_name",
    "class": "product_class",
    "category": "category hierarchy",
    "features": "product_features",
    "description": "product_description",
}


@dataclass(kw_only=True, eq=False)
class WandsConfig(HashSplitConfig):
    """Options of WANDS.

    Attributes:
      path: the folder with the three files.
      labels: the set that the labels become part of: ``1-4`` or ``esci``.
    """

    path: str
    labels: str = "1-4"

    @property
    def label_set(self) -> LabelSet:
        return LabelSet.parse(self.labels)

    def sources(self) -> tuple[Path, ...]:
        return tuple(Path(self.path) / f"{name}.csv" for name in ("query", "product", "label"))


class Wands(ExampleBuilder):
    """WANDS: Exact, Partial, Irrelevant become 4, 3, 1."""

    builder_config: WandsConfig

    def rows(self) -> Iterator[Row | BadRow]:
        query_file, product_file, label_file = self.builder_config.sources()
        queries, products = {}, {}
        for row in _read_cells(query_file, ("query_id", "query")):
            if isinstance(row, BadRow):
                yield row
            else:
                queries[row.cells[0]] = row.cells[1]
        for row in _read_cells(product_file, ("product_id", *_FIELDS.values())):
            if isinstance(row, BadRow):
                yield row
            else:
                products[row.cells[0]] = dict(zip(_FIELDS, row.cells[1:], strict=True))
        bounds = split_bounds(queries.values(), self.builder_config)
        for row in _read_cells(label_file, ("id", "query_id", "product_id", "label")):
            if isinstance(row, BadRow):
                yield row
                continue
            try:
                example = _join(row.cells, queries, products)
            except ValueError as error:
                yield BadRow(file=str(label_file), line=row.line, reason=str(error))
                continue
            split = self.builder_config.split_of(example.query, bounds)
            yield Row(split=split, example=example, file=str(label_file), line=row.line)


def _join(
    cells: list[str], queries: dict[str, str], products: dict[str, dict[str, str]]
) -> Example:
    """Joins a row of the label file with its query and product.

    Raises:
      UserError: if the row cannot be used; the message is the reason.
    """
    uid, query_id, product_id, label_name = cells
    if query_id not in queries:
        raise UserError(f"no such query: {query_id!r}")
    if product_id not in products:
        raise UserError(f"no such product: {product_id!r}")
    if label_name not in WANDS_LABELS:
        raise UserError(f"unknown label: {label_name!r}, expected {', '.join(WANDS_LABELS)}")
    label = WANDS_LABELS[label_name]
    steps = implied_steps(label)
    return Example(
        uid=uid,
        query=queries[query_id],
        product=products[product_id],
        label=label,
        steps=steps,
        annotations=tuple(steps),
    )


class _Cells(NamedTuple):
    line: int
    cells: list[str]


def _read_cells(path: Path, columns: tuple[str, ...]) -> Iterator[_Cells | BadRow]:
    """Yields each row's line number and its cells in the order of ``columns``.

    Raises:
      UserError: if a column is missing; lists the existing ones.
    """
    header = read_header(path)
    if missing := [name for name in columns if name not in header]:
        raise UserError(f"{path}: no column {missing}; expected {columns}, found {header}")
    for row in read_delimited(path):
        if isinstance(row, BadRow):
            yield row
        else:
            yield _Cells(row.line, [row.cells.get(name, "") for name in columns])
