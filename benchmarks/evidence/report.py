"""What the evidence says, for people: ``tables.md``, beside ``evidence.json``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.summarize import (
    MEASURES,
    Paired,
    by_seed,
    collect,
    comparisons,
    leads,
)
from she_jax.training.files import write_json, write_text
from she_jax.training.workdir import Config

MOST_COLUMNS = 6  # of figures in one table
SPLITS = {"test": "test", "longtail": "long tail"}
NOTES = """\
A figure is the mean over seeds ± the standard deviation over seeds (n - 1; "-" for one seed).
Seeds: those that are done, of those that are planned. Rate: the learning rate, chosen on the
validation split of the first seed, or another arm's. Wrong reason: the share of pairs whose label
is right although a step's verdict is not. Step accuracy: the mean over the steps. Entropy: nats a
token, the mean of the last ten updates; "-" for an arm that samples nothing while it learns, and of
several stages it is the last one's. Cost: of the updates of one run and what they learn from;
seconds are of the updates and of all sampling, examining and filtering for them. The cold start,
reward models and the choice of a rate come on top. The examiner learnt from the annotated steps of
the first seed's pairs."""
PAIRED = """\
Over the seeds that both have: the mean difference, its 95% interval (Student's t over seeds) and
the p value of the paired t test, not corrected for the number of comparisons. One seed has no
interval."""


def write_report(config: Config, workdir: Path) -> dict[str, Any]:
    """Writes ``evidence.json`` and ``tables.md``; returns what ``evidence.json`` holds."""
    found = collect(config, workdir)
    found["paired"] = {
        f"{ours} less {arm}": {measure: one._asdict() for measure, one in own.items()}
        for ours, others in comparisons(found).items()
        for arm, own in others.items()
    }
    write_json(workdir / "evidence.json", found)
    write_text(workdir / "tables.md", tables(found))
    return found


# -------------------------------------------------------------------------- tables


def tables(found: Mapping[str, Any]) -> str:
    """All figures as Markdown, a part for each ``table`` that the arms name."""
    every = found["arms"]
    shown = {name: arm for name, arm in every.items() if arm["seeds"]}
    parts = ["# Evidence", NOTES]
    for part in dict.fromkeys(arm["table"] for arm in shown.values()):
        own = {name: arm for name, arm in shown.items() if arm["table"] == part}
        parts += [f"## {part.capitalize()}", *_part(own)]
    parts += _comparisons(found)
    if rates := _rates(shown):
        parts += ["## Learning rates", "Best macro F1 on the validation split, first seed.", rates]
    if absent := [line for arm in every.values() for line in _absent(arm)]:
        parts += ["## Not there yet", "\n".join(f"- {line}" for line in absent)]
    if found["bad"]:
        bad = (f"- {name}: {' '.join(reason.split())}" for name, reason in found["bad"].items())
        parts += ["## Not to be read", "\n".join(bad)]
    return "\n\n".join(parts) + "\n"


def _absent(arm: Mapping[str, Any]) -> list[str]:
    title, count, planned = arm["title"], len(arm["seeds"]), arm["planned"]
    told = [f"{title}: {planned - count} of {planned} seeds"] if count < planned else []
    if count and len(arm["tried"]) < arm["rates"]:
        told.append(f"{title}: its rate is chosen among {len(arm['tried'])} of {arm['rates']}")
    return told


def _part(own: Mapping[str, dict[str, Any]]) -> list[str]:
    """The tables of some arms, each with few enough columns to be read."""

    def both(title: str, name: str) -> dict[str, tuple[str, ...]]:
        return {f"{title}, {words}": (split, name) for split, words in SPLITS.items()}

    parts = [
        "### Labels",
        _about(own),
        *_grids(
            own,
            both("macro F1", "macro_f1")
            | both("accuracy", "accuracy")
            | both("good F1", "good_f1"),
        ),
        "### Reasoning",
        *_grids(
            own,
            both("step accuracy", "steps")
            | both("wrong reason", "wrong_reason")
            | both("parse rate", "parse_rate"),
        ),
    ]
    for split, words in SPLITS.items():
        classes = {f"class {n}": (split, "f1", str(n)) for n in range(1, 5)}
        parts += [f"### F1 by class, {words}", *_grids(own, classes)]
    for split, words in SPLITS.items():
        runs = [run for arm in own.values() for run in arm["seeds"].values() if run[split]]
        names = dict.fromkeys(name for run in runs for name in run[split]["step_accuracy"])
        steps = {name: (split, "step_accuracy", name) for name in names}
        parts += [f"### Accuracy by step, {words}", *_grids(own, steps)]
    cost = {
        "entropy at the end": ("entropy",),
        "sampled tokens": ("sampled_tokens",),
        "trained tokens": ("trained_tokens",),
        "seconds": ("seconds",),
    }
    return [*parts, "### Cost", *_grids(own, cost)]


def _about(own: Mapping[str, dict[str, Any]]) -> str:
    rows = [
        (arm["title"], f"{len(arm['seeds'])} of {arm['planned']}", _rate(arm["rate"]))
        for arm in own.values()
    ]
    return markdown(("", "seeds", "rate"), rows)


def _grids(own: Mapping[str, dict[str, Any]], columns: Mapping[str, Sequence[str]]) -> list[str]:
    """A row an arm and a column a figure; columns that nothing has are left out."""
    cells = {
        title: [spread(list(by_seed(arm, *path).values())) for arm in own.values()]
        for title, path in columns.items()
    }
    kept = [title for title, column in cells.items() if any(cell != "-" for cell in column)]
    titles = [arm["title"] for arm in own.values()]
    return [
        markdown(("", *part), list(zip(titles, *(cells[title] for title in part), strict=True)))
        for part in (kept[n : n + MOST_COLUMNS] for n in range(0, len(kept), MOST_COLUMNS))
    ]


def _comparisons(found: Mapping[str, Any]) -> list[str]:
    every, parts = found["arms"], []
    if compared := comparisons(found):
        parts += ["## One arm less another", PAIRED]
    for ours, others in compared.items():
        rows = [(every[name]["title"], *_told(own)) for name, own in others.items()]
        title = f"{every[ours]['title']} less"
        parts += [f"### {title} ... ({every[ours]['table']})", markdown((title, *MEASURES), rows)]
    for axis, words in (("checks", "number of checks"), ("coverage", "annotation coverage")):
        if rows := leads(found, axis):
            first = found["plots"][axis][0][0]
            told = [(f"{place:g}", title, *_told(own)) for place, title, own in rows]
            parts += [f"## The lead of {first}, by {words}"]
            parts += [markdown((words, f"{first} less", *MEASURES), told)]
    return parts


def _told(own: Mapping[str, Paired]) -> list[str]:
    """A cell for each of ``MEASURES``."""
    cells = []
    for measure in MEASURES:
        if (one := own.get(measure)) is None:
            cells.append("-")
        elif one.low is None:
            cells.append(f"{one.mean:+.3f}, n={one.n}")
        else:
            p = "" if one.p is None else f", p={one.p:.2g}"
            cells.append(f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]{p}, n={one.n}")
    return cells


def _rates(shown: Mapping[str, dict[str, Any]]) -> str:
    tuned = [arm for name, arm in shown.items() if arm["tried"] and arm["tuned_on"] == name]
    if not tuned:
        return ""
    rates = sorted({rate for arm in tuned for rate in arm["tried"]}, key=float)
    rows = []
    for arm in tuned:
        scores = [arm["tried"].get(rate) for rate in rates]
        cells = ["-" if score is None else f"{score:.3f}" for score in scores]
        known = [rate for rate in rates if rate in arm["tried"]]
        edge = len(known) > 1 and _rate(arm["rate"]) in (known[0], known[-1])
        taken = _rate(arm["rate"]) + (" (at the edge)" if edge else "")
        rows.append((arm["title"], *cells, taken))
    return markdown(("", *rates, "taken"), rows)


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:g}"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation (n - 1) in as many digits as one reads; "-" for what is not."""
    if not values:
        return "-"
    mean = float(np.mean(values))
    digits = 0 if abs(mean) >= 10 else 3
    deviation = f"{np.std(values, ddof=1):,.{digits}f}" if len(values) > 1 else "-"
    return f"{mean:,.{digits}f} ± {deviation}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a bar in a cell stays a bar."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
