"""Pages of rollouts to read: every step with its text, verdict, reward and advantage."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from she_jax.rollouts.batch import RolloutBatch
from she_jax.rollouts.records import PageParts, rollout_records
from she_jax.training.files import printable, write_text


def write_rollouts(
    path: str | os.PathLike, step: int, rollouts: RolloutBatch, parts: PageParts, groups: int = 2
) -> None:
    """Writes the first groups of a batch as a Markdown page, such as ``samples/step_000040.md``.

    Text from a model or a data set is in indented code blocks, one line each, with control,
    bidirectional and other invisible characters escaped, so that it cannot format the page. The
    same as values, token by token, is in ``step_000040.json`` beside it, for ``report.html``.

    Args:
      path: the page.
      step: training step, for the heading.
      rollouts: the batch. A step without a reward shows a dash, and the outcome's advantage.
      parts: of the run. A process reward model's critique is shown below each step.
      groups: how many groups.
    """
    record = rollout_records(step, rollouts, parts, groups)
    write_text(Path(path).with_suffix(".json"), json.dumps(record, allow_nan=False) + "\n")
    write_text(path, _markdown(record))


def _markdown(record: Mapping[str, Any]) -> str:
    lines = [f"# Rollouts of step {record['step']}", ""]
    for n, group in enumerate(record["groups"]):
        lines += [f"## Group {n + 1}", "", *_example_lines(group), ""]
        for g, rollout in enumerate(group["rollouts"]):
            lines += _rollout_lines(f"{n + 1}.{g + 1}", rollout)
    return "\n".join(lines)


def _rollout_lines(title: str, rollout: Mapping[str, Any]) -> list[str]:
    lines = [f"### Rollout {title}: outcome reward {rollout['outcome']:.2f}", ""]
    lines.append("    reward  advantage  verdict      step")
    for step in rollout["steps"]:
        reward = "-" if step["reward"] is None else f"{step['reward']:.2f}"
        advantage = "-" if step["advantage"] is None else f"{step['advantage']:+.3f}"
        verdict = (step["verdict"] or "-") if step["written"] else "missing"
        text = printable(f"{step['name']}: {step['text']}")
        lines.append(f"    {reward:>6}  {advantage:>9}  {verdict:<11}  {text}".rstrip())
        if step["critique"]:
            lines.append(f"{'reward model:':>32}  {printable(step['critique'])}")
    if not rollout["well_formed"]:
        lines += ["", "    not well-formed; as written:"]
        written = rollout["text"].split("\n")[:40]
        lines += [f"    | {printable(line)}".rstrip() for line in written]
    return [*lines, ""]


def _example_lines(group: Mapping[str, Any]) -> list[str]:
    label = "unknown" if group["label"] is None else str(group["label"])
    return [
        f"    uid      {printable(group['uid'])}",
        f"    query    {printable(group['query'])}",
        *(f"    product  {printable(f'{k}: {v}')}" for k, v in group["product"].items()),
        f"    gold     label: {label}",
        *(f"    gold     {printable(f'{k}: {v}')}" for k, v in group["truth"].items()),
    ]
