"""The HTML page of an agreement report: figures, tables, plots and the pairs to read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from she_jax.evaluation.agreement_report import METRICS, worst_disagreements
from she_jax.evaluation.decide import UNREAD
from she_jax.evaluation.judged import JudgedPairs
from she_jax.evaluation.page import (
    AFTER,
    BEFORE,
    LONGEST,
    data_uri,
    new_figure,
    plot_style,
    render,
    svg_of,
)
from she_jax.types import Example

TEMPLATE = Path(__file__).with_name("agreement.html.jinja")
MOST_ROWS = 12  # of a table of slices
OTHER_MIX = 0.15  # share of pairs that would need another label for the mix of labels to be alike
SHOWN = 10  # answers that could not be read
SIDES = {"judge": "judge", "unseen": "judge, unseen queries", "floor": "floor", "raters": "raters"}
NAMES = {
    "accuracy": "accuracy", "macro_f1": "macro F1", "good_f1": "F1 of good",
    "good_macro_f1": "macro F1 of good", "kappa": "Cohen's kappa",
    "quadratic_kappa": "quadratic kappa", "alpha": "Krippendorff's alpha (ordinal)",
    "good_auc": "AUC of good", "ndcg@10": "nDCG@10",
}  # fmt: skip


def agreement_page(report: Mapping[str, Any], judged: JudgedPairs, about: str) -> str:
    """Renders a report as HTML.

    Args:
      report: see ``agreement_report``.
      judged: its pairs, for those to read.
      about: what was judged by what, a sentence.
    """
    sides = [side for side in SIDES if side in report["metrics"]]
    where = _where(report["metrics"])
    labels, calibration = report["labels"], report["calibration"]
    unread = [n for n, label in enumerate(judged.predicted.tolist()) if label == UNREAD]
    return render(
        TEMPLATE,
        about=about,
        warnings=_warnings(report),
        headline=_headline(report),
        metrics_head=["", *(SIDES[side] + where * (side == "floor") for side in sides)],
        metrics=[
            (NAMES[name], *(_interval(report["metrics"][side].get(name)) for side in sides))
            for name in METRICS
        ],
        confusion_head=["", *labels, "none"],
        confusion=[
            (label, *(f"{count:,}" for count in row))
            for label, row in zip(labels, report["confusion"], strict=True)
        ],
        calibration=calibration and _calibration_rows(calibration),
        plots={t: data_uri(svg) for t, svg in _plots(report).items()} if calibration else {},
        review=_review_lines(report),
        slices={title: _slice_rows(rows) for title, rows in report["slices"].items()},
        systems=_system_rows(report["systems"]),
        tau=_number(report["systems"]["tau"]) if report["systems"] else "",
        disagreements=[_pair(judged, n) for n in worst_disagreements(judged)],
        unread=[_pair(judged, n) for n in unread[:SHOWN]],
        unread_count=len(unread),
    )


def other_mix(report: Mapping[str, Any]) -> str:
    """That the labels are another mix than those which the decision was fitted on; "" if not.

    Args:
      report: from ``agreement_report``, with ``decide``, what was fitted, as plain values, if
        anything was.
    """
    fitted = report.get("decide", {}).get("about", {}).get("label_mix")
    counts = np.sum(report["confusion"], axis=1)
    if not fitted:
        return ""
    shares = dict(zip(report["labels"], (counts / counts.sum()).tolist(), strict=True))
    # Total variation: the share of pairs that would need another label.
    if sum(abs(shares[label] - fitted[label]) for label in shares) / 2 <= OTHER_MIX:
        return ""
    mixes = (
        ", ".join(f"{label}: {mix[label]:.0%}" for label in shares) for mix in (shares, fitted)
    )
    here, there = mixes
    return (
        f"the labels here ({here}) are another mix than those that threshold, temperature and "
        f"review were fitted on ({there}), so these may be off"
    )


def _warnings(report: Mapping[str, Any]) -> list[str]:
    warnings, metrics = [], report["metrics"]
    if report["seen"]:
        others = (
            "on other queries it agrees less, see unseen queries"
            if report["seen"] < report["pairs"]
            else "so nothing here says how far it agrees on other queries"
        )
        warnings.append(
            f"{report['seen']:,} of the {report['pairs']:,} pairs have a query that the judge was "
            f"trained or tuned on: {others}"
        )
    floor = metrics.get("floor", {}).get("quadratic_kappa", {}).get("estimate")
    if mix := other_mix(report):
        warnings.append(mix)
    judge = metrics.get("unseen", metrics["judge"])["quadratic_kappa"]["estimate"]
    if floor is not None and (judge is None or judge < floor):
        warnings.append(
            f"Below the floor: quadratic kappa {_number(judge)}{_where(metrics)}, where counting "
            f"common words has {floor:.3f}. Its labels and reasons are not to be relied on"
        )
    return warnings


def _headline(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    metrics = report["metrics"]
    judge, where = metrics.get("unseen", metrics["judge"]), _where(metrics)
    figures = [
        (f"{report['pairs']:,}", f"pairs of {report['queries']:,} queries"),
        (_number(judge["accuracy"]["estimate"]), f"of the labels are those of people{where}"),
        (_number(judge["quadratic_kappa"]["estimate"]), f"quadratic kappa with people{where}"),
    ]
    if "raters" in metrics:
        kappa = _number(metrics["raters"]["quadratic_kappa"]["estimate"])
        figures.append((kappa, f"between raters, on {report['rated_twice']:,} pairs"))
    if "floor" in metrics:
        floor = metrics["floor"]["quadratic_kappa"]["estimate"]
        figures.append((_number(floor), f"quadratic kappa of the floor{where}"))
    return figures


def _where(metrics: Mapping[str, Any]) -> str:
    return ", unseen queries" if "unseen" in metrics else ""


def _calibration_rows(calibration: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    names = {
        "ece": "expected calibration error (10 bins)",
        "brier": "Brier score, 0 to 2",
        "log_loss": "log loss, nats",
    }
    sides = calibration["before"], calibration["after"]
    return [(title, _number(sides[0][k]), _number(sides[1][k])) for k, title in names.items()]


def _review_lines(report: Mapping[str, Any]) -> list[str]:
    if not report["review"]:
        return []
    lines = []
    if flagged := report.get("flagged"):
        lines.append(
            f"By the limit that was fitted on validation pairs a human looks at "
            f"{flagged['pairs']:,} of {report['pairs']:,} pairs; of the others "
            f"{_number(flagged['accuracy'])} agree with people, where 0.950 was the aim. The "
            "limits below are chosen on these pairs themselves."
        )
    for share, found in report["review"]["limits"].items():
        if found["limit"] is None:
            lines.append(f"No confidence gives {float(share):.0%} agreement on these pairs.")
        else:
            lines.append(
                f"For {float(share):.0%} agreement of the others a human looks at "
                f"{found['pairs']:,} of {report['pairs']:,} pairs, those with a confidence below "
                f"{found['limit']:.3f}."
            )
    return lines


def _slice_rows(rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (name, f"{row['pairs']:,}", _interval(row["accuracy"]), _interval(row["quadratic_kappa"]))
        for name, row in list(rows.items())[:MOST_ROWS]
    ]


def _system_rows(compared: Mapping[str, Any] | None) -> list[tuple[str, ...]]:
    """Name, pairs and both figures of each system, the best by people first."""
    if not compared:
        return []
    ordered = sorted(
        compared["systems"].items(), key=lambda row: -(row[1]["human"]["estimate"] or 0)
    )
    return [
        (name, f"{row['n']:,}", _interval(row["human"]), _interval(row["judge"]))
        for name, row in ordered
    ]


def _pair(judged: JudgedPairs, n: int) -> dict[str, Any]:
    """What the page shows of a pair."""
    example, line = judged.examples[n], judged.lines[n]
    facts = [f"people {example.label}", f"judge {line['label']}"]
    facts += [f"raters {', '.join(map(str, example.raters))}"] if example.raters else []
    if line["confidence"] is not None:
        facts.append(f"confidence {line['confidence']:.2f}")
    human = [f"{name}: {verdict}" for name, verdict in (example.steps or {}).items()]
    return {
        "query": example.query,
        "title": example.product.get("title", ""),
        "facts": [*facts, example.uid],
        "human": human,
        "judge": chain_lines(line),
    }


def chain_lines(line: Mapping[str, Any]) -> list[str]:
    """The chain of a line of ``predictions.jsonl`` as text, or what was written in its place."""
    if line["text"]:
        return line["text"][:LONGEST].split("\n")
    return [
        f"{step['name']}: " + " => ".join(filter(None, (step["text"], step["verdict"])))
        for step in line["steps"]
    ]


def _plots(report: Mapping[str, Any]) -> dict[str, bytes]:
    with plot_style():
        figures = [_plot_reliability(report["calibration"]), _plot_review(report["review"])]
        return {figure.get_suptitle(): svg_of(figure) for figure in figures}


def _plot_reliability(calibration: Mapping[str, Any]) -> Any:
    figure = new_figure("What confidence promises, and what it keeps", 3.4)
    axes = figure.add_subplot(xlabel="confidence", ylabel="share that agrees with people")
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
    for name, title, color in (
        ("before", "as voted", BEFORE),
        ("after", "after the temperature", AFTER),
    ):
        curve = calibration[name]["curve"]
        x, y = [p["confidence"] for p in curve], [p["accuracy"] for p in curve]
        most = max(p["n"] for p in curve)
        axes.plot(x, y, color=color, label=title)
        axes.scatter(x, y, [10 + 90 * p["n"] / most for p in curve], color=color)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def _plot_review(review: Mapping[str, Any]) -> Any:
    figure = new_figure("Agreement of the surest pairs", 3.4)
    axes = figure.add_subplot(
        xlabel="share of the pairs that nobody looks at", ylabel="share that agrees with people"
    )
    curve = review["curve"]
    axes.plot([p["share"] for p in curve], [p["accuracy"] for p in curve], color=AFTER, marker=".")
    for share in review["limits"]:
        axes.axhline(float(share), color="#999999", linewidth=1, linestyle="--")
    axes.set(xlim=(0, 1.02))
    return figure


def _interval(value: Mapping[str, Any] | None) -> str:
    if value is None or value["estimate"] is None:
        return "-"
    if value["low"] is None:
        return f"{value['estimate']:.3f}"
    return f"{value['estimate']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"  # never -0.000


def judged_row(example: Example, line: Mapping[str, Any]) -> dict[str, Any]:
    """A row of ``judged.csv``, without the ids."""
    return {
        "query": example.query,
        "title": example.product.get("title", ""),
        "human": example.label,
        "raters": " ".join(map(str, example.raters)),
        "judge": line["label"],
        "expected": line["expected"],
        "confidence": line["confidence"],
        "review": line["review"],
        "verdicts": " ".join(f"{s['name']}={s['verdict']}" for s in line["steps"] if s["verdict"]),
        "chain": "\n".join(chain_lines(line)),
    }
