"""The plots of a filter report, drawn with matplotlib, which only this file imports."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from she_jax.evaluation.page import AFTER, BEFORE, OTHER, RANGE, new_figure, plot_style, svg_of
from she_jax.filtering.cells import largest_cells

MOST_BARS = 12  # bars of a plot


def draw_plots(report: dict[str, Any]) -> dict[str, bytes]:
    """The plots of a report as SVG, by title; the same report gives the same bytes.

    Args:
      report: the content of ``report.json``.
    """
    with plot_style():
        figures = [_plot_reasons(report)]
        if any(report["pass_rate_histogram"]["before"]):
            figures += [_plot_pass_rates(report), _plot_entropies(report)]
        figures += [
            _plot_cells(report["by_class"], "Pairs by class"),
            _plot_cells(report["by_kind"], "Pairs by kind of query"),
        ]
        return {figure.get_suptitle(): svg_of(figure) for figure in figures}


def _plot_pass_rates(report: dict[str, Any]) -> Figure:
    bins, thresholds = report["pass_rate_histogram"], report["thresholds"]
    low, high = thresholds["low"], thresholds["high"]
    exact = bins["from"] == bins["to"]
    n = len(bins["from"]) - exact
    figure = _plot_before_after(
        bins,
        "Pass rates before and after the filter",
        f"right rollouts of {n}" if exact else "share of rollouts that are right",
        1 / n,
        (low, high) if (low, high) != (0, 1) else None,
    )
    if exact:
        names = [str(k) if n < 10 or k % 2 == 0 else "" for k in range(n + 1)]
        figure.axes[0].set_xticks(bins["from"], names)
    return figure


def _plot_entropies(report: dict[str, Any]) -> Figure:
    bins, minimum = report["path_entropy_histogram"], report["thresholds"]["min_entropy"]
    return _plot_before_after(
        bins,
        "Path entropy before and after the filter",
        "nats; 0 where all of a pair's rollouts take one path",
        bins["to"][0],
        (minimum, bins["to"][-1]) if minimum else None,
    )


def _plot_before_after(
    bins: dict[str, list],
    title: str,
    label: str,
    width: float,
    limits: tuple[float, float] | None,
) -> Figure:
    """A histogram: wide pale bars for "before", narrow dark bars for "after" in front of them."""
    figure = new_figure(title, 3.4)
    axes = figure.add_subplot(xlabel=label, ylabel="share of pairs (%)")
    middle = (np.array(bins["from"]) + np.array(bins["to"])) / 2
    for name, color, scale in (("before", BEFORE, 0.9), ("after", AFTER, 0.45)):
        counts = np.array(bins[name])
        percent = 100 * counts / max(counts.sum(), 1)
        legend = f"{name} ({counts.sum():,} pairs)"
        axes.bar(middle, percent, scale * width, color=color, label=legend)
    if limits:
        # With a bar per exact value, the shaded range ends halfway between two bars.
        inside = (middle >= limits[0] - 1e-6) & (middle <= limits[1] + 1e-6)
        if bins["from"] == bins["to"] and inside.any():
            limits = (middle[inside][0] - width / 2, middle[inside][-1] + width / 2)
        axes.axvspan(*limits, color=RANGE, zorder=-1, label="thresholds")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.legend(loc="outside lower left", ncols=3, columnspacing=1, handlelength=1.2)
    return figure


def _plot_cells(cells: dict[str, dict[str, Any]], title: str) -> Figure:
    largest = list(largest_cells(cells, MOST_BARS).items())
    kept = sum(cell["kept"] for cell in cells.values())
    pairs = kept + sum(cell["dropped"] for cell in cells.values())
    before = [100 * (cell["kept"] + cell["dropped"]) / pairs for _, cell in largest]
    after = [100 * cell["kept"] / max(kept, 1) for _, cell in largest]
    if len(largest) < len(cells):
        title += f": the {len(largest)} largest of {len(cells)}"
    figure = new_figure(title, 1.5 + 0.32 * len(largest))
    axes = figure.add_subplot(xlabel="share of pairs (%)")
    y = np.arange(len(largest))
    axes.barh(y, before, 0.8, color=BEFORE, label=f"all recorded ({pairs:,} pairs)")
    axes.barh(y, after, 0.4, color=AFTER, label=f"kept ({kept:,} pairs)")
    axes.set_yticks(y, [_tick_label(name) for name, _ in largest], parse_math=False)
    axes.invert_yaxis()
    figure.legend(loc="outside lower left", ncols=2, columnspacing=1, handlelength=1.2)
    return figure


def _plot_reasons(report: dict[str, Any]) -> Figure:
    counts = [(name.replace("_", " "), n) for name, n in report["by_reason"].items() if n][::-1]
    figure = new_figure(f"What became of the {report['pairs']:,} pairs", 1.4 + 0.3 * len(counts))
    axes = figure.add_subplot(xlabel="pairs")
    bars = axes.barh(
        [name for name, _ in counts],
        [n for _, n in counts],
        color=[AFTER if name == "kept" else OTHER for name, _ in counts],
    )
    axes.bar_label(bars, [f"{n:,}" for _, n in counts], padding=3)
    axes.margins(x=0.15)
    return figure


def _tick_label(name: str) -> str:
    """The name, shortened, with characters that the plots' font may lack escaped."""
    label = "".join(
        c if c.isprintable() and ord(c) < 0x250 else c.encode("unicode_escape").decode()
        for c in name or "(none)"
    )
    return label if len(label) <= 20 else f"{label[:18]}..."
