"""Reads what annotators send back: our page's JSONL, Label Studio's export, TRL's format."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from she_jax.annotation.label_studio import label_studio_opinions
from she_jax.annotation.stepwise import stepwise_opinions
from she_jax.annotation.tasks import Opinion, Task, make_opinion
from she_jax.cot import CotSchema
from she_jax.data.readers.records import raw_objects
from she_jax.types import BadRow


def read_opinions(
    paths: Sequence[Path], tasks: Mapping[str, Task], schema: CotSchema
) -> tuple[list[Opinion], list[BadRow]]:
    """The opinions in some files, in their order, and what cannot be used, with file and line.

    Args:
      paths: JSON or JSONL files, also ``.gz``; each row is known by its keys.
      tasks: the pairs that were given out, by uid.
      schema: the steps.

    Raises:
      UserError: if a file is empty or no text.
    """
    opinions: list[Opinion] = []
    bad: list[BadRow] = []
    for path in paths:
        annotator = path.name.partition(".")[0]
        for line, row, _ in raw_objects(path):
            for part in _row_opinions(row, tasks, schema, annotator):
                if isinstance(part, Opinion):
                    opinions.append(part)
                else:
                    bad.append(BadRow(file=str(path), line=line, reason=str(part)))
    return opinions, bad


def _row_opinions(
    row: Any, tasks: Mapping[str, Task], schema: CotSchema, annotator: str
) -> Iterator[Opinion | ValueError]:
    if isinstance(row, ValueError):
        yield row
    elif not isinstance(row, Mapping):
        yield ValueError(f"not an object: {str(row)[:60]}")
    elif "completions" in row:
        yield from stepwise_opinions(row, tasks, schema, annotator)
    elif "data" in row or "annotations" in row:
        yield from label_studio_opinions(row, tasks, schema)
    elif "step" in row and "uid" in row:
        yield _page_opinion(row, tasks, schema)
    else:
        yield ValueError(
            f"keys {', '.join(map(str, row))[:80]}: expected a line that the page saved, a task of "
            "Label Studio's JSON export, or a line with prompt, completions and labels"
        )


def _page_opinion(
    row: Mapping[str, Any], tasks: Mapping[str, Task], schema: CotSchema
) -> Opinion | ValueError:
    steps = {step.name: step for step in schema.steps}
    if (task := tasks.get(str(row["uid"]))) is None:
        return ValueError(f"uid {row['uid']!r} is not among the pairs of this folder")
    who, at, value = row.get("annotator"), row.get("at"), row.get("value")
    try:
        step, withdrawn = steps.get(row["step"]), row.get("withdrawn") is True
        return make_opinion(task, step, who, at, value, row.get("correct"), withdrawn)
    except ValueError as error:
        return ValueError(f"step {row['step']!r}: {error}")
