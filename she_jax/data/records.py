"""What a policy did with each prompt, kept in parquet, so that filtering anew needs no rollouts.

A shard is one parquet file of ``PromptRecord``s. Whatever a filter sorts by stands in small
columns of its own, so that a survey of a million prompts never reads their texts.
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

_FORMAT = b"she_jax.records"
_VERSION = b"1"
_STEPS = b"she_jax.steps"
_SCALARS = {
    "row": pa.int64(),
    "uid": pa.string(),
    "query": pa.string(),
    "title": pa.string(),
    "label": pa.int8(),
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
    """A pair, and what a policy did with it.

    Attributes:
      row: its row in the split that was filtered.
      uid: the pair's own name.
      query: what the shopper typed.
      title: the product's title.
      label: relevance class 1 to 4, or None where nobody judged the pair.
      kind: kind of query; empty where unknown.
      confidence: the largest class probability at the label of the policy's greedy chain, in
        [0, 1]; None where that chain has no label.
      right: for each rollout whether the verifier took it: label right, not cut short. Empty where
        no rollouts were made.
      paths: for each rollout its step verdicts with ``/`` between them, such as
        ``match/unstated/3``, and ``-`` for a missing step.
      step_rates: for each step of the schema the share of rollouts with full marks; None where
        that is not known.
      texts: for each rollout what it says.
      embedding: where the policy places the pair: the mean of its hidden states.
    """

    row: int
    uid: str
    query: str
    title: str
    label: int | None
    kind: str
    confidence: float | None
    right: tuple[bool, ...]
    paths: tuple[str, ...]
    step_rates: tuple[float | None, ...]
    texts: tuple[str, ...]
    embedding: Float16[np.ndarray, "D"]

    @property
    def pass_rate(self) -> float | None:
        """Share of right rollouts; None without rollouts."""
        return sum(self.right) / len(self.right) if self.right else None


def distinct_n(texts: Iterable[str], n: int = 2) -> float:
    """Distinct-n (Li et al., arXiv 1510.03055): how little texts repeat each other.

    The number of different n-grams of words in all the texts, divided by the number of n-grams. A
    word is what stands between blanks; no n-gram reaches from one text into the next.

    Returns:
      A share in (0, 1]; NaN where no text has n words.
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        words = text.split()
        seen.update(zip(*(islice(words, k, None) for k in range(n)), strict=False))
        total += max(0, len(words) - n + 1)
    return len(seen) / total if total else math.nan


def write_records(path: Path, records: Sequence[PromptRecord], step_names: Sequence[str]) -> None:
    """Writes a shard, whole or not at all.

    Beside the records' own fields it has a column ``distinct``, ``distinct_n`` of the texts.

    Args:
      path: of the parquet file; what stood there is replaced.
      records: at least one.
      step_names: the names of the schema's steps, one for each of ``step_rates``.

    Raises:
      ValueError: if there are no records, or one of them does not hold together; names its row.
    """
    if not records:
        raise ValueError(f"{path}: no records to write; expected at least one")
    width = records[0].embedding.shape
    for record in records:
        if fault := _fault(record, len(step_names), width):
            raise ValueError(f"{path}, row {record.row}: {fault}")
    columns = {
        name: pa.array([getattr(record, name) for record in records], kind)
        for name, kind in (_SCALARS | _LISTS).items()
    }
    columns["distinct"] = pa.array([distinct_n(record.texts) for record in records], pa.float32())
    # As bytes: a nested column of so many numbers would take several times as long to read.
    raw = np.stack([record.embedding for record in records]).astype("<f2").tobytes()
    kind = pa.binary(2 * width[0])
    columns["embedding"] = pa.Array.from_buffers(kind, len(records), [None, pa.py_buffer(raw)])
    steps = json.dumps(list(step_names))
    table = pa.table(columns).replace_schema_metadata({_FORMAT: _VERSION, _STEPS: steps})
    part = path.with_name(path.name + ".part")
    pq.write_table(table, part, compression="zstd", write_page_checksum=True)
    os.replace(part, path)


def _fault(record: PromptRecord, steps: int, width: tuple[int, ...]) -> str:
    rollouts = len(record.right), len(record.paths), len(record.texts)
    embedding = record.embedding
    if len(set(rollouts)) > 1:
        return "{} outcomes, {} paths and {} texts; expected one of each a rollout".format(
            *rollouts
        )
    if len(record.step_rates) != steps:
        return f"{len(record.step_rates)} step rates for {steps} steps"
    if record.label not in (None, 1, 2, 3, 4):
        return f"label {record.label!r}; expected 1 to 4, or None"
    if embedding.dtype != np.float16 or embedding.shape != width or len(width) != 1 or not width[0]:
        return f"embedding {embedding.dtype}{list(embedding.shape)}; expected float16{list(width)}"
    if not np.isfinite(embedding).all():
        return "the embedding is not finite; float16 ends at 65,504"
    return ""


def read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    """Reads some columns of a shard, and nothing else of it.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged, or is not a shard of this version.
    """
    _metadata(path)
    try:
        # Not read_table: a folder's name such as "stage=1" would become a column.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(columns=list(names))
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def read_step_names(path: Path) -> tuple[str, ...]:
    """The names of a shard's steps, in the order of ``PromptRecord.step_rates``.

    Raises:
      As ``read_columns`` does.
    """
    return tuple(json.loads(_metadata(path)[_STEPS]))


def _metadata(path: Path) -> dict[bytes, bytes]:
    try:
        found = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None
    if found.get(_FORMAT) != _VERSION:
        version = found.get(_FORMAT, b"none").decode()
        raise ValueError(
            f"{path}: parquet, but records of version {version}; expected version "
            f"{_VERSION.decode()}. Give the filter a folder of its own, or record anew"
        )
    return found


def _damaged(path: Path, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno is not None:
        return error  # the system's word, not parquet's: no such file, no right to read it
    what = str(error).splitlines()[0]
    return ValueError(
        f"{path}: not a whole parquet file of records ({what}). Delete it: the next run records "
        "these prompts anew"
    )


def embeddings(table: pa.Table) -> Float16[np.ndarray, "N D"]:
    """The column ``embedding`` of a table, as an array."""
    column = table.column("embedding").combine_chunks()
    width = column.type.byte_width // 2
    values = np.frombuffer(column.buffers()[1], "<f2")
    return values[column.offset * width :][: len(column) * width].reshape(len(column), width)


def read_records(path: Path) -> list[PromptRecord]:
    """Reads a shard back, every column of it.

    Raises:
      As ``read_columns`` does.
    """
    table = read_columns(path, [*_SCALARS, *_LISTS, "embedding"])
    places = embeddings(table).astype(np.float16)
    columns = [table.column(name).to_pylist() for name in _SCALARS]
    columns += [map(tuple, table.column(name).to_pylist()) for name in _LISTS]
    names = [*_SCALARS, *_LISTS]
    return [
        PromptRecord(**dict(zip(names, values, strict=True)), embedding=place)
        for *values, place in zip(*columns, places, strict=True)
    ]
