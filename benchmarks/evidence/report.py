"""Writes the results of the study for people: ``tables.md``, beside ``evidence.json``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.plan import Config
from benchmarks.evidence.summarize import (
    MEASURES,
    PairedComparison,
    by_seed,
    collect,
    comparisons,
    plot_leads,
)
from she_jax.training.files import write_json, write_text

MOST_COLUMNS = 6  # of values in one table
SPLITS = {"test": "test", "longtail": "long tail"}
NOTES = """\
A figure is the mean over seeds ± the standard deviation over seeds (n - 1; "-" for one seed).
Seeds: those that are done, of those that are planned. Rate: the learning rate, chosen on the
validation split of the first seed, or another arm's. Wrong reason: the share of pairs whose label
is right although a step's verdict is not. Step accuracy: the mean over the steps. Entropy: nats a
token, the mean of the last ten updates; "-" for an arm that samples nothing while it learns, and of
several stages it is the last one's. Cost: of the updates of one run and what they learn from;
seconds are of the updates and of all sampling, scoring and filtering for them. The cold start,
reward models and the choice of a rate come on top. The process reward model learned from the
annotated steps of the first seed's pairs."""
PAIRED = """\
Over the seeds that both have: the mean difference, its 95% interval (Student's t over seeds) and
the p value of the paired t test, not corrected for the number of comparisons. One seed has no
interval."""


def write_report(config: Config, workdir: Path) -> dict[str, Any]:
    """Writes ``evidence.json`` and ``tables.md``; returns what ``evidence.json`` holds."""
    results = collect(config, workdir)
    results["paired"] = {
        f"{ours} less {arm}": {measure: gap._asdict() for measure, gap in measured.items()}
        for ours, others in comparisons(results).items()
        for arm, measured in others.items()
    }
    write_json(workdir / "evidence.json", results)
    write_text(workdir / "tables.md", render_tables(results))
    return results


# -------------------------------------------------------------------------- tables


def render_tables(results: Mapping[str, Any]) -> str:
    """All results as Markdown, a section for each ``table`` that the arms name.

    Args:
      results: what ``collect`` returns, or ``evidence.json``.
    """
    arms = results["arms"]
    started = {name: arm for name, arm in arms.items() if arm["seeds"]}
    parts = ["# Evidence", NOTES]
    for table in dict.fromkeys(arm["table"] for arm in started.values()):
        rows = {name: arm for name, arm in started.items() if arm["table"] == table}
        parts += [f"## {table.capitalize()}", *_section(rows)]
    parts += _comparisons(results)
    if rates := _rates(started):
        parts += ["## Learning rates", "Best macro F1 on the validation split, first seed.", rates]
    if absent := [line for arm in arms.values() for line in _absent(arm)]:
        parts += ["## Not there yet", "\n".join(f"- {line}" for line in absent)]
    if results["bad"]:
        bad = (f"- {name}: {' '.join(reason.split())}" for name, reason in results["bad"].items())
        parts += ["## Not to be read", "\n".join(bad)]
    return "\n\n".join(parts) + "\n"


def _absent(arm: Mapping[str, Any]) -> list[str]:
    """What is still to be run of an arm."""
    title, count, planned = arm["title"], len(arm["seeds"]), arm["planned"]
    absent = [f"{title}: {planned - count} of {planned} seeds"] if count < planned else []
    if count and len(arm["tried"]) < arm["rates"]:
        absent.append(f"{title}: its rate is chosen among {len(arm['tried'])} of {arm['rates']}")
    return absent


def _section(arms: Mapping[str, dict[str, Any]]) -> list[str]:
    """The tables of some arms, each with few enough columns to be read."""

    def both(title: str, name: str) -> dict[str, tuple[str, ...]]:
        return {f"{title}, {words}": (split, name) for split, words in SPLITS.items()}

    parts = [
        "### Labels",
        _seeds_and_rates(arms),
        *_value_tables(
            arms,
            both("macro F1", "macro_f1")
            | both("accuracy", "accuracy")
            | both("good F1", "good_f1"),
        ),
        "### Reasoning",
        *_value_tables(
            arms,
            both("step accuracy", "steps")
            | both("wrong reason", "right_for_wrong_reason")
            | both("parse rate", "parse_rate"),
        ),
    ]
    for split, words in SPLITS.items():
        classes = {f"class {n}": (split, "f1", str(n)) for n in range(1, 5)}
        parts += [f"### F1 by class, {words}", *_value_tables(arms, classes)]
    for split, words in SPLITS.items():
        runs = [run for arm in arms.values() for run in arm["seeds"].values() if run[split]]
        names = dict.fromkeys(name for run in runs for name in run[split]["step_accuracy"])
        steps = {name: (split, "step_accuracy", name) for name in names}
        parts += [f"### Accuracy by step, {words}", *_value_tables(arms, steps)]
    cost = {
        "entropy at the end": ("entropy",),
        "sampled tokens": ("sampled_tokens",),
        "trained tokens": ("trained_tokens",),
        "seconds": ("seconds",),
    }
    return [*parts, "### Cost", *_value_tables(arms, cost)]


def _seeds_and_rates(arms: Mapping[str, dict[str, Any]]) -> str:
    rows = [
        (arm["title"], f"{len(arm['seeds'])} of {arm['planned']}", _format_rate(arm["rate"]))
        for arm in arms.values()
    ]
    return markdown_table(("", "seeds", "rate"), rows)


def _value_tables(
    arms: Mapping[str, dict[str, Any]], columns: Mapping[str, Sequence[str]]
) -> list[str]:
    """Tables with a row an arm and a column a value; columns without any value are left out.

    Args:
      arms: the rows, by name.
      columns: heading to the path of the value in a run.
    """
    cells = {
        title: [mean_and_deviation(list(by_seed(arm, *path).values())) for arm in arms.values()]
        for title, path in columns.items()
    }
    kept = [title for title, column in cells.items() if any(cell != "-" for cell in column)]
    titles = [arm["title"] for arm in arms.values()]
    parts = [kept[n : n + MOST_COLUMNS] for n in range(0, len(kept), MOST_COLUMNS)]
    return [
        markdown_table(
            ("", *part), list(zip(titles, *(cells[title] for title in part), strict=True))
        )
        for part in parts
    ]


def _comparisons(results: Mapping[str, Any]) -> list[str]:
    """The sections that compare arms, and lines of plots."""
    arms, parts = results["arms"], []
    if compared := comparisons(results):
        parts += ["## One arm less another", PAIRED]
    for ours, others in compared.items():
        rows = [
            (arms[name]["title"], *_comparison_cells(measured)) for name, measured in others.items()
        ]
        title = f"{arms[ours]['title']} less"
        table = markdown_table((title, *MEASURES), rows)
        parts += [f"### {title} ... ({arms[ours]['table']})", table]
    for axis, words in (("checks", "number of checks"), ("coverage", "annotation coverage")):
        if leads := plot_leads(results, axis):
            first = results["plots"][axis][0][0]
            rows = [(f"{x:g}", title, *_comparison_cells(measured)) for x, title, measured in leads]
            parts += [f"## The lead of {first}, by {words}"]
            parts += [markdown_table((words, f"{first} less", *MEASURES), rows)]
    return parts


def _comparison_cells(measured: Mapping[str, PairedComparison]) -> list[str]:
    """A cell for each of ``MEASURES``."""
    cells = []
    for measure in MEASURES:
        if (gap := measured.get(measure)) is None:
            cells.append("-")
        elif gap.low is None:
            cells.append(f"{gap.mean:+.3f}, n={gap.n}")
        else:
            p = "" if gap.p is None else f", p={gap.p:.2g}"
            cells.append(f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]{p}, n={gap.n}")
    return cells


def _rates(arms: Mapping[str, dict[str, Any]]) -> str:
    """The table of the scores on which learning rates were chosen; "" without any."""
    tuned = [arm for name, arm in arms.items() if arm["tried"] and arm["tuned_on"] == name]
    if not tuned:
        return ""
    rates = sorted({rate for arm in tuned for rate in arm["tried"]}, key=float)
    rows = []
    for arm in tuned:
        scores = [arm["tried"].get(rate) for rate in rates]
        cells = ["-" if score is None else f"{score:.3f}" for score in scores]
        known = [rate for rate in rates if rate in arm["tried"]]
        chosen = _format_rate(arm["rate"])
        edge = len(known) > 1 and chosen in (known[0], known[-1])
        rows.append((arm["title"], *cells, chosen + (" (at the edge)" if edge else "")))
    return markdown_table(("", *rates, "taken"), rows)


def _format_rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:g}"


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean ± standard deviation (n - 1) as text; "-" for what there are too few values for."""
    if not values:
        return "-"
    mean = float(np.mean(values))
    digits = 0 if abs(mean) >= 10 else 3
    deviation = f"{np.std(values, ddof=1):,.{digits}f}" if len(values) > 1 else "-"
    return f"{mean:,.{digits}f} ± {deviation}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, with vertical bars in cells escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
