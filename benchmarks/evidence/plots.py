"""The plots of the evidence, drawn from what ``summarize.collect`` found."""

from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.evidence.summarize import by_seed, leads, lines
from she_jax.filtering.page import STYLE

COLOURS = ("#1f5f9e", "#b4602a", "#4f8a4c", "#8a5a9e", "#777777", "#b89b2e")
BESIDE = 0.012  # shares between the error bars of two lines, which would hide each other
SMOOTH = 5  # updates in a running mean of the entropy
BAND = "mean ± standard deviation over seeds"
ALONE = "one seed a point"


def draw(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Saves the pictures as PNG files.

    Args:
      found: what ``collect`` returns.
      folder: where they go; one of an earlier call that has no figures now is removed.

    Returns:
      The files that were written.
    """
    drawn, written = pictures(found), []
    with style.context(["default", STYLE]):  # whatever the user's own matplotlib settings are
        for name in PICTURES:
            path = folder / f"{name}.png"
            path.unlink(missing_ok=True)
            if name in drawn:
                drawn[name].savefig(path, dpi=150)
                written.append(path)
    return written


def pictures(found: Mapping[str, Any]) -> dict[str, Figure]:
    """Draws what there are figures for.

    Args:
      found: what ``collect`` returns.

    Returns:
      Those of ``curves``, ``entropy``, ``confusion``, ``checks`` and ``coverage``, in this order.
    """
    with style.context(["default", STYLE]):
        drawn = {name: picture(found) for name, picture in PICTURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


# -------------------------------------------------------------------------- over updates


def _curves(found: Mapping[str, Any]) -> Figure | None:
    return _series(found, "curve", "macro F1, validation", marker="o")


def _entropy(found: Mapping[str, Any]) -> Figure | None:
    return _series(found, "entropies", "policy entropy (nats a token)", smooth=SMOOTH)


def _series(
    found: Mapping[str, Any], key: str, title: str, *, marker: str = "", smooth: int = 1
) -> Figure | None:
    """A line an arm over the updates, with its band over the seeds."""
    drawn = _arms(found, "curves", key)
    if not drawn:
        return None
    figure = Figure(figsize=(7.6, 3.8))
    axis = figure.subplots()
    most = max(len(arm["seeds"]) for _, arm in drawn)
    for colour, arm in drawn:
        steps, mean, sd = _band(arm, key, smooth)
        count = len(arm["seeds"])  # a mean of fewer seeds is not to be compared by the eye
        fewer = f" ({count} seed{'s' * (count > 1)})" if count < most else ""
        look = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.8}
        axis.plot(steps, mean, label=arm["title"] + fewer, **look)
        axis.fill_between(steps, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
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
        values = np.array([np.convolve(own, window, mode="valid") for own in values])
        steps = steps[smooth // 2 : len(steps) - smooth + 1 + smooth // 2]
    return np.array(steps), values.mean(0), _deviation(values)


def _deviation(values: np.ndarray) -> np.ndarray:
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def _arms(found: Mapping[str, Any], plot: str, key: str) -> list[tuple[str, dict[str, Any]]]:
    """The arms of a plot that have figures for it, each with its colour, whatever is missing."""
    names = found["plots"][plot]
    every = [(colour, found["arms"].get(name)) for colour, name in zip(cycle(COLOURS), names)]
    return [
        (colour, arm)
        for colour, arm in every
        if arm and any(run[key] for run in arm["seeds"].values())
    ]


# -------------------------------------------------------------------------- confusion


def _confusion(found: Mapping[str, Any]) -> Figure | None:
    """Gold down, predicted across; shares of a gold class, all seeds together."""
    arms = _arms(found, "confusion", "test")
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


# -------------------------------------------------------------------------- against a size


def _checks(found: Mapping[str, Any]) -> Figure | None:
    """The lead of the first line, by number of checks."""
    rows = leads(found, "checks")
    if not rows:
        return None
    figure = Figure(figsize=(9.6, 3.6))
    axes = figure.subplots(1, 2, sharey=True)
    first = found["plots"]["checks"][0][0]
    others = [title for title, _ in found["plots"]["checks"][1:]]
    for axis, measure in zip(axes, ("macro F1, test", "step accuracy, test"), strict=True):
        for colour, other in zip(cycle(COLOURS), others):
            own = [
                (place, told[measure])
                for place, title, told in rows
                if title == other and measure in told
            ]
            if not own:
                continue
            places, gaps = [place for place, _ in own], [one.mean for _, one in own]
            reach = [0.0 if one.high is None else one.high - one.mean for _, one in own]
            bars = {"marker": "o", "capsize": 3, "linewidth": 1.8, "color": colour}
            bars["yerr"] = reach if any(reach) else None
            axis.errorbar(places, gaps, label=f"{first} less {other}", **bars)
        axis.axhline(0, color="#777777", linestyle=":", linewidth=1)
        axis.set_xticks(sorted({place for place, *_ in rows}))
        _label(axis, "attribute checks in the chain", f"lead in {measure}")
        axis.yaxis.set_tick_params(labelleft=True)
    axes[0].legend(fontsize=8, loc="upper left")
    several = any(one.n > 1 for *_, told in rows for one in told.values())
    title = "paired over seeds, 95% intervals" if several else ALONE
    figure.suptitle(title, fontsize=9, fontweight="normal")
    return figure


def _coverage(found: Mapping[str, Any]) -> Figure | None:
    """Macro F1 of each line, by the share of steps that are annotated."""
    every = lines(found, "coverage")
    places = sorted({place for _, line in every for place in line})
    if not places:
        return None
    figure = Figure(figsize=(7.6, 3.8))
    axis = figure.subplots()
    for n, (colour, (title, line)) in enumerate(zip(cycle(COLOURS), every)):
        if not line:
            continue
        values = [list(by_seed(arm, "test", "macro_f1").values()) for arm in line.values()]
        means = [float(np.mean(own)) for own in values]
        spreads = [float(_deviation(np.array(own))) for own in values]
        beside = [place + BESIDE * (n - (len(every) - 1) / 2) for place in line]
        bars = {"marker": "o", "capsize": 3, "linewidth": 1.8, "color": colour}
        bars["yerr"] = spreads if any(spreads) else None
        axis.errorbar(beside, means, label=title, **bars)
    axis.set_xlim(-0.05, 1.05)
    axis.set_xticks(places, [f"{place:.0%}" for place in places])
    _label(axis, "share of the steps that humans annotated", "macro F1, test")
    figure.legend(loc="outside right upper", fontsize=8)
    several = any(len(arm["seeds"]) > 1 for _, line in every for arm in line.values())
    axis.set_title(BAND if several else ALONE, fontsize=9)
    return figure


def _label(axis: Axes, across: str, up: str) -> None:
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(alpha=0.3)


PICTURES: dict[str, Callable[[Mapping[str, Any]], Figure | None]] = {
    "curves": _curves,
    "entropy": _entropy,
    "confusion": _confusion,
    "checks": _checks,
    "coverage": _coverage,
}
