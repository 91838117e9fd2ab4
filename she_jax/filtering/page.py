"""The HTML page of a filter report: headline figures, plots, tables and examples.

The page is self-contained: no scripts, nothing from the network. Text from a model or a data set is
escaped, including control, bidirectional and other invisible characters.
"""

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from she_jax.filtering.records import PromptRecord
from she_jax.filtering.select import REASONS, FilterConfig, Survey
from she_jax.training.files import printable

LONGEST = 1500  # characters of a text shown on the page
MOST_ROWS = 40  # rows of a table
MOST_BARS = 12  # bars of a plot
BEFORE, AFTER, DROPPED, RANGE = "#c3c9d0", "#1f5f9e", "#b4602a", "#eef3e6"
STYLE = {
    "svg.hashsalt": "she_jax",  # the same plot has the same bytes
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2329; background: #fff; margin: 0 auto;
  max-width: 62rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0.5rem 0 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 0.5rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 0.2rem; } p { margin: 0.4rem 0; }
.quiet { color: #5a646e; font-size: 0.9rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.figures div { flex: 1 1 9.5rem; }
img { width: 29rem; max-width: 100%; height: auto; margin: 0.5rem 0; vertical-align: top; }
.figures div { border-left: 3px solid #1f5f9e; padding-left: 0.7rem; }
.figures b { display: block; font-size: 1.15rem; white-space: nowrap; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.25rem 1.2rem 0.25rem 0; text-align: right; border-bottom: 1px solid #dde1e5;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; vertical-align: top; }
th { color: #5a646e; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
article { border: 1px solid #dde1e5; border-radius: 6px; padding: 0.6rem 0.9rem; margin: 0.6rem 0; }
pre { white-space: pre-wrap; background: #f5f6f8; padding: 0.5rem 0.7rem; margin: 0.3rem 0 0.7rem;
  font-size: 0.85rem; border-radius: 4px; } bdi { unicode-bidi: isolate; }
"""


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
    descriptions = _describe_reasons(config)
    with style.context(["default", STYLE]):  # independent of the user's matplotlib settings
        plots = _plots(report)
    reason_rows = [
        (f"{name.replace('_', ' ')}: {descriptions[name]}", f"{count:,}")
        for name, count in report["by_reason"].items()
        if count
    ]
    parts = [
        "<h1>Filter report</h1>",
        '<p class="quiet">Before: every pair with rollouts. After: those of them that are kept. '
        "Means are over pairs.</p>",
        _headline(report),
        "<h2>Before and after</h2>",
        "\n".join(plots),
        _table(("mean over pairs", "before", "after"), _mean_rows(report)),
        "<h2>What became of the pairs</h2>",
        _table(("", "pairs"), reason_rows),
        "<h3>By class (1 irrelevant to 4 excellent)</h3>",
        _cell_table("class", report["by_class"]),
        "<h3>By kind of query</h3>",
        _cell_table("kind", report["by_kind"]),
        "<h2>Quotas that could not be met</h2>",
        _unmet_quotas(report),
        "<h2>Thresholds and quotas of this filter</h2>",
        _table(("", "value"), [(k, _format(v)) for k, v in report["thresholds"].items()]),
        "<h2>Examples</h2>",
    ]
    if unrecorded := report["unrecorded_duplicates"]:
        position = parts.index("<h3>By class (1 irrelevant to 4 excellent)</h3>")
        text = "Near-duplicates dropped unrecorded, so in no class, kind or example below"
        parts.insert(position, f'<p class="quiet">{text}: {unrecorded:,}.</p>')
    for name, records in examples.items():
        if records:
            title = f"{name.replace('_', ' ').capitalize()}: {_escape(descriptions[name])}"
            parts.append(f"<h3>{title}</h3>")
            parts += [_example(survey, n, record) for n, record in records]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<title>Filter report</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<style>{CSS}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
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


def _headline(report: dict[str, Any]) -> str:
    def change(name: str) -> str:
        return " → ".join(_format(report[name][side]) for side in ("before", "after"))

    figures = [
        (f"{report['pairs']:,}", "pairs"),
        (f"{report['kept']:,}", f"kept ({report['kept'] / report['pairs']:.1%})"),
        (change("pass_rate"), "mean pass rate, before → after"),
        (change("path_entropy"), "mean path entropy in nats, before → after"),
        (change("single_path"), "share of pairs with one path only, before → after"),
    ]
    cells = "".join(f"<div><b>{value}</b>{title}</div>" for value, title in figures)
    return f'<div class="figures">{cells}</div>'


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


def _cell_table(title: str, cells: dict[str, dict[str, Any]]) -> str:
    names = [r for r in REASONS[1:] if any(cell["dropped_by_reason"][r] for cell in cells.values())]
    rows = [
        [name or "(none)"]
        + [f"{n:,}" for n in (cell["kept"], cell["dropped"])]
        + [f"{cell['dropped_by_reason'][r]:,}" for r in names]
        for name, cell in _largest(cells, MOST_ROWS).items()
    ]
    rest = len(cells) - len(rows)
    note = f'<p class="quiet">{rest:,} smaller ones are in report.json.</p>' if rest else ""
    return _table((title, "kept", "dropped", *(r.replace("_", " ") for r in names)), rows) + note


def _largest(cells: dict[str, dict[str, Any]], count: int) -> dict[str, dict[str, Any]]:
    """The ``count`` cells with the most pairs, in the given order."""
    sizes = Counter({name: cell["kept"] + cell["dropped"] for name, cell in cells.items()})
    names = {name for name, _ in sizes.most_common(count)}
    return {name: cell for name, cell in cells.items() if name in names}


def _unmet_quotas(report: dict[str, Any]) -> str:
    if not report["quotas"]:
        return "<p>No size was configured, so there were no quotas.</p>"
    unmet = report["unmet_quotas"]
    if not unmet:
        return f"<p>None: all {report['quotas']:,} were met.</p>"
    rows = [
        (cell["cell"], *(f"{cell[k]:,}" for k in ("wanted", "available", "kept")))
        for cell in unmet[:MOST_ROWS]
    ]
    rest = len(unmet) - len(rows)
    note = f'<p class="quiet">{rest:,} more are in report.json.</p>' if rest else ""
    return _table(("cell", "wanted", "available", "kept"), rows) + note


def _example(survey: Survey, n: int, record: PromptRecord) -> str:
    label = "no label" if record.label is None else f"class {record.label}"
    facts = [label, record.kind or "no kind", f"row {record.row}", record.uid]
    if record.confidence is not None:
        facts.append(f"confidence {record.confidence:.3f}")
    if record.right:
        facts.append(f"{sum(record.right)} of {len(record.right)} rollouts right")
        facts.append(f"path entropy {survey.entropy[n]:.3f} nats")
    path_counts = sorted(Counter(record.paths).items(), key=lambda item: (-item[1], item[0]))
    lines = [
        f"<p><b><bdi>{_escape(record.query)}</bdi></b><br><bdi>{_escape(record.title)}</bdi></p>",
        f'<p class="quiet">{" · ".join(f"<bdi>{_escape(fact)}</bdi>" for fact in facts)}</p>',
    ]
    if path_counts:
        paths = [f"{n} × <code><bdi>{_escape(path)}</bdi></code>" for path, n in path_counts]
        lines.append(f"<p>{', '.join(paths)}</p>")
    if rollouts := _contrasting_rollouts(record):
        lines.append(f"<details><summary>{len(rollouts)} of its rollouts</summary>")
        for g in rollouts:
            text = "\n".join(_escape(line) for line in record.texts[g][:LONGEST].split("\n"))
            ellipsis = " ..." if len(record.texts[g]) > LONGEST else ""
            outcome = "right" if record.right[g] else "wrong"
            lines.append(f'<p class="quiet">{outcome}</p><pre>{text}{ellipsis}</pre>')
        lines.append("</details>")
    return f"<article>{''.join(lines)}</article>"


def _contrasting_rollouts(record: PromptRecord) -> list[int]:
    """The first rollout and the first that differs in outcome, else in path, else in text."""
    for values in (record.right, record.paths, record.texts):
        if others := [g for g, value in enumerate(values) if value != values[0]]:
            return [0, others[0]]
    return [0] if record.texts else []


def _plots(report: dict[str, Any]) -> list[str]:
    """The plots as inline images with alternative texts."""
    figures = [_plot_reasons(report)]
    if any(report["pass_rate_histogram"]["before"]):
        figures += [_plot_pass_rates(report), _plot_entropies(report)]
    figures += [
        _plot_cells(report["by_class"], "Pairs by class"),
        _plot_cells(report["by_kind"], "Pairs by kind of query"),
    ]
    return [_img_tag(figure) for figure in figures]


def _img_tag(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    alt = html.escape(figure.get_suptitle())
    return f'<img src="data:image/svg+xml;base64,{data}" alt="Plot: {alt}">'


def _new_figure(title: str, height: float) -> Figure:
    figure = Figure(figsize=(5, height))
    figure.suptitle(title, x=0.01, horizontalalignment="left")
    return figure


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
    figure = _new_figure(title, 3.4)
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
    largest = list(_largest(cells, MOST_BARS).items())
    kept = sum(cell["kept"] for cell in cells.values())
    pairs = kept + sum(cell["dropped"] for cell in cells.values())
    before = [100 * (cell["kept"] + cell["dropped"]) / pairs for _, cell in largest]
    after = [100 * cell["kept"] / max(kept, 1) for _, cell in largest]
    if len(largest) < len(cells):
        title += f": the {len(largest)} largest of {len(cells)}"
    figure = _new_figure(title, 1.5 + 0.32 * len(largest))
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
    figure = _new_figure(f"What became of the {report['pairs']:,} pairs", 1.4 + 0.3 * len(counts))
    axes = figure.add_subplot(xlabel="pairs")
    bars = axes.barh(
        [name for name, _ in counts],
        [n for _, n in counts],
        color=[AFTER if name == "kept" else DROPPED for name, _ in counts],
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


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    body = "".join(
        f"<tr>{''.join(f'<td><bdi>{_escape(cell)}</bdi></td>' for cell in row)}</tr>"
        for row in rows
    )
    header = "".join(f"<th>{_escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><tr>{header}</tr>{body}</table></div>'


def _format(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _escape(text: str) -> str:
    """The text, escaped and cut, as HTML."""
    return html.escape(printable(text, LONGEST))
