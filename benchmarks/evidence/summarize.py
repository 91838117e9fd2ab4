"""The figures of the evidence: what its runs left, by arm and seed, and how arms compare.

What is below ``paired`` takes plain dicts and reads no file.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from benchmarks.evidence.plan import (
    VALIDATION,
    done,
    job_config,
    metrics,
    row,
    seeds,
    tried,
    tuned_on,
    worth_trying,
)
from she_jax.training.workdir import Config

LAST = 10  # updates over which the entropy at the end is a mean
MEASURES = {
    "macro F1, test": ("test", "macro_f1"),
    "macro F1, long tail": ("longtail", "macro_f1"),
    "step accuracy, test": ("test", "steps"),
    "wrong reason, test": ("test", "wrong_reason"),
}


# -------------------------------------------------------------------------- reading


def collect(config: Config, workdir: Path) -> dict[str, Any]:
    """The figures of every arm and seed that is done, those that ``only`` leaves out as well.

    Returns:
      ``plots`` as in the config; ``arms``, name to title, table, the arms it is held ``against``,
      number of checks, coverage, number of seeds ``planned``, ``rate``, the arm it is ``tuned_on``,
      how many ``rates`` are to be tried, ``tried`` (what each of them reached on the validation
      split) and ``seeds``, a seed to what ``read_run`` returns; ``bad``, what could not be read,
      and why.
    """
    bad: dict[str, str] = {}
    found: dict[str, Any] = {}
    for name in config.order:
        own = config.arms[name]
        like = tuned_on(config, name) if own.trained else ""
        scores = _read(
            bad, f"the rates of {like}", lambda a=like: tried(config, workdir, a) if a else {}
        )
        first, runs = row(config, name, scores or {}), {}
        for seed in seeds(config, name):
            job = replace(first, seed=seed)
            if (job.rate or job.kind == "start") and done(workdir, job):
                run = _read(bad, job.name, lambda job=job: read_run(workdir / job.name))
                runs |= {} if run is None else {str(seed): run}
        whole = job_config(config, workdir, replace(first, rate=first.rate or config.rates[0]))
        shown = next(iter(whole.stages.values())) if "stages" in whole else whole
        found[name] = {
            "title": own.title,
            "table": own.table,
            "against": list(own.against),
            "checks": shown.chain.checks,
            "coverage": shown.shopworld.coverage,
            "planned": len(seeds(config, name)),
            "rate": first.rate,
            "tuned_on": like,
            "rates": len(worth_trying(config, scores or {})) if like else 0,
            "tried": {f"{rate:g}": score for rate, score in (scores or {}).items()},
            "seeds": runs,
        }
    return {"plots": config.plots.to_dict(), "arms": found, "bad": bad}


def _read(bad: dict[str, str], name: str, read: Callable[[], Any]) -> Any:
    """What could be read; what could not is named among the bad ones, and stops no other."""
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        bad[name] = f"{type(error).__name__}: {error}"
        return None


def read_run(folder: Path) -> dict[str, Any]:
    """The figures of one run.

    Returns:
      ``test`` and ``longtail``, figures as ``she_jax.evaluation.metrics.score`` has them, with
      ``steps``, the mean of the step accuracies (``longtail`` is None where it was not judged);
      ``entropy`` at the end; ``sampled_tokens``, ``trained_tokens`` and ``seconds`` of all
      updates and what they learn from; ``curve`` and ``entropies``, [update, figure] each. None
      where there is none.

    Raises:
      OSError: if a file is missing.
      ValueError, KeyError, TypeError, AttributeError: if one is not what a run leaves.
    """
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    updates, evals, passed = [], [], 0
    for part in metrics(folder):
        own = [line for line in part if line["phase"] in ("sft", "srpo")]
        updates += [line | {"step": line["step"] + passed} for line in own]
        judgings = [line for line in part if line.get(VALIDATION) is not None]
        # A stage begins with what the one before ended with.
        judgings = [line for line in judgings if line["step"] or not passed]
        evals += [line | {"step": line["step"] + passed} for line in judgings]
        passed += sum(line["phase"] == "srpo" for line in own)  # a curriculum goes on counting
    entropies = [
        [line["step"], line["entropy"]]
        for line in updates
        if line["phase"] == "srpo" and line.get("entropy") is not None
    ]
    sampled = [
        one["sampled_tokens"]
        for one in summary.get("stages", {"": summary}).values()
        if "sampled_tokens" in one
    ]
    return {
        "test": _figures(summary),
        "longtail": _figures(summary["longtail"]) if "longtail" in summary else None,
        "checkpoint": summary.get("checkpoint"),
        "entropy": float(np.mean([value for _, value in entropies[-LAST:]])) if entropies else None,
        "sampled_tokens": sum(sampled) if sampled else None,
        "trained_tokens": sum(line.get("tokens", 0) for line in updates),
        "seconds": sum(line["time/step"] + line.get("time/lessons", 0) for line in updates),
        "curve": [[line["step"], line[VALIDATION]] for line in evals],
        "entropies": entropies,
    }


def _figures(scored: Mapping[str, Any]) -> dict[str, Any]:
    names = ("macro_f1", "accuracy", "good_f1", "f1", "step_accuracy", "parse_rate", "confusion")
    own = {name: scored[name] for name in names}
    steps = list(own["step_accuracy"].values())
    return own | {
        "wrong_reason": scored.get("wrong_reason"),
        "steps": float(np.mean(steps)) if steps else None,
    }


# -------------------------------------------------------------------------- statistics


class Paired(NamedTuple):
    """A paired comparison over ``n`` seeds; what takes two seeds, or a spread, may be None."""

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None


def paired(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Paired | None:
    """Compares two arms by the seeds that both have; None where there is no such seed.

    d = ours - theirs, se = sd(d) / sqrt(n): the interval is mean(d) ± t(.975, n - 1) se, and p that
    of t = mean(d) / se, two-sided.

    Args:
      ours: seed to figure.
      theirs: the same of the other arm.
    """
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    gaps = np.array([ours[seed] - theirs[seed] for seed in both])
    n, mean = len(gaps), float(gaps.mean())
    if n < 2:
        return Paired(n, mean, None, None, None)
    error = float(gaps.std(ddof=1)) / math.sqrt(n)
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else None
    return Paired(n, mean, mean - reach, mean + reach, p)


def by_seed(arm: Mapping[str, Any], *path: str) -> dict[str, float]:
    """Seed to one figure of an arm, where it has one."""
    values = {}
    for seed, run in arm["seeds"].items():
        value = run
        for key in path:
            value = None if value is None else value.get(key)
        if value is not None:
            values[seed] = float(value)
    return values


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Paired]:
    """Each of ``MEASURES`` of an arm against another's, as far as both have it."""
    found = {
        measure: paired(by_seed(ours, *path), by_seed(theirs, *path))
        for measure, path in MEASURES.items()
    }
    return {measure: one for measure, one in found.items() if one is not None}


def comparisons(found: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Paired]]]:
    """Arms that others are held against, each with those others, as far as there are figures."""
    every: dict[str, dict[str, dict[str, Paired]]] = {}
    for name, arm in found["arms"].items():
        for other in arm["against"]:
            ours = found["arms"].get(other)
            if ours is not None and (own := compare(ours, arm)):
                every.setdefault(other, {})[name] = own
    return every


def lines(found: Mapping[str, Any], axis: str) -> list[tuple[str, dict[float, dict[str, Any]]]]:
    """The lines of a plot: title, and place to arm, of the arms that have figures.

    Args:
      found: what ``collect`` returns.
      axis: ``checks`` or ``coverage``, a plot and what places an arm in it. A line for which the
        config names one arm alone has it at every place of the others.
    """
    every, drawn = found["arms"], []
    for title, names in found["plots"][axis]:
        own = [every[name] for name in names if every.get(name, {}).get("seeds")]
        drawn.append((title, {arm[axis]: arm for arm in sorted(own, key=lambda arm: arm[axis])}))
    alone = {title for title, names in found["plots"][axis] if len(names) == 1}
    places = sorted({place for title, line in drawn if title not in alone for place in line})
    return [
        (title, dict.fromkeys(places, *line.values()) if title in alone and line else line)
        for title, line in drawn
    ]


def leads(found: Mapping[str, Any], axis: str) -> list[tuple[float, str, dict[str, Paired]]]:
    """The first line of a plot against the others: place, title of the other, comparison."""
    drawn = lines(found, axis)
    return [
        (place, title, own)
        for title, line in drawn[1:]
        for place, arm in drawn[0][1].items()
        if place in line and line[place] is not arm and (own := compare(arm, line[place]))
    ]
