"""The plots of the study, from what ``summarize.collect`` returns."""

from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.evidence.summarize import by_seed, plot_leads, plot_lines
from she_jax.evaluation.page import plot_style

COLORS = ("#1f5f9e", "#b4602a", "#4f8a4c", "#8a5a9e", "#777777", "#b89b2e")
OFFSET = 0.012  # in x, between the error bars of two lines, which would hide each other
SMOOTH = 5  # updates in a running mean of the entropy
BAND = "mean ± standard deviation over seeds"
SINGLE = "one seed a point"


def save_plots(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Saves the plots as PNG files.

    Args:
      results: what ``collect`` returns.
      folder: where they go. An older plot that has no data now is removed.

    Returns:
      The files that were written.
    """
    figures, written = make_figures(results), []
    with plot_style():
        for name in FIGURES:
            path = folder / f"{name}.png"
            path.unlink(missing_ok=True)
            if name in figures:
                figures[name].savefig(path, dpi=150)
                written.append(path)
    return written


def make_figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Draws the plots that there is data for.

    Args:
      results: what ``collect`` returns.

    Returns:
      Those of ``curves``, ``entropy``, ``confusion``, ``checks`` and ``coverage``, in this order.
    """
    with plot_style():
        figures = {name: make_figure(results) for name, make_figure in FIGURES.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


# -------------------------------------------------------------------------- over updates


def _curves(results: Mapping[str, Any]) -> Figure | None:
    return _series(results, "curve", "macro F1, validation", marker="o")


def _entropy(results: Mapping[str, Any]) -> Figure | None:
    return _series(results, "entropies", "policy entropy (nats a token)", smooth=SMOOTH)


def _series(
    results: Mapping[str, Any], key: str, title: str, *, marker: str = "", smooth: int = 1
) -> Figure | None:
    """A line an arm over the updates, with its band over the seeds."""
    arms = _arms_with(results, "curves", key)
    if not arms:
        return None
    figure = Figure(figsize=(7.6, 3.8))
    axis = figure.subplots()
    most = max(len(arm["seeds"]) for _, arm in arms)
    for color, arm in arms:
        steps, mean, sd = _band(arm, key, smooth)
        count = len(arm["seeds"])  # a mean of fewer seeds is not to be compared by the eye
        fewer = f" ({count} seed{'s' * (count > 1)})" if count < most else ""
        look = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.8}
        axis.plot(steps, mean, label=arm["title"] + fewer, **look)
        axis.fill_between(steps, mean - sd, mean + sd, color=color, alpha=0.15, linewidth=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    running = f", running mean of {smooth}" if smooth > 1 else ""
    _label(axis, f"update{running}", title)
    figure.legend(loc="outside right upper", fontsize=8)  # beside: lines go anywhere
    axis.set_title(BAND, fontsize=9)
    return figure


def _band(arm: Mapping[str, Any], key: str, smooth: int) -> tuple[np.ndarray, ...]:
    """The updates that all seeds have; mean and standard deviation (0 for one seed) at each."""
    runs = [dict(map(tuple, run[key])) for run in arm["seeds"].values() if run[key]]
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    values = np.array([[run[step] for step in steps] for run in runs])
    if smooth > 1 and len(steps) >= smooth:
        window = np.ones(smooth) / smooth
        values = np.array([np.convolve(run, window, mode="valid") for run in values])
        steps = steps[smooth // 2 : len(steps) - smooth + 1 + smooth // 2]
    return np.array(steps), values.mean(0), _deviation(values)


def _deviation(values: np.ndarray) -> np.ndarray:
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def _arms_with(results: Mapping[str, Any], plot: str, key: str) -> list[tuple[str, dict[str, Any]]]:
    """The arms of a plot that have data for it, each with its color, which others do not change."""
    names = results["plots"][plot]
    colored = [(color, results["arms"].get(name)) for color, name in zip(cycle(COLORS), names)]
    return [
        (color, arm)
        for color, arm in colored
        if arm and any(run[key] for run in arm["seeds"].values())
    ]


# -------------------------------------------------------------------------- confusion


def _confusion(results: Mapping[str, Any]) -> Figure | None:
    """Gold down, predicted across; shares of a gold class, all seeds together."""
    arms = _arms_with(results, "confusion", "test")
    if not arms:
        return None
    figure = Figure(figsize=(0.4 + 3.1 * len(arms), 3.1))
    axes = figure.subplots(1, len(arms), squeeze=False)[0]
    for axis, (_, arm) in zip(axes, arms, strict=True):
        counts = np.sum([run["test"]["confusion"] for run in arm["seeds"].values()], axis=0)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), share in np.ndenumerate(shares):
            ink = "white" if share > 0.5 else "#1d2329"
            axis.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8, color=ink)
        axis.set_xticks(range(5), ["1", "2", "3", "4", "none"])
        axis.set_yticks(range(4), ["1", "2", "3", "4"])
        axis.set_xlabel("predicted class")
        count = len(arm["seeds"])
        axis.set_title(f"{arm['title']} ({count} seed{'s' * (count > 1)})", fontsize=9)
    axes[0].set_ylabel("gold class")
    return figure


# -------------------------------------------------------------------------- over checks, coverage


def _checks(results: Mapping[str, Any]) -> Figure | None:
    """The lead of the first line, over the number of checks."""
    leads = plot_leads(results, "checks")
    if not leads:
        return None
    figure = Figure(figsize=(9.6, 3.6))
    axes = figure.subplots(1, 2, sharey=True)
    first = results["plots"]["checks"][0][0]
    others = [title for title, _ in results["plots"]["checks"][1:]]
    for axis, measure in zip(axes, ("macro F1, test", "step accuracy, test"), strict=True):
        for color, other in zip(cycle(COLORS), others):
            points = [
                (x, measured[measure])
                for x, title, measured in leads
                if title == other and measure in measured
            ]
            if not points:
                continue
            xs, means = [x for x, _ in points], [gap.mean for _, gap in points]
            reach = [0.0 if gap.high is None else gap.high - gap.mean for _, gap in points]
            bars = {"marker": "o", "capsize": 3, "linewidth": 1.8, "color": color}
            bars["yerr"] = reach if any(reach) else None
            axis.errorbar(xs, means, label=f"{first} less {other}", **bars)
        axis.axhline(0, color="#777777", linestyle=":", linewidth=1)
        axis.set_xticks(sorted({x for x, *_ in leads}))
        _label(axis, "attribute checks in the chain", f"lead in {measure}")
        axis.yaxis.set_tick_params(labelleft=True)
    axes[0].legend(fontsize=8, loc="upper left")
    several = any(gap.n > 1 for *_, measured in leads for gap in measured.values())
    title = "paired over seeds, 95% intervals" if several else SINGLE
    figure.suptitle(title, fontsize=9, fontweight="normal")
    return figure


def _coverage(results: Mapping[str, Any]) -> Figure | None:
    """Macro F1 of each line, over the share of steps that are annotated."""
    lines = plot_lines(results, "coverage")
    every_x = sorted({x for _, line in lines for x in line})
    if not every_x:
        return None
    figure = Figure(figsize=(7.6, 3.8))
    axis = figure.subplots()
    for n, (color, (title, line)) in enumerate(zip(cycle(COLORS), lines)):
        if not line:
            continue
        values = [list(by_seed(arm, "test", "macro_f1").values()) for arm in line.values()]
        means = [float(np.mean(scores)) for scores in values]
        deviations = [float(_deviation(np.array(scores))) for scores in values]
        xs = [x + OFFSET * (n - (len(lines) - 1) / 2) for x in line]
        bars = {"marker": "o", "capsize": 3, "linewidth": 1.8, "color": color}
        bars["yerr"] = deviations if any(deviations) else None
        axis.errorbar(xs, means, label=title, **bars)
    axis.set_xlim(-0.05, 1.05)
    axis.set_xticks(every_x, [f"{x:.0%}" for x in every_x])
    _label(axis, "share of the steps that humans annotated", "macro F1, test")
    figure.legend(loc="outside right upper", fontsize=8)
    several = any(len(arm["seeds"]) > 1 for _, line in lines for arm in line.values())
    axis.set_title(BAND if several else SINGLE, fontsize=9)
    return figure


def _label(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)


FIGURES: dict[str, Callable[[Mapping[str, Any]], Figure | None]] = {
    "curves": _curves,
    "entropy": _entropy,
    "confusion": _confusion,
    "checks": _checks,
    "coverage": _coverage,
}
