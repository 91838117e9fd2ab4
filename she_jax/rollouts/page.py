"""Human-readable output of a run: pages of rollouts, the before-after table and JSON files."""

import json
import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from rich.table import Table

from she_jax.cot import Chain, CotSchema
from she_jax.types import Example

LONGEST = 600  # characters of a text shown on a page
# Unicode categories of invisible characters: controls, formats (bidirectional, zero-width),
# surrogates, private, unassigned, line and paragraph separators.
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file atomically: after a kill, the file is the old one or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes a JSON file atomically. Arrays become lists; NaN and infinities become null."""
    write_text(path, json.dumps(_to_json(obj), indent=2, allow_nan=False) + "\n")


def write_samples(
    path: str | os.PathLike,
    *,
    step: int,
    schema: CotSchema,
    examples: Sequence[Example],
    texts: Sequence[str],
    chains: Sequence[Chain],
    rewards: Float[np.ndarray, "B S"],
    advantages: Float[np.ndarray, "B S"],
    step_mask: Bool[np.ndarray, "B S"],
    outcomes: Float[np.ndarray, "B"],
    remarks: Mapping[tuple[int, int], str] | None = None,
) -> None:
    """Writes groups of rollouts as a Markdown page, such as ``samples/step_000040.md``.

    Text from a model or a data set is in indented code blocks, one line each, with control,
    bidirectional and other invisible characters escaped, so that it cannot format the page.

    Args:
      path: the page.
      step: training step, for the heading.
      schema: the chain's S steps.
      examples: the N pairs shown.
      texts: the B = N * G completions, a group's rows contiguous.
      chains: the parsed completions.
      rewards: step rewards in [0, 1].
      advantages: the advantage of each step's tokens in the loss, from step and outcome rewards.
      step_mask: which steps have a reward; the others show a dash and the outcome's advantage.
      outcomes: outcome rewards in [0, 1].
      remarks: a process reward model's critique of a step, by row and step index, shown below it.

    Raises:
      ValueError: if the examples do not have equal numbers of rollouts.
    """
    if not examples or len(texts) % len(examples) or len(texts) != len(chains):
        raise ValueError(
            f"{len(texts)} texts and {len(chains)} chains for {len(examples)} examples: "
            "expected the same number of rollouts for each example"
        )
    group = len(texts) // len(examples)
    lines = [f"# Rollouts of step {step}", ""]
    for n, example in enumerate(examples):
        lines += [f"## Group {n + 1}", "", *_example_lines(example), ""]
        for g in range(group):
            b = n * group + g
            lines += [f"### Rollout {n + 1}.{g + 1}: outcome reward {outcomes[b]:.2f}", ""]
            lines.append("    reward  advantage  verdict      step")
            for k, name in enumerate(schema.names):
                parsed, has_reward = chains[b].steps[k], step_mask[b, k]
                reward = f"{rewards[b, k]:.2f}" if has_reward else "-"
                advantage = f"{advantages[b, k]:+.3f}" if has_reward or parsed else "-"
                verdict = (parsed.verdict or "-") if parsed else "missing"
                text = shown(f"{name}: {parsed.text if parsed else ''}")
                lines.append(f"    {reward:>6}  {advantage:>9}  {verdict:<11}  {text}".rstrip())
                if remark := (remarks or {}).get((b, k)):
                    lines.append(f"{'examiner:':>32}  {shown(remark)}")
            if not chains[b].well_formed:
                lines += ["", "    not well-formed; as written:"]
                lines += [f"    | {shown(line)}".rstrip() for line in texts[b].split("\n")[:40]]
            lines.append("")
    write_text(path, "\n".join(lines))


def before_after_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """A table of the metrics of ``she_jax.evaluation.metrics.score`` before and after training."""
    table = Table("", "before", "after", "change")
    for column in table.columns[1:]:
        column.justify = "right"
    names = {"macro_f1": "macro F1", "accuracy": "accuracy", "good_f1": "good F1"}
    rows = [(title, before.get(key), after.get(key)) for key, title in names.items()]
    for key, title in (("f1", "F1 of class"), ("step_accuracy", "step")):
        old, new = before.get(key, {}), after.get(key, {})
        rows += [(f"{title} {k}", old.get(k), new.get(k)) for k in dict.fromkeys([*old, *new])]
    if "longtail" in before:
        longtail = [metrics.get("longtail", {}).get("macro_f1") for metrics in (before, after)]
        rows.append(("macro F1, long tail", *longtail))
    if before.get("wrong_reason") is not None:
        rows.append(("wrong reason", before["wrong_reason"], after.get("wrong_reason")))
    rows.append(("parse rate", before.get("parse_rate"), after.get("parse_rate")))
    sampled = [key for key in before if key.startswith("pass_at_")]
    rows += [(key.replace("_at_", "@"), before[key], after.get(key)) for key in sampled]
    for title, old, new in rows:
        change = f"{new - old:+.3f}" if old is not None and new is not None else "-"
        table.add_row(title, _format(old), _format(new), change)
    table.add_row("pairs", str(before.get("n", "-")), str(after.get("n", "-")), "")
    return table


def _example_lines(example: Example) -> list[str]:
    steps = [f"{name}: {truth}" for name, truth in (example.steps or {}).items()]
    label = "unknown" if example.label is None else str(example.label)
    return [
        f"    uid      {shown(example.uid)}",
        f"    query    {shown(example.query)}",
        *(f"    product  {shown(f'{k}: {v}')}" for k, v in example.product.items()),
        f"    gold     label: {label}",
        *(f"    gold     {shown(line)}" for line in steps),
    ]


def shown(text: str, longest: int = LONGEST) -> str:
    """The text on one line, with invisible characters escaped, cut to ``longest`` characters."""
    start = text[:longest]
    line = "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in UNSEEN else c
        for c in start
    )
    return line if len(start) == len(text) else f"{line} ... ({len(text)} characters)"


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _to_json(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {str(key): _to_json(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_to_json(value) for value in obj]
    if hasattr(obj, "tolist"):
        return _to_json(obj.tolist())
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj
