"""The HTML page of a filter report: headline figures, plots, tables and examples.

The page (``report.html.jinja``) is one of ``she_jax.evaluation.page``.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from she_jax.evaluation.page import LONGEST, data_uri, render
from she_jax.filtering.cells import largest_cells
from she_jax.filtering.records import PromptRecord
from she_jax.filtering.select import REASONS, FilterConfig, Survey

MOST_ROWS = 40  # rows of a table
TEMPLATE = Path(__file__).with_name("report.html.jinja")


def page(
    report: dict[str, Any],
    survey: Survey,
    config: FilterConfig,
    examples: dict[str, list[tuple[int, PromptRecord]]],
) -> str:
    """Renders the page as HTML.

    Args:
      report: the content of ``report.json``.
      survey: the survey of all recorded pairs.
      config: the thresholds and quotas.
      examples: for each of ``REASONS``, some records with their indices in the survey.
    """
    from she_jax.filtering.plots import draw_plots  # matplotlib is slow, so not at every start

    descriptions = _describe_reasons(config)
    reasons = {name: f"{name.replace('_', ' ')}: {descriptions[name]}" for name in REASONS}
    counts = {name: count for name, count in report["by_reason"].items() if count}
    return render(
        TEMPLATE,
        headline=_headline(report),
        plots={title: data_uri(svg) for title, svg in draw_plots(report).items()},
        means=_mean_rows(report),
        reasons=[(reasons[name], f"{count:,}") for name, count in counts.items()],
        unrecorded=report["unrecorded_duplicates"],
        cells={
            "By class": _cells("class", report["by_class"]),
            "By kind of query": _cells("kind", report["by_kind"]),
        },
        quotas=report["quotas"],
        unmet=_unmet_rows(report),
        more_unmet=max(0, len(report["unmet_quotas"]) - MOST_ROWS),
        thresholds=[(key, _format(value)) for key, value in report["thresholds"].items()],
        examples={
            reasons[name][0].upper() + reasons[name][1:]: [_example(survey, *r) for r in records]
            for name, records in examples.items()
            if records
        },
    )


def _describe_reasons(config: FilterConfig) -> dict[str, str]:
    """Descriptions of the ``REASONS``."""
    return {
        "kept": "passed every threshold and was selected",
        "duplicate": f"near-duplicate of an earlier pair (similarity {config.similarity:g})",
        "confident": f"the policy's confidence is above {config.confidence:g}",
        "unlabeled": "the pair has no label, so no outcome is known",
        "unmeasured": "no rollouts were recorded",
        "easy": f"too easy, pass rate above {config.high:g}",
        "hard": f"too hard, pass rate below {config.low:g}",
        "one_path": f"paths too alike, path entropy below {config.min_entropy:g} nats",
        "quota": "passed every threshold, but its quota was full",
    }


def _headline(report: dict[str, Any]) -> list[tuple[str, str]]:
    def change(name: str) -> str:
        return " → ".join(_format(report[name][side]) for side in ("before", "after"))

    return [
        (f"{report['pairs']:,}", "pairs"),
        (f"{report['kept']:,}", f"kept ({report['kept'] / report['pairs']:.1%})"),
        (change("pass_rate"), "mean pass rate, before → after"),
        (change("path_entropy"), "mean path entropy in nats, before → after"),
        (change("single_path"), "share of pairs with one path only, before → after"),
    ]


def _mean_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    titles = {
        "pass_rate": "pass rate",
        "path_entropy": "path entropy (nats)",
        "single_path": "share with one path only",
        "distinct_2": "distinct-2 of the rollouts' words",
    }
    means = {title: report[name] for name, title in titles.items()}
    means |= {f"step {name}: full marks": v for name, v in report["step_pass_rates"].items()}
    rows = [(title, _format(v["before"]), _format(v["after"])) for title, v in means.items()]
    counts = {"pairs with rollouts": report["measured"]}
    limits = ("pass rate from 2/3", "from 1/3", "below 1/3")
    for (name, sides), limit in zip(report["difficulty"].items(), limits, strict=True):
        counts[f"of these {name} ({limit})"] = sides
    return rows + [(title, f"{v['before']:,}", f"{v['after']:,}") for title, v in counts.items()]


def _cells(title: str, cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The table of the classes or kinds: its head, its rows, and how many more there are."""
    names = [r for r in REASONS[1:] if any(cell["dropped_by_reason"][r] for cell in cells.values())]
    rows = [
        [name or "(none)"]
        + [f"{n:,}" for n in (cell["kept"], cell["dropped"])]
        + [f"{cell['dropped_by_reason'][r]:,}" for r in names]
        for name, cell in largest_cells(cells, MOST_ROWS).items()
    ]
    head = [title, "kept", "dropped", *(r.replace("_", " ") for r in names)]
    return {"head": head, "rows": rows, "more": len(cells) - len(rows)}


def _unmet_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (cell["cell"], *(f"{cell[k]:,}" for k in ("wanted", "available", "kept")))
        for cell in report["unmet_quotas"][:MOST_ROWS]
    ]


def _example(survey: Survey, n: int, record: PromptRecord) -> dict[str, Any]:
    """What the page shows of a pair."""
    label = "no label" if record.label is None else f"class {record.label}"
    facts = [label, record.kind or "no kind", f"row {record.row}", record.uid]
    if record.confidence is not None:
        facts.append(f"confidence {record.confidence:.3f}")
    if record.right:
        facts.append(f"{sum(record.right)} of {len(record.right)} rollouts right")
        facts.append(f"path entropy {survey.entropy[n]:.3f} nats")
    return {
        "query": record.query,
        "title": record.title,
        "facts": facts,
        "paths": sorted(Counter(record.paths).items(), key=lambda item: (-item[1], item[0])),
        "rollouts": [
            {
                "outcome": "right" if record.right[g] else "wrong",
                "lines": record.texts[g][:LONGEST].split("\n"),
                "cut": len(record.texts[g]) > LONGEST,
            }
            for g in _contrasting_rollouts(record)
        ],
    }


def _contrasting_rollouts(record: PromptRecord) -> list[int]:
    """The first rollout and the first that differs in outcome, else in path, else in text."""
    for values in (record.right, record.paths, record.texts):
        if others := [g for g, value in enumerate(values) if value != values[0]]:
            return [0, others[0]]
    return [0] if record.texts else []


def _format(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
