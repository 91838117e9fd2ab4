"""What a filter leaves for people to read: ``report.json``, and a page with plots.

This is the arithmetic; ``she_jax.train.filter_page`` writes the page.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64

from she_jax.data.filtering import DIFFICULTIES, REASONS, FilterConfig, Selection, Survey
from she_jax.data.filtering import difficulty as difficulty_of
from she_jax.data.records import PromptRecord, read_columns, read_records, read_step_names
from she_jax.train.filter_page import page
from she_jax.train.report import write_json, write_text

EXAMPLES = 3  # pairs the page shows of what was kept, and of each reason to drop
MOST_ROLLOUTS = 16  # up to so many rollouts a pair, each pass rate has a bar of its own
BINS = 10


def write_filter_report(
    folder: Path,
    *,
    survey: Survey,
    selection: Selection,
    config: FilterConfig,
    step_names: Sequence[str],
    duplicates: Int64[np.ndarray, "M"] | None,
    shards: Sequence[Path],
) -> dict[str, Any]:
    """Writes ``report.json`` and ``report.html``; the same input gives the same bytes.

    "Before" is every pair with rollouts, "after" those of them that are kept. Means are over
    pairs, each pair counting once.

    Args:
      folder: where the two files go.
      survey: all recorded pairs.
      selection: what becomes of them.
      config: the thresholds behind it.
      step_names: the steps, S of them, as the shards name them.
      duplicates: rows that went before the rollouts, recorded or not; None if nobody looked.
      shards: the files of ``she_jax.data.records`` that were surveyed, in any order and split.

    Returns:
      What ``report.json`` holds. A mean of nothing is None.

    Raises:
      ValueError: if the shards are not those of the survey, or have other steps.
    """
    reason = np.asarray(selection.reason)
    rates, examples = _read(shards, survey, reason, step_names)
    absent = () if duplicates is None else np.setdiff1d(duplicates, survey.row)
    report = _figures(survey, selection, config, dict(zip(step_names, rates.T, strict=True)))
    report["unrecorded_duplicates"] = len(absent)
    report["pairs"] += len(absent)
    report["by_reason"]["duplicate"] += len(absent)
    write_json(folder / "report.json", report)
    write_text(folder / "report.html", page(report, survey, config, examples))
    return report


def _read(
    shards: Iterable[Path], survey: Survey, reason: Int[np.ndarray, "N"], names: Sequence[str]
) -> tuple[Float32[np.ndarray, "N S"], dict[str, list[tuple[int, PromptRecord]]]]:
    """Every pair's step pass rates, and some pairs of each fate with their place in the survey."""
    rates = np.full((len(survey.row), len(names)), np.nan, np.float32)
    seen = np.zeros(len(survey.row), bool)
    wanted = np.concatenate([_spread(np.flatnonzero(reason == r)) for r in range(len(REASONS))])
    found: dict[int, PromptRecord] = {}
    for path in shards:
        if (theirs := tuple(read_step_names(path))) != tuple(names):
            raise ValueError(f"{path} has the steps {theirs}, expected {tuple(names)}")
        table = read_columns(path, ["row", "step_rates"])
        rows = table["row"].to_numpy()
        at = np.minimum(np.searchsorted(survey.row, rows), len(survey.row) - 1)
        if len(lost := rows[survey.row[at] != rows]):
            raise ValueError(f"{path} has row {lost[0]}, which the survey lacks: survey it too")
        seen[at] = True
        flat = table["step_rates"].combine_chunks().flatten()  # every row has all steps
        rates[at] = flat.to_numpy(zero_copy_only=False).reshape(len(rows), len(names))
        if np.isin(at, wanted).any():
            places = {int(survey.row[n]): int(n) for n in wanted}
            found |= {places[r.row]: r for r in read_records(path) if r.row in places}
    if not seen.all():
        raise ValueError(
            f"{np.sum(~seen)} of the survey's {len(seen)} pairs are in none of the shards, such as "
            f"row {survey.row[~seen][0]}: expected all shards that were surveyed"
        )
    examples: dict[str, list[tuple[int, PromptRecord]]] = {name: [] for name in REASONS}
    for n in sorted(found):
        examples[REASONS[reason[n]]].append((n, found[n]))
    return rates, examples


def _spread(indices: Int[np.ndarray, "K"]) -> Int[np.ndarray, "E"]:
    """A few of them, evenly from first to last."""
    few = min(EXAMPLES, len(indices))
    return indices[(2 * np.arange(few) + 1) * len(indices) // max(2 * few, 1)]


def _figures(
    survey: Survey,
    selection: Selection,
    config: FilterConfig,
    step_rates: dict[str, Float32[np.ndarray, "N"]],
) -> dict[str, Any]:
    """The figures of ``report.json`` for the recorded pairs."""
    reason = np.asarray(selection.reason)
    kept = reason == REASONS.index("kept")
    rollouts = np.unique(survey.rollouts[survey.rollouts > 0])
    if len(rollouts) == 1 and rollouts[0] <= MOST_ROLLOUTS:
        low = high = np.arange(rollouts[0] + 1) / rollouts[0]
    else:
        low, high = np.arange(BINS) / BINS, np.arange(1, BINS + 1) / BINS
    top = math.log(max(rollouts.max(initial=0), 2))  # n rollouts have at most ln n nats
    known = np.isfinite(survey.pass_rate)
    hardness = np.full(len(known), -1)
    hardness[known] = difficulty_of(survey.pass_rate[known])
    single = np.where(np.isfinite(survey.entropy), survey.entropy < 1e-6, np.nan)
    return {
        "pairs": len(reason),
        "kept": int(kept.sum()),
        "measured": _both(known, kept),
        "thresholds": {**dataclasses.asdict(config), "front": list(config.front)},
        "by_reason": _by_reason(reason),
        "by_class": {
            str(c or "unknown"): _fates(reason[survey.label == c])
            for c in sorted(np.unique(survey.label), key=lambda c: (c == 0, c))
        },
        "by_kind": {name: _fates(reason[survey.kind == k]) for k, name in enumerate(survey.kinds)},
        "difficulty": {name: _both(hardness == k, kept) for k, name in enumerate(DIFFICULTIES)},
        "pass_rate": _means(survey.pass_rate, kept),
        "path_entropy": _means(survey.entropy, kept),
        "single_path": _means(single, kept),
        "distinct_2": _means(survey.distinct, kept),
        "step_pass_rates": {name: _means(rate, kept) for name, rate in step_rates.items()},
        "pass_rate_histogram": _histogram(survey.pass_rate, kept, low, high),
        "path_entropy_histogram": _histogram(
            survey.entropy, kept, top * np.arange(BINS) / BINS, top * np.arange(1, BINS + 1) / BINS
        ),
        "quotas": len(selection.quotas),
        "unmet_quotas": [dataclasses.asdict(quota) for quota in selection.unmet],
    }


def _by_reason(reason: Int[np.ndarray, "K"]) -> dict[str, int]:
    counts = np.bincount(reason, minlength=len(REASONS)).tolist()
    return dict(zip(REASONS, counts, strict=True))


def _fates(reason: Int[np.ndarray, "K"]) -> dict[str, Any]:
    counts = _by_reason(reason)
    kept = counts.pop("kept")
    return {"kept": kept, "dropped": len(reason) - kept, "dropped_by_reason": counts}


def _both(which: Bool[np.ndarray, "N"], kept: Bool[np.ndarray, "N"]) -> dict[str, int]:
    return {"before": int(which.sum()), "after": int((which & kept).sum())}


def _means(values: Float[np.ndarray, "N"], kept: Bool[np.ndarray, "N"]) -> dict[str, float | None]:
    """Mean over the pairs whose value is known, rounded; None where there are none."""
    known = np.isfinite(values)
    sides = {"before": values[known], "after": values[known & kept]}
    return {
        name: round(float(side.mean(dtype=np.float64)), 6) if len(side) else None
        for name, side in sides.items()
    }


def _histogram(
    values: Float[np.ndarray, "N"],
    kept: Bool[np.ndarray, "N"],
    low: Float[np.ndarray, "K"],
    high: Float[np.ndarray, "K"],
) -> dict[str, list]:
    """Counts of the known values from each ``low`` up to the next one; the last bin is open."""
    known = np.isfinite(values)
    bins = np.searchsorted(low - 1e-6, values[known], side="right") - 1  # 0.7 as float32 is less
    return {
        "from": low.round(6).tolist(),
        "to": high.round(6).tolist(),
        "before": np.bincount(bins, minlength=len(low)).tolist(),
        "after": np.bincount(bins[kept[known]], minlength=len(low)).tolist(),
    }
