"""TRL's stepwise supervision format: ``prompt``, ``completions`` and ``labels``, one per step.

Before anyone has judged them the labels are null. ``uid``, ``steps``, ``truth``, ``annotator`` and
``at`` are columns of ours; without them a file is still read, a line being known by its prompt and
completions, and its annotator by the file's name.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from she_jax.annotation.tasks import Opinion, Task, make_opinion
from she_jax.cot import CotSchema
from she_jax.generate.prompts import instruction, product_text, query_text

_READ = {"true": True, "1": True, "false": False, "0": False}  # after text that stood for numbers


def stepwise_row(task: Task, schema: CotSchema) -> dict[str, Any]:
    """A line for someone to fill in: the steps that the policy wrote, with labels null."""
    steps = [step for step in task.chain if step.text or step.verdict is not None]
    return {
        "uid": task.uid,
        "prompt": stepwise_prompt(task, schema),
        "completions": [step.line for step in steps],
        "labels": [None] * len(steps),
        "steps": [step.name for step in steps],
        "truth": [None] * len(steps),
        "annotator": "",
        "at": "",
    }


def stepwise_prompt(task: Task, schema: CotSchema) -> str:
    """The task's description, the query and the product, as text."""
    pair = f"query:{query_text(task.example)}{product_text(task.example)}"
    return f"{instruction(schema)}\n\n{pair}\n\n"


def stepwise_opinions(
    row: Mapping[str, Any], tasks: Mapping[str, Task], schema: CotSchema, annotator: str
) -> Iterator[Opinion | ValueError]:
    """What a line states; a ValueError for each part that cannot be used. Null states nothing.

    Args:
      row: the line.
      tasks: by uid.
      schema: the steps.
      annotator: who, where the line does not say.
    """
    labels, lines = row.get("labels"), row.get("completions")
    if not isinstance(labels, Sequence) or not isinstance(lines, Sequence):
        yield ValueError("labels or completions is not a list")
        return
    task = tasks.get(str(row["uid"])) if row.get("uid") else _task_of(row, tasks, schema)
    if task is None:
        yield ValueError(f"uid {row.get('uid')!r} is not among the pairs of this folder")
        return
    names = row.get("steps") or [line.partition(":")[0] for line in lines]
    truth = row.get("truth") or [None] * len(labels)
    if not len(labels) == len(lines) == len(names) == len(truth):
        yield ValueError(f"{len(labels)} labels for {len(lines)} completions: expected one each")
        return
    steps = {step.name: step for step in schema.steps}
    who, at = row.get("annotator") or annotator, row.get("at")
    for name, label, value in zip(names, labels, truth, strict=True):
        if label is None and value is None:
            continue
        try:
            said = None if label is None else _READ[str(label).lower()]
            yield make_opinion(task, steps.get(name), who, at, value, said)
        except KeyError:
            yield ValueError(f"step {name!r}: label {label!r}, expected true, false or null")
        except ValueError as error:
            yield ValueError(f"step {name!r}: {error}")


def _task_of(row: Mapping[str, Any], tasks: Mapping[str, Task], schema: CotSchema) -> Task | None:
    shown = (row.get("prompt"), list(row["completions"]))
    for task in tasks.values():
        expected = stepwise_row(task, schema)
        if shown == (expected["prompt"], expected["completions"]):
            return task
    return None


def judged_row(task: Task, schema: CotSchema, correct: Mapping[str, bool]) -> dict[str, Any] | None:
    """A line to train on, with true or false for every step; None if a step is not decided.

    Args:
      task: the pair and its chain.
      schema: the steps.
      correct: by step, whether the step that was shown is right.
    """
    row = stepwise_row(task, schema)
    if not row["steps"] or not all(name in correct for name in row["steps"]):
        return None
    columns = {name: row[name] for name in ("uid", "prompt", "completions")}
    return columns | {"labels": [correct[name] for name in row["steps"]]}
