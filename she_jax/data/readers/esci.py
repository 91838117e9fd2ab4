"""Reads Amazon's Shopping Queries data set (ESCI; Reddy et al., arXiv 2206.06588).

The official release is two parquet files. ``shopping_queries_dataset_examples.parquet``, with a
row per labeled pair, is joined with ``shopping_queries_dataset_products.parquet`` on
(``product_id``, ``product_locale``). The full data set has 2.6 million pairs of 1.8 million
products, so pairs are held in memory as numeric columns and product texts are streamed.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from she_jax.cot import LabelSet
from she_jax.data.dataset import ExampleBuilder, ExampleConfig
from she_jax.data.intake import Row, query_hash
from she_jax.data.rationales import implied_steps
from she_jax.data.readers.table_files import open_table
from she_jax.types import BadRow, Example, UserError

pc: Any = pyarrow.compute  # defines its functions at import, where type checkers miss them

ESCI_LABELS = {"E": 4, "S": 3, "C": 2, "I": 1}
SUBSETS = ("all", "small", "large")

_EXAMPLES = "shopping_queries_dataset_examples.parquet"
_PRODUCTS = "shopping_queries_dataset_products.parquet"
_EXAMPLE_COLUMNS = {
    "example_id": "integer",
    "query": "text",
    "query_id": "integer",
    "product_id": "text",
    "product_locale": "text",
    "esci_label": "text",
    "small_version": "integer",
    "large_version": "integer",
    "split": "text",
}
_FIELDS = {
    "title": "product_title",
    "brand": "product_brand",
    "colour": "product_color",
    "bullets": "product_bullet_point",
    "description": "product_description",
}
_PRODUCT_COLUMNS = {"product_id": "text", "product_locale": "text"} | {
    name: "text" for name in _FIELDS.values()
}
_BATCH = 2_000  # products decoded at once


@dataclass(kw_only=True, eq=False)
class EsciConfig(ExampleConfig):
    """Options that select a part of ESCI.

    Attributes:
      path: the folder with the two parquet files.
      locales: any of ``us``, ``jp``, ``es``; empty for all.
      subset: ``small`` (the harder queries), ``large``, or ``all`` for every row.
      validation_share: share of the official training queries, in [0, 1), that goes to validation.
      labels: the set that the labels become part of: ``1-4`` or ``esci``.
    """

    path: str
    locales: tuple[str, ...] = ()
    subset: str = "all"
    validation_share: float = 0.1
    labels: str = "1-4"

    @property
    def label_set(self) -> LabelSet:
        return LabelSet.parse(self.labels)

    def __post_init__(self):
        if self.subset not in SUBSETS:
            raise UserError(f"subset {self.subset!r}: expected one of {SUBSETS}")
        if not 0 <= self.validation_share < 1:
            raise UserError(f"validation_share={self.validation_share}: expected within [0, 1)")
        super().__post_init__()

    def sources(self) -> tuple[Path, ...]:
        return Path(self.path) / _EXAMPLES, Path(self.path) / _PRODUCTS


class Esci(ExampleBuilder):
    """ESCI: E, S, C, I become 4, 3, 2, 1; ``kind`` is the locale.

    The official test rows are ``test``. The official training rows are divided by query into
    ``train`` and ``validation``. Rows follow the order of the product file.
    """

    builder_config: EsciConfig

    def rows(self) -> Iterator[Row | BadRow]:
        example_file, product_file = self.builder_config.sources()
        pairs, keys = _read_pairs(example_file, self.builder_config)
        matches = pc.index_in(keys, value_set=_read_keys(product_file), skip_nulls=True)
        product_index = _to_numpy(pc.fill_null(matches, -1))
        del keys, matches  # as large as everything that stays in memory
        order = np.argsort(product_index, kind="stable")
        for first, batch in _product_batches(product_file):
            bounds = [first, first + len(batch)]
            start, stop = np.searchsorted(product_index, bounds, sorter=order)
            pair_index = order[start:stop]
            products = batch.take(pa.array(product_index[pair_index] - first)).to_pylist()
            for i, product in zip(pair_index.tolist(), products, strict=True):
                yield pairs.row(i, product)
        for i in np.flatnonzero(product_index < 0).tolist():
            yield pairs.bad_row(i, "no such product")


class _Pairs:
    """The labeled pairs without product texts, with dictionary-encoded text columns."""

    def __init__(self, table: pa.Table, path: Path, validation_share: float):
        self._file, self._validation_share = str(path), validation_share
        self._line = _to_numpy(table["line"])
        self._id = table["example_id"].combine_chunks()
        names = ("query", "product_locale", "esci_label", "split")
        columns = {n: table[n].combine_chunks().dictionary_encode("encode") for n in names}
        self._values = {n: column.dictionary.to_pylist() for n, column in columns.items()}
        self._codes = {n: _to_numpy(column.indices) for n, column in columns.items()}

    def row(self, i: int, product: dict[str, str | None]) -> Row | BadRow:
        """Pair ``i`` as a row, with the texts of its product by column name."""
        values = {n: self._values[n][codes[i]] for n, codes in self._codes.items()}
        query, letter, split = values["query"] or "", values["esci_label"], values["split"]
        if letter not in ESCI_LABELS:
            return self.bad_row(i, f"unknown label: {letter!r}, expected E, S, C or I")
        if split not in ("train", "test"):
            return self.bad_row(i, f"unknown split: {split!r}, expected train or test")
        if split == "train" and query_hash(query) < self._validation_share:
            split = "validation"
        uid, steps = self._id[i].as_py(), implied_steps(ESCI_LABELS[letter])
        example = Example(
            uid="" if uid is None else str(uid),
            query=query,
            product={field: product[name] or "" for field, name in _FIELDS.items()},
            label=ESCI_LABELS[letter],
            steps=steps,
            kind=values["product_locale"] or "",
            annotations=tuple(steps),
        )
        return Row(split=split, example=example, file=self._file, line=int(self._line[i]))

    def bad_row(self, i: int, reason: str) -> BadRow:
        return BadRow(file=self._file, line=int(self._line[i]), reason=reason)


def _read_pairs(path: Path, config: EsciConfig) -> tuple[_Pairs, pa.Array]:
    """Reads the pairs that the config selects, and the keys that join them to their products."""
    with _explain_errors(path), open_table(path):
        file = pq.ParquetFile(path)
        _check_columns(file, path, _EXAMPLE_COLUMNS)
        table = file.read(columns=list(_EXAMPLE_COLUMNS))
        # Categories become text again, and the doubles of a column with gaps whole numbers.
        types = {"text": pa.large_string(), "integer": pa.int64()}
        fields = [pa.field(name, types[kind]) for name, kind in _EXAMPLE_COLUMNS.items()]
        table = table.cast(pa.schema(fields))
    table = table.append_column("line", pa.array(np.arange(1, len(table) + 1)))
    if config.locales:
        locales = set(pc.unique(table["product_locale"]).to_pylist())
        if missing := set(config.locales) - locales:
            known = sorted(filter(None, locales))
            raise UserError(f"{path}: no rows of locale {sorted(missing)}, only of {known}")
        wanted = pa.array(config.locales, table.schema.field("product_locale").type)
        table = table.filter(pc.is_in(table["product_locale"], value_set=wanted))
    if config.subset != "all":
        table = table.filter(pc.equal(table[f"{config.subset}_version"], 1))
    return _Pairs(table, path, config.validation_share), _join_keys(table)


def _read_keys(path: Path) -> pa.Array:
    with _explain_errors(path), open_table(path):
        file = pq.ParquetFile(path)
        _check_columns(file, path, _PRODUCT_COLUMNS)
        return _join_keys(file.read(columns=["product_locale", "product_id"]))


def _product_batches(path: Path) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yields the products in batches, each with the index of its first product."""
    first = 0
    with _explain_errors(path):
        # A buffer instead of whole column chunks, as a row group may hold a million products.
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        batches = file.iter_batches(_BATCH, columns=list(_FIELDS.values()), use_threads=False)
        for batch in batches:
            texts = [pc.cast(column, pa.large_string()) for column in batch.columns]
            yield first, pa.record_batch(texts, names=batch.schema.names)
            first += len(batch)


def _join_keys(table: pa.Table) -> pa.Array:
    locale, product = (table[n].cast(pa.large_string()) for n in ("product_locale", "product_id"))
    keys = pc.binary_join_element_wise(locale, product, pa.scalar("\t", pa.large_string()))
    return keys.combine_chunks()


def _to_numpy(array: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False) if isinstance(array, pa.Array) else array.to_numpy()


@contextlib.contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    """Turns read errors into a ``ValueError`` that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read as parquet ({error}): it may be cut short; download it again"
        ) from error


def _check_columns(file: pq.ParquetFile, path: Path, expected: dict[str, str]):
    types = {f.name: f.type for f in file.schema_arrow}
    for name, kind in types.items():
        if pa.types.is_dictionary(kind):  # a category of pandas
            types[name] = kind.value_type
    texts = (pa.string(), pa.large_string(), pa.string_view())
    type_checks = {
        "text": lambda kind: kind in texts,
        "integer": lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind),
    }
    wrong = [
        f"{name} ({types.get(name, 'missing')})"
        for name, kind in expected.items()
        if name not in types
        or not (type_checks[kind](types[name]) or pa.types.is_null(types[name]))
    ]
    if wrong:
        raise UserError(
            f"{path}: wrong columns {', '.join(wrong)}; expected "
            f"{', '.join(f'{name} ({kind})' for name, kind in expected.items())}; found "
            f"{', '.join(f'{name} ({t})' for name, t in types.items())}"
        )
