"""Learning curves as charts of a page: lines, ticks and texts, for inline SVG.

They follow a dark screen, which matplotlib's pictures do not, and take no time to draw.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from she_jax.runs.scalars import charts_of, step_of

WIDTH, HEIGHT = 460, 190  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 56, 8, 10, 22  # its margins
MOST_POINTS = 200  # of a line
MOST_DOTS = 30  # points that are marked, each with its value
COLORS = 8  # of the page's style; further lines begin again


@dataclass(frozen=True, kw_only=True)
class Line:
    """A scalar's curve.

    Attributes:
      name: of the scalar.
      color: index of its color.
      first, last: its values at both ends, as text.
      path: the points of an SVG polyline; of numbers alone, so it needs no escapes and is not cut.
      dots: (x, y, what it says) of the points that are marked.
    """

    name: str
    color: int
    first: str
    last: str
    path: Markup
    dots: Sequence[tuple[float, float, str]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines with one pair of axes.

    Attributes:
      title: what it shows.
      lines: at least one.
      x_ticks, y_ticks: (place, text).
      mean_of: updates that a point is the mean of.
    """

    title: str
    lines: Sequence[Line]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    mean_of: int


def draw_charts(rows: Sequence[Mapping[str, Any]], phases: Sequence[str]) -> dict[str, list[Chart]]:
    """The charts of each phase; those with nothing but zeros, or with no values, are left out.

    A step has the same color in all of them.

    Args:
      rows: lines of ``metrics.jsonl``, in order.
      phases: in the order of the page.
    """
    steps = list(dict.fromkeys(step for row in rows for name in row if (step := step_of(name))))
    parts = {phase: [row for row in rows if row["phase"] == phase] for phase in phases}
    charts = {phase: _phase_charts(part, steps) for phase, part in parts.items()}
    return {phase: drawn for phase, drawn in charts.items() if drawn}


def _phase_charts(rows: Sequence[Mapping[str, Any]], steps: Sequence[str]) -> list[Chart]:
    names = dict.fromkeys(name for row in rows for name in row)
    charts = []
    for title, scalars in charts_of(names).items():
        size = math.ceil(len(rows) / MOST_POINTS)
        series = {name: points for name in scalars if (points := _points(rows, name, size))}
        if any(y for points in series.values() for _, y in points):
            charts.append(_chart(title, series, size, steps))
    return charts


def _points(rows: Sequence[Mapping[str, Any]], name: str, size: int) -> list[tuple[float, float]]:
    """(step, value) of a scalar: means of ``size`` rows in a row, at the last of them."""
    points = []
    for first in range(0, len(rows), size):
        part = [(row["step"], row[name]) for row in rows[first : first + size] if name in row]
        if known := [(step, value) for step, value in part if value is not None]:
            points.append((known[-1][0], float(np.mean([value for _, value in known]))))
    return points


def _colors(names: Sequence[str], steps: Sequence[str]) -> dict[str, int]:
    """A color for each line; where there are steps, the others take colors from the end."""
    by_step = {name: steps.index(step_of(name)) % COLORS for name in names if step_of(name)}
    others = [name for name in names if name not in by_step]
    order = range(COLORS - 1, -1, -1) if by_step else range(COLORS)
    return by_step | {name: order[n % COLORS] for n, name in enumerate(others)}


def _chart(
    title: str,
    series: Mapping[str, list[tuple[float, float]]],
    size: int,
    steps: Sequence[str],
) -> Chart:
    xs, ys = (np.array([p[axis] for line in series.values() for p in line]) for axis in (0, 1))
    x_low, x_high = _range(xs, 1.0)
    y_low, y_high = _range(ys, 0.1 * max(abs(float(ys.max())), 1e-9))
    margin = 0.06 * (y_high - y_low)
    y_low, y_high = y_low - margin, y_high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        left, top = LEFT + across * (WIDTH - LEFT - RIGHT), TOP + (1 - up) * (HEIGHT - TOP - BOTTOM)
        return round(left, 1), round(top, 1)

    lines, colors = [], _colors(list(series), steps)
    for name, points in series.items():
        places = [place(*point) for point in points]
        marked = zip(places, points, strict=True) if len(points) <= MOST_DOTS else ()
        lines.append(
            Line(
                name=name,
                color=colors[name],
                first=f"{points[0][1]:.4g}",
                last=f"{points[-1][1]:.4g}",
                path=Markup(" ".join(f"{x:g},{y:g}" for x, y in places)),
                dots=[(*xy, f"{name} {y:.4g} at {x:,g}") for xy, (x, y) in marked],
            )
        )
    return Chart(
        title=title,
        lines=lines,
        x_ticks=[(place(x, y_low)[0], f"{x:,g}") for x in ticks(x_low, x_high) if x == int(x)],
        y_ticks=[(place(x_low, y)[1], f"{y:g}") for y in ticks(y_low, y_high)],
        mean_of=size,
    )


def _range(values: np.ndarray, least: float) -> tuple[float, float]:
    """Smallest and largest value; apart, if they are equal."""
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - least, high + least)


def ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers in [low, high], which must not be a point."""
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]
