"""The table of metrics before and after training."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from she_jax.training.logging import cell


def before_after_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """A table of the metrics of ``she_jax.evaluation.metrics.score`` before and after training."""
    head, *rows = before_after_rows(before, after)
    table = Table(*head)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, *figures in rows:
        table.add_row(cell(name), *figures)
    return table


def before_after_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[list[str]]:
    """The rows of that table as text, the head first; a row of which nothing is known is left out.

    Where there is a floor, what a regression on word overlap has on the same pairs, it is a column.
    """
    floor = after.get("floor")
    names = {"macro_f1": "macro F1", "accuracy": "accuracy", "good_f1": "good F1"}
    names |= {"outcome": "outcome reward"} if "outcome" in before else {}
    rows = [(title, before.get(key), after.get(key)) for key, title in names.items()]
    for key, title in (("f1", "F1 of class"), ("step_accuracy", "step")):
        old, new = before.get(key, {}), after.get(key, {})
        rows += [(f"{title} {k}", old.get(k), new.get(k)) for k in dict.fromkeys([*old, *new])]
    if "longtail" in before:
        longtail = [metrics.get("longtail", {}).get("macro_f1") for metrics in (before, after)]
        rows.append(("macro F1, long tail", *longtail))
    if before.get("right_for_wrong_reason") is not None:
        key = "right_for_wrong_reason"
        rows.append(("right for wrong reason", before[key], after.get(key)))
    rows.append(("parse rate", before.get("parse_rate"), after.get("parse_rate")))
    sampled = [key for key in before if key.startswith("pass_at_")]
    rows += [(key.replace("_at_", "@"), before[key], after.get(key)) for key in sampled]
    lines = [["", *(["floor"] if floor else []), "before", "after", "change"]]
    for title, old, new in rows:
        if old is None and new is None:
            continue
        change = f"{new - old:+.3f}" if old is not None and new is not None else "-"
        key = next((key for key, name in names.items() if name == title), "")
        first = [_format(floor.get(key))] if floor else []
        lines.append([title, *first, _format(old), _format(new), change])
    counts = str(before.get("n", "-")), str(after.get("n", "-"))
    return [*lines, ["pairs", *([""] if floor else []), *counts, ""]]


def below_floor(summary: Mapping[str, Any]) -> str:
    """A sentence if a judge is worse than a regression on word overlap; else "".

    Args:
      summary: the metrics of its run, with the floor's.
    """
    after, floor = summary.get("macro_f1"), summary.get("floor", {}).get("macro_f1")
    if after is None or floor is None or after >= floor:
        return ""
    return (
        f"below the floor: macro F1 {after:.3f}, where a regression on word overlap has "
        f"{floor:.3f} on the same pairs. Its labels and reasons are not to be relied on"
    )


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
