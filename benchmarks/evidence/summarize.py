"""The results of the study: metrics of its runs by arm and seed, and comparisons of arms.

What is below ``paired_comparison`` takes plain dicts and reads no file.
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
    Config,
    arm_seeds,
    chosen_job,
    is_done,
    job_config,
    rate_scores,
    rates_to_try,
    read_metrics,
    tuned_on,
)

LAST = 10  # updates over which the entropy at the end is a mean
MEASURES = {
    "macro F1, test": ("test", "macro_f1"),
    "macro F1, long tail": ("longtail", "macro_f1"),
    "step accuracy, test": ("test", "steps"),
    "wrong reason, test": ("test", "right_for_wrong_reason"),
}
UPDATES = ("rl", "rft", "dpo")  # the phases after the cold start, in metrics.jsonl


# -------------------------------------------------------------------------- reading


def collect(config: Config, workdir: Path) -> dict[str, Any]:
    """The results of every arm and seed that is done, those that ``only`` leaves out as well.

    Returns:
      ``plots`` as in the config; ``arms``, name to title, table, the arms compared with it
      (``against``), number of checks, coverage, number of seeds ``planned``, ``rate``, the arm it
      is ``tuned_on``, the number of ``rates`` to try, ``tried`` (each of them to its score on the
      validation split) and ``seeds``, a seed to what ``read_run`` returns; ``bad``, what could not
      be read, and why.
    """
    bad: dict[str, str] = {}
    arms: dict[str, Any] = {}
    for name in config.order:
        spec = config.arms[name]
        rate_arm = tuned_on(config, name) if spec.trained else ""
        scores = _read(
            bad,
            f"the rates of {rate_arm}",
            lambda arm=rate_arm: rate_scores(config, workdir, arm) if arm else {},
        )
        first, runs = chosen_job(config, name, scores or {}), {}
        for seed in arm_seeds(config, name):
            job = replace(first, seed=seed)
            if (job.rate or job.kind == "start") and is_done(workdir, job):
                run = _read(bad, job.name, lambda job=job: read_run(workdir / job.name))
                runs |= {} if run is None else {str(seed): run}
        whole = job_config(config, workdir, replace(first, rate=first.rate or config.rates[0]))
        stage = next(iter(whole.stages.values())) if "stages" in whole else whole
        arms[name] = {
            "title": spec.title,
            "table": spec.table,
            "against": list(spec.against),
            "checks": stage.chain.checks,
            "coverage": stage.shopworld.coverage,
            "planned": len(arm_seeds(config, name)),
            "rate": first.rate,
            "tuned_on": rate_arm,
            "rates": len(rates_to_try(config, scores or {})) if rate_arm else 0,
            "tried": {f"{rate:g}": score for rate, score in (scores or {}).items()},
            "seeds": runs,
        }
    return {"plots": config.plots.to_dict(), "arms": arms, "bad": bad}


def _read(bad: dict[str, str], name: str, read: Callable[[], Any]) -> Any:
    """What ``read`` returns; None after an error, which is noted in ``bad`` under the name."""
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        bad[name] = f"{type(error).__name__}: {error}"
        return None


def read_run(folder: Path) -> dict[str, Any]:
    """The results of one run.

    Returns:
      ``test`` and ``longtail``, metrics as ``she_jax.evaluation.metrics.score`` has them, with
      ``steps``, the mean of the step accuracies (``longtail`` is None if it was not evaluated);
      ``entropy`` at the end; ``sampled_tokens``, ``trained_tokens`` and ``seconds`` of all
      updates and of the rollouts and rewards for them; ``curve`` and ``entropies``, [update, value]
      each. None stands for what the run does not have.

    Raises:
      OSError: if a file is missing.
      ValueError, KeyError, TypeError, AttributeError: if a file is not that of a run.
    """
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    updates, evals, passed = [], [], 0
    for part in read_metrics(folder):
        trained = [line for line in part if line["phase"] in ("sft", *UPDATES)]
        updates += [line | {"step": line["step"] + passed} for line in trained]
        evaluated = [line for line in part if line.get(VALIDATION) is not None]
        # A stage begins with what the one before ended with.
        evaluated = [line for line in evaluated if line["step"] or not passed]
        evals += [line | {"step": line["step"] + passed} for line in evaluated]
        passed += sum(line["phase"] in UPDATES for line in trained)  # the next stage counts on
    entropies = [
        [line["step"], line["entropy"]]
        for line in updates
        if line["phase"] in UPDATES and line.get("entropy") is not None
    ]
    sampled = [
        stage["sampled_tokens"]
        for stage in summary.get("stages", {"": summary}).values()
        if "sampled_tokens" in stage
    ]
    return {
        "test": _split_metrics(summary),
        "longtail": _split_metrics(summary["longtail"]) if "longtail" in summary else None,
        "checkpoint": summary.get("checkpoint"),
        "entropy": float(np.mean([value for _, value in entropies[-LAST:]])) if entropies else None,
        "sampled_tokens": sum(sampled) if sampled else None,
        "trained_tokens": sum(line.get("tokens", 0) for line in updates),
        "seconds": sum(line["time/step"] + line.get("time/preparation", 0) for line in updates),
        "curve": [[line["step"], line[VALIDATION]] for line in evals],
        "entropies": entropies,
    }


def _split_metrics(scored: Mapping[str, Any]) -> dict[str, Any]:
    names = ("macro_f1", "accuracy", "good_f1", "f1", "step_accuracy", "parse_rate", "confusion")
    metrics = {name: scored[name] for name in names}
    steps = list(metrics["step_accuracy"].values())
    return metrics | {
        "right_for_wrong_reason": scored.get("right_for_wrong_reason"),
        "steps": float(np.mean(steps)) if steps else None,
    }


# -------------------------------------------------------------------------- statistics


class PairedComparison(NamedTuple):
    """A paired comparison over ``n`` seeds.

    The interval and p are None for a single seed, and p also without any spread.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None


def paired_comparison(
    ours: Mapping[str, float], theirs: Mapping[str, float]
) -> PairedComparison | None:
    """Compares two arms by the seeds that both have; None without such a seed.

    d = ours - theirs, se = sd(d) / sqrt(n): the interval is mean(d) ± t(.975, n - 1) se, and p that
    of t = mean(d) / se, two-sided.

    Args:
      ours: seed to value.
      theirs: the same of the other arm.
    """
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    gaps = np.array([ours[seed] - theirs[seed] for seed in both])
    n, mean = len(gaps), float(gaps.mean())
    if n < 2:
        return PairedComparison(n, mean, None, None, None)
    error = float(gaps.std(ddof=1)) / math.sqrt(n)
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else None
    return PairedComparison(n, mean, mean - reach, mean + reach, p)


def by_seed(arm: Mapping[str, Any], *path: str) -> dict[str, float]:
    """Seed to one value of an arm, for the seeds that have it.

    Args:
      arm: as in the results.
      path: keys that lead from a run to the value.
    """
    values = {}
    for seed, run in arm["seeds"].items():
        value = run
        for key in path:
            value = None if value is None else value.get(key)
        if value is not None:
            values[seed] = float(value)
    return values


def compare_arms(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, PairedComparison]:
    """Compares two arms by each of ``MEASURES`` that both have on a common seed."""
    measured = {
        measure: paired_comparison(by_seed(ours, *path), by_seed(theirs, *path))
        for measure, path in MEASURES.items()
    }
    return {measure: gap for measure, gap in measured.items() if gap is not None}


def comparisons(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, PairedComparison]]]:
    """The comparisons of the plan: arm, to the arm it is compared with, to measure, to result."""
    by_arm: dict[str, dict[str, dict[str, PairedComparison]]] = {}
    for name, arm in results["arms"].items():
        for other in arm["against"]:
            ours = results["arms"].get(other)
            if ours is not None and (measured := compare_arms(ours, arm)):
                by_arm.setdefault(other, {})[name] = measured
    return by_arm


def plot_lines(
    results: Mapping[str, Any], axis: str
) -> list[tuple[str, dict[float, dict[str, Any]]]]:
    """The lines of a plot: title, and x to arm, of the arms that have results.

    Args:
      results: what ``collect`` returns.
      axis: ``checks`` or ``coverage``: the plot, and the arms' value that is x. A line of a single
        arm has it at every x of the other lines.
    """
    arms, lines = results["arms"], []
    for title, names in results["plots"][axis]:
        points = [arms[name] for name in names if arms.get(name, {}).get("seeds")]
        lines.append((title, {arm[axis]: arm for arm in sorted(points, key=lambda arm: arm[axis])}))
    single = {title for title, names in results["plots"][axis] if len(names) == 1}
    every_x = sorted({x for title, line in lines if title not in single for x in line})
    return [
        (title, dict.fromkeys(every_x, *line.values()) if title in single and line else line)
        for title, line in lines
    ]


def plot_leads(
    results: Mapping[str, Any], axis: str
) -> list[tuple[float, str, dict[str, PairedComparison]]]:
    """Compares the first line of a plot with the others: x, title of the other, measures."""
    lines = plot_lines(results, axis)
    return [
        (x, title, measured)
        for title, line in lines[1:]
        for x, arm in lines[0][1].items()
        if x in line and line[x] is not arm and (measured := compare_arms(arm, line[x]))
    ]
