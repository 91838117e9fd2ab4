"""A pair's prediction as a line of JSON, and as a row of Parquet."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from she_jax.cot import Chain, CotSchema, LabelSet, ParsedStep
from she_jax.evaluation.judge import Judgment
from she_jax.types import Example

FORMATS = ("jsonl", "parquet")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where predictions go, and this run's share of them.

    Attributes:
      format: of the predictions, one of ``FORMATS``.
      blocks: folder of the blocks that are done; "" for one of the run's own.
      part, parts: judge each ``parts``-th block only, from ``part`` on, where several runs share a
        folder.
      systems: a TREC run file, whose systems the report compares; "" for none.

    Raises:
      ValueError: if a value is none of its set.
    """

    format: str = "jsonl"
    blocks: str = ""
    part: int = 0
    parts: int = 1
    systems: str = ""

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ValueError(f"predict.format={self.format!r}: expected one of {FORMATS}")
        if not 0 <= self.part < self.parts:
            raise ValueError(
                f"predict.part={self.part}: expected 0 to {self.parts - 1}, of predict.parts"
            )
        if self.parts > 1 and not self.blocks:
            raise ValueError(
                f"predict.parts={self.parts}: name the folder that the runs share, "
                "predict.blocks=DIR"
            )


def prediction(example: Example, judgment: Judgment, schema: CotSchema) -> dict[str, Any]:
    """A line of ``predictions.jsonl``.

    ``uid``; ``label``, null if none could be read; ``probabilities`` of the labels: the shares of
    the ``votes`` (how many could be read), or the label's own of a policy that gives it first, else
    null; ``confidence``,
    ``expected`` and ``review``, see ``Judgment``; ``well_formed``, ``steps`` (each with its name,
    text and verdict) of the chain that speaks for the label, and ``text``, all that the model
    wrote, where that is not a well-formed chain.
    """
    answer, labels = judgment.answer, schema.labels
    by_label = judgment.probabilities and dict(
        zip(labels.texts, judgment.probabilities, strict=True)
    )
    return {
        "uid": example.uid,
        "label": judgment.label,
        "probabilities": by_label,
        "votes": judgment.votes,
        "confidence": judgment.confidence,
        "expected": judgment.expected,
        "review": judgment.review,
        "well_formed": answer is not None and answer.chain.well_formed,
        "steps": [
            {"name": name, "text": step.text, "verdict": step.verdict}
            for name, step in zip(schema.names, answer.chain.steps, strict=True)
            if step is not None
        ]
        if answer
        else [],
        "text": answer.text if answer and not answer.chain.well_formed else None,
        "truncated": answer is not None and answer.truncated,
    }


def read_chain(line: Mapping[str, Any], schema: CotSchema) -> Chain:
    """The chain of a line of ``predictions.jsonl``, with the label that was decided on."""
    written = {step["name"]: (step["text"], step["verdict"]) for step in line["steps"]}
    steps: list[ParsedStep | None] = []
    for step in schema.steps:
        text, verdict = written.get(step.name, ("", None))
        valid = bool(verdict if step.verdicts else text)
        parsed = ParsedStep(text=text, verdict=verdict, valid=valid)
        steps.append(parsed if step.name in written else None)
    return Chain(
        steps=tuple(steps),
        line_steps=(),
        well_formed=line["well_formed"],
        label=line["label"],
        truncated=line["truncated"],
    )


def label_type(labels: LabelSet) -> pa.DataType:
    """The type of a label in Parquet."""
    if all(isinstance(value, int) for value in labels.values):
        return pa.int64()
    return pa.float64() if not any(isinstance(v, str) for v in labels.values) else pa.string()


def _schema(labels: LabelSet) -> pa.Schema:
    number, text = pa.float64(), pa.string()
    step = pa.struct([("name", text), ("text", text), ("verdict", text)])
    types = {
        "uid": text,
        "label": label_type(labels),
        "probabilities": pa.struct([(name, number) for name in labels.texts]),
        "votes": pa.int64(),
        "confidence": number,
        "expected": number,
        "review": pa.bool_(),
        "well_formed": pa.bool_(),
        "steps": pa.list_(step),
        "text": text,
        "truncated": pa.bool_(),
    }
    return pa.schema(list(types.items()))


def write_block(path: Path, lines: Sequence[Mapping[str, Any]], labels: LabelSet) -> None:
    """Writes predictions to a file, ``.jsonl`` or ``.parquet`` by its name."""
    if path.suffix == ".parquet":
        table = pa.Table.from_pylist([dict(line) for line in lines], _schema(labels))
        pq.write_table(table, path, compression="zstd")
        return
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def read_block(path: Path) -> list[dict[str, Any]]:
    """Inverts ``write_block``."""
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            return file.read().to_pylist()
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_predictions(path: Path) -> Iterator[dict[str, Any]]:
    """The predictions in a file, one after the other, of as many blocks as it has."""
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            for n in range(file.num_row_groups):
                yield from file.read_row_group(n).to_pylist()
        return
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def join_blocks(paths: Sequence[Path], target: Path, labels: LabelSet) -> None:
    """Writes the predictions of several files to one, in Parquet as a row group each."""
    if target.suffix == ".parquet":
        with pq.ParquetWriter(target, _schema(labels), compression="zstd") as writer:
            for path in paths:
                with pq.ParquetFile(path) as file:
                    writer.write_table(file.read())
        return
    with target.open("wb") as file:
        for path in paths:
            file.write(path.read_bytes())
