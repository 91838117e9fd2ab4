"""What a run leaves for people to read: rollouts, the table of before and after, JSON files."""

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

LONGEST = 600  # characters of one text that a page shows
# Unicode categories of what cannot be seen: controls, formats (bidirectional, zero-width),
# surrogates, private, unassigned, line and paragraph separators.
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file whole or not at all: a kill leaves the old one or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes JSON whole or not at all. Arrays become lists; NaN and infinities become null."""
    write_text(path, json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n")


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

    Whatever a model or a data set wrote stands in indented code blocks, on one line each and with
    control, bidirectional and other unseen characters as escapes, so it cannot act on the page.

    Args:
      path: the page.
      step: training step, for the heading.
      schema: the steps, S of them.
      examples: the N pairs shown.
      texts: the B = N * G completions as written, a group's rows contiguous.
      chains: the same, parsed.
      rewards: step rewards in [0, 1].
      advantages: of each step's tokens, as the loss sees them: of its reward and of the outcome.
      step_mask: which steps have a reward; the others show a dash, and the outcome's advantage.
      outcomes: outcome rewards in [0, 1].
      remarks: what an examiner says of a step, by row and step index; shown below it.

    Raises:
      ValueError: if the rollouts do not divide among the examples.
    """
    if not examples or len(texts) % len(examples) or len(texts) != len(chains):
        raise ValueError(
            f"{len(texts)} texts and {len(chains)} chains for {len(examples)} examples: "
            "expected the same number of rollouts for each example"
        )
    group = len(texts) // len(examples)
    lines = [f"# Rollouts of step {step}", ""]
    for n, example in enumerate(examples):
        lines += [f"## Group {n + 1}", "", *_pair(example), ""]
        for g in range(group):
            b = n * group + g
            lines += [f"### Rollout {n + 1}.{g + 1}: outcome reward {outcomes[b]:.2f}", ""]
            lines.append("    reward  advantage  verdict      step")
            for k, name in enumerate(schema.names):
                parsed, known = chains[b].steps[k], step_mask[b, k]
                reward = f"{rewards[b, k]:.2f}" if known else "-"
                advantage = f"{advantages[b, k]:+.3f}" if known or parsed else "-"
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
    """The figures of ``she_jax.train.evaluate.score``, before and after training, side by side."""
    table = Table("", "before", "after", "change")
    for column in table.columns[1:]:
        column.justify = "right"
    names = {"macro_f1": "macro F1", "accuracy": "accuracy", "good_f1": "good F1"}
    rows = [(title, before.get(key), after.get(key)) for key, title in names.items()]
    for key, title in (("f1", "F1 of class"), ("step_accuracy", "step")):
        first, second = before.get(key, {}), after.get(key, {})
        rows += [
            (f"{title} {k}", first.get(k), second.get(k)) for k in dict.fromkeys([*first, *second])
        ]
    if "longtail" in before:
        tails = [one.get("longtail", {}).get("macro_f1") for one in (before, after)]
        rows.append(("macro F1, long tail", *tails))
    if before.get("wrong_reason") is not None:
        rows.append(("wrong reason", before["wrong_reason"], after.get("wrong_reason")))
    rows.append(("parse rate", before.get("parse_rate"), after.get("parse_rate")))
    sampled = [key for key in before if key.startswith("pass_at_")]
    rows += [(key.replace("_at_", "@"), before[key], after.get(key)) for key in sampled]
    for title, old, new in rows:
        change = f"{new - old:+.3f}" if old is not None and new is not None else "-"
        table.add_row(title, _figure(old), _figure(new), change)
    table.add_row("pairs", str(before.get("n", "-")), str(after.get("n", "-")), "")
    return table


def _pair(example: Example) -> list[str]:
    gold = [f"{name}: {verdict}" for name, verdict in (example.steps or {}).items()]
    label = "unknown" if example.label is None else str(example.label)
    return [
        f"    uid      {shown(example.uid)}",
        f"    query    {shown(example.query)}",
        *(f"    product  {shown(f'{k}: {v}')}" for k, v in example.product.items()),
        f"    gold     label: {label}",
        *(f"    gold     {shown(line)}" for line in gold),
    ]


def shown(text: str, longest: int = LONGEST) -> str:
    """One line, what cannot be seen as escapes, and cut where it is too long to read."""
    cut = text[:longest]
    line = "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in UNSEEN else c for c in cut
    )
    return line if len(cut) == len(text) else f"{line} ... ({len(text)} characters)"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _plain(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_plain(value) for value in obj]
    if hasattr(obj, "tolist"):
        return _plain(obj.tolist())
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj
