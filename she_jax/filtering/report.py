"""The report of a filter: ``report.json``, and ``report.html`` with plots.

This module computes the numbers. ``she_jax.filtering.page`` renders the page.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64

from she_jax.filtering.page import page
from she_jax.filtering.records import PromptRecord, read_columns, read_records, read_step_names
from she_jax.filtering.select import DIFFICULTIES, REASONS, FilterConfig, Selection, Survey
from she_jax.filtering.select import difficulty as difficulty_of
from she_jax.training.files import write_json, write_text
from she_jax.types import UserError

EXAMPLES = 3  # pairs shown on the page for each reason, "kept" included
MOST_ROLLOUTS = 16  # up to this many rollouts per pair, the histogram has a bar per pass rate
BINS = 10  # bars of a histogram otherwise


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

    "Before" means all pairs with rollouts, "after" those of them that are kept. Means are over
    pairs with equal weights.

    Args:
      folder: the folder of the two files.
      survey: the survey of all recorded pairs.
      selection: the filter's decisions.
      config: the filter's thresholds and quotas.
      step_names: names of the S steps in the shards.
      duplicates: rows dropped before the rollouts, recorded or not; None without deduplication.
      shards: the files of ``she_jax.filtering.records`` behind the survey, in any order and split.

    Returns:
      The content of ``report.json``. The mean of an empty set is None.

    Raises:
      UserError: if the shards are not those of the survey, or have other steps.
    """
    reason = np.asarray(selection.reason)
    rates, examples = _read_shards(shards, survey, reason, step_names)
    unrecorded = () if duplicates is None else np.setdiff1d(duplicates, survey.row)
    report = _summarize(survey, selection, config, dict(zip(step_names, rates.T, strict=True)))
    report["unrecorded_duplicates"] = len(unrecorded)
    report["pairs"] += len(unrecorded)
    report["by_reason"]["duplicate"] += len(unrecorded)
    write_json(folder / "report.json", report)
    write_text(folder / "report.html", page(report, survey, config, examples))
    return report


def _read_shards(
    shards: Iterable[Path], survey: Survey, reason: Int[np.ndarray, "N"], names: Sequence[str]
) -> tuple[Float32[np.ndarray, "N S"], dict[str, list[tuple[int, PromptRecord]]]]:
    """The step pass rates of all pairs, and (index in the survey, record) examples by reason."""
    rates = np.full((len(survey.row), len(names)), np.nan, np.float32)
    seen = np.zeros(len(survey.row), bool)
    chosen = np.concatenate([_spaced(np.flatnonzero(reason == r)) for r in range(len(REASONS))])
    records: dict[int, PromptRecord] = {}
    for path in shards:
        if (shard_names := tuple(read_step_names(path))) != tuple(names):
            raise UserError(f"{path} has the steps {shard_names}, expected {tuple(names)}")
        table = read_columns(path, ["row", "step_rates"])
        rows = table["row"].to_numpy()
        indices = np.minimum(np.searchsorted(survey.row, rows), len(survey.row) - 1)
        if len(unknown := rows[survey.row[indices] != rows]):
            raise UserError(f"{path} has row {unknown[0]}, which the survey lacks: survey it too")
        seen[indices] = True
        flat = table["step_rates"].combine_chunks().flatten()  # every row has all steps
        rates[indices] = flat.to_numpy(zero_copy_only=False).reshape(len(rows), len(names))
        if np.isin(indices, chosen).any():
            index_of = {int(survey.row[n]): int(n) for n in chosen}
            records |= {index_of[r.row]: r for r in read_records(path) if r.row in index_of}
    if not seen.all():
        raise UserError(
            f"{np.sum(~seen)} of the survey's {len(seen)} pairs are in none of the shards, such as "
            f"row {survey.row[~seen][0]}: expected all shards that were surveyed"
        )
    examples: dict[str, list[tuple[int, PromptRecord]]] = {name: [] for name in REASONS}
    for n in sorted(records):
        examples[REASONS[reason[n]]].append((n, records[n]))
    return rates, examples


def _spaced(indices: Int[np.ndarray, "K"]) -> Int[np.ndarray, "E"]:
    """At most ``EXAMPLES`` of the indices, evenly spaced."""
    count = min(EXAMPLES, len(indices))
    return indices[(2 * np.arange(count) + 1) * len(indices) // max(2 * count, 1)]


def _summarize(
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
    top = math.log(max(rollouts.max(initial=0), 2))  # the entropy of n rollouts is at most ln n
    known = np.isfinite(survey.pass_rate)
    difficulty = np.full(len(known), -1)
    difficulty[known] = difficulty_of(survey.pass_rate[known])
    single_path = np.where(np.isfinite(survey.entropy), survey.entropy < 1e-6, np.nan)
    return {
        "pairs": len(reason),
        "kept": int(kept.sum()),
        "measured": _before_after(known, kept),
        "thresholds": {**dataclasses.asdict(config), "front": list(config.front)},
        "by_reason": _count_reasons(reason),
        "by_class": {
            label or "unknown": _cell_counts(reason[survey.label == k])
            for k, label in sorted(enumerate(survey.labels), key=lambda item: not item[1])
        },
        "by_kind": {
            kind: _cell_counts(reason[survey.kind == k]) for k, kind in enumerate(survey.kinds)
        },
        "difficulty": {
            name: _before_after(difficulty == k, kept) for k, name in enumerate(DIFFICULTIES)
        },
        "pass_rate": _means(survey.pass_rate, kept),
        "path_entropy": _means(survey.entropy, kept),
        "single_path": _means(single_path, kept),
        "distinct_2": _means(survey.distinct, kept),
        "step_pass_rates": {name: _means(rate, kept) for name, rate in step_rates.items()},
        "pass_rate_histogram": _histogram(survey.pass_rate, kept, low, high),
        "path_entropy_histogram": _histogram(
            survey.entropy, kept, top * np.arange(BINS) / BINS, top * np.arange(1, BINS + 1) / BINS
        ),
        "quotas": len(selection.quotas),
        "unmet_quotas": [dataclasses.asdict(quota) for quota in selection.unmet],
    }


def _count_reasons(reason: Int[np.ndarray, "K"]) -> dict[str, int]:
    counts = np.bincount(reason, minlength=len(REASONS)).tolist()
    return dict(zip(REASONS, counts, strict=True))


def _cell_counts(reason: Int[np.ndarray, "K"]) -> dict[str, Any]:
    counts = _count_reasons(reason)
    kept = counts.pop("kept")
    return {"kept": kept, "dropped": len(reason) - kept, "dropped_by_reason": counts}


def _before_after(mask: Bool[np.ndarray, "N"], kept: Bool[np.ndarray, "N"]) -> dict[str, int]:
    return {"before": int(mask.sum()), "after": int((mask & kept).sum())}


def _means(values: Float[np.ndarray, "N"], kept: Bool[np.ndarray, "N"]) -> dict[str, float | None]:
    """Means of the finite values before and after the filter, rounded; None if there are none."""
    known = np.isfinite(values)
    groups = {"before": values[known], "after": values[known & kept]}
    return {
        name: round(float(group.mean(dtype=np.float64)), 6) if len(group) else None
        for name, group in groups.items()
    }


def _histogram(
    values: Float[np.ndarray, "N"],
    kept: Bool[np.ndarray, "N"],
    low: Float[np.ndarray, "K"],
    high: Float[np.ndarray, "K"],
) -> dict[str, list]:
    """Counts of the finite values from each ``low`` up to the next one; the last bin is open."""
    known = np.isfinite(values)
    bins = np.searchsorted(low - 1e-6, values[known], side="right") - 1  # float32(0.7) < 0.7
    return {
        "from": low.round(6).tolist(),
        "to": high.round(6).tolist(),
        "before": np.bincount(bins, minlength=len(low)).tolist(),
        "after": np.bincount(bins[kept[known]], minlength=len(low)).tolist(),
    }
