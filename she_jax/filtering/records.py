"""Records of a policy's rollouts on each prompt, in parquet, so that filters can be re-run.

A shard is one parquet file of ``PromptRecord``s. What a filter selects by is in separate small
columns, so that a survey of a million prompts does not read their texts.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float16

from she_jax.types import UserError

_FORMAT = b"she_jax.records"
_VERSION = b"2"
_STEPS = b"she_jax.steps"
_SCALARS = {
    "row": pa.int64(),
    "uid": pa.string(),
    "query": pa.string(),
    "title": pa.string(),
    "label": pa.string(),
    "kind": pa.string(),
    "confidence": pa.float64(),
}
_LISTS = {
    "right": pa.list_(pa.bool_()),
    "paths": pa.list_(pa.string()),
    "step_rates": pa.list_(pa.float64()),
    "texts": pa.list_(pa.string()),
}


@dataclass(frozen=True, kw_only=True)
class PromptRecord:
    """A query-product pair and a policy's rollouts on it.

    Attributes:
      row: the pair's row in the filtered split.
      uid: the pair's uid.
      query: the query.
      title: the product's title.
      label: relevance class, as text; None if unknown.
      kind: kind of query; empty if unknown.
      confidence: the share of the rollouts that give the commonest label, in [0, 1]; None without
        rollouts.
      right: for each rollout, whether its label is correct and it is not truncated. Empty without
        rollouts.
      paths: for each rollout, its step verdicts joined by ``/``, such as ``match/unstated/3``, with
        ``-`` for a missing step.
      step_rates: for each step of the schema, the share of rollouts with full step reward; None if
        unknown.
      texts: the text of each rollout.
      embedding: the mean of the policy's hidden states for the pair.
    """

    row: int
    uid: str
    query: str
    title: str
    label: str | None
    kind: str
    confidence: float | None
    right: tuple[bool, ...]
    paths: tuple[str, ...]
    step_rates: tuple[float | None, ...]
    texts: tuple[str, ...]
    embedding: Float16[np.ndarray, "D"]

    @property
    def pass_rate(self) -> float | None:
        """Share of correct rollouts; None without rollouts."""
        return sum(self.right) / len(self.right) if self.right else None


def distinct_n(texts: Iterable[str], n: int = 2) -> float:
    """Distinct-n (Li et al., arXiv 1510.03055), a measure of the diversity of texts.

    The number of distinct n-grams of words in all texts, divided by the number of n-grams. Words
    are separated by blanks. No n-gram spans two texts.

    Returns:
      A share in (0, 1]; NaN if no text has n words.
    """
    distinct: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        words = text.split()
        distinct.update(zip(*(islice(words, k, None) for k in range(n)), strict=False))
        total += max(0, len(words) - n + 1)
    return len(distinct) / total if total else math.nan


def write_records(path: Path, records: Sequence[PromptRecord], step_names: Sequence[str]) -> None:
    """Writes a shard atomically.

    In addition to the records' fields, it has a column ``distinct``: ``distinct_n`` of the texts.

    Args:
      path: the parquet file; an existing one is replaced.
      records: at least one.
      step_names: the names of the schema's steps, in the order of ``step_rates``.

    Raises:
      UserError: if there are no records, or a record is inconsistent; the message names its row.
    """
    if not records:
        raise UserError(f"{path}: no records to write; expected at least one")
    width = records[0].embedding.shape
    for record in records:
        if error := _record_error(record, len(step_names), width):
            raise UserError(f"{path}, row {record.row}: {error}")
    columns = {
        name: pa.array([getattr(record, name) for record in records], dtype)
        for name, dtype in (_SCALARS | _LISTS).items()
    }
    columns["distinct"] = pa.array([distinct_n(record.texts) for record in records], pa.float32())
    # As bytes, because a nested column of numbers would take several times as long to read.
    raw = np.stack([record.embedding for record in records]).astype("<f2").tobytes()
    dtype = pa.binary(2 * width[0])
    columns["embedding"] = pa.Array.from_buffers(dtype, len(records), [None, pa.py_buffer(raw)])
    steps = json.dumps(list(step_names))
    table = pa.table(columns).replace_schema_metadata({_FORMAT: _VERSION, _STEPS: steps})
    partial = path.with_name(path.name + ".part")
    pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
    os.replace(partial, path)


def _record_error(record: PromptRecord, steps: int, width: tuple[int, ...]) -> str:
    rollouts = len(record.right), len(record.paths), len(record.texts)
    embedding = record.embedding
    if len(set(rollouts)) > 1:
        return "{} outcomes, {} paths and {} texts; expected one of each a rollout".format(
            *rollouts
        )
    if len(record.step_rates) != steps:
        return f"{len(record.step_rates)} step rates for {steps} steps"
    if embedding.dtype != np.float16 or embedding.shape != width or len(width) != 1 or not width[0]:
        return f"embedding {embedding.dtype}{list(embedding.shape)}; expected float16{list(width)}"
    if not np.isfinite(embedding).all():
        return "the embedding is not finite; float16 ends at 65,504"
    return ""


def read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    """Reads only the given columns of a shard.

    Raises:
      FileNotFoundError: if the file does not exist.
      UserError: if the file is damaged, or is not a shard of this version.
    """
    _metadata(path)
    try:
        # Not read_table, which would turn a folder name such as "stage=1" into a column.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(columns=list(names))
    except (pa.ArrowException, OSError) as error:
        raise _read_error(path, error) from None


def read_step_names(path: Path) -> tuple[str, ...]:
    """Reads the names of a shard's steps, in the order of ``PromptRecord.step_rates``.

    Raises:
      The errors of ``read_columns``.
    """
    return tuple(json.loads(_metadata(path)[_STEPS]))


def _metadata(path: Path) -> dict[bytes, bytes]:
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise _read_error(path, error) from None
    if metadata.get(_FORMAT) != _VERSION:
        version = metadata.get(_FORMAT, b"none").decode()
        raise UserError(
            f"{path}: parquet, but records of version {version}; expected version "
            f"{_VERSION.decode()}. Use a separate folder for the filter, or record again"
        )
    return metadata


def _read_error(path: Path, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno is not None:
        return error  # from the system, not from parquet: a missing file, no permission
    reason = str(error).splitlines()[0]
    return ValueError(
        f"{path}: not a whole parquet file of records ({reason}). Delete it: the next run records "
        "these prompts again"
    )


def embeddings(table: pa.Table) -> Float16[np.ndarray, "N D"]:
    """The column ``embedding`` of a table, as an array."""
    column = table.column("embedding").combine_chunks()
    width = column.type.byte_width // 2
    values = np.frombuffer(column.buffers()[1], "<f2")
    return values[column.offset * width :][: len(column) * width].reshape(len(column), width)


def read_records(path: Path) -> list[PromptRecord]:
    """Reads all records of a shard.

    Raises:
      The errors of ``read_columns``.
    """
    table = read_columns(path, [*_SCALARS, *_LISTS, "embedding"])
    rows = embeddings(table).astype(np.float16)
    columns = [table.column(name).to_pylist() for name in _SCALARS]
    columns += [map(tuple, table.column(name).to_pylist()) for name in _LISTS]
    names = [*_SCALARS, *_LISTS]
    return [
        PromptRecord(**dict(zip(names, values, strict=True)), embedding=embedding)
        for *values, embedding in zip(*columns, rows, strict=True)
    ]
