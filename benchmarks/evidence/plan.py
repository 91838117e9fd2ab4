"""What the evidence consists of: jobs, their order, folders, configs and learning rates.

Nothing here runs anything. A job is a config for ``she_jax.runs.run.run``, made of the recipe and
of what its arm changes in it, and a folder that it alone writes to.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from she_jax.training.workdir import Config

PLACES = {"examiner": "{examiner}", "scalar": "{scalar}"}  # in an arm's settings and stages
VALIDATION = "validation/macro_f1"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run.

    Attributes:
      kind: ``start``, ``examiner``, ``scalar`` or ``arm``.
      of: the start that it is or is trained for, or the arm.
      seed: of everything in it.
      rate: an arm's learning rate; None as long as it is not chosen.
      like: the arm on whose runs the rate is chosen, where it is None.
      needs: names of the jobs that must be done before.
      after: names of the jobs that must have ended before, well or not. An arm's that has a rate
        is done only if these show that the rate is worth trying, see ``worth_trying``.
    """

    kind: str
    of: str
    seed: int
    rate: float | None = None
    like: str = ""
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its folder below the evidence's."""
        if self.kind == "arm":
            rate = "rate" if self.rate is None else f"{self.rate:g}"
            return f"seed{self.seed}/{self.of}-{rate}"
        # The examiner reads text, so one serves all seeds. A scalar reward model reads the tokens
        # of its policy, and each seed has its own tokenizer.
        return f"{'' if self.kind == 'examiner' else f'seed{self.seed}/'}{self.kind}-{self.of}"


# -------------------------------------------------------------------------- the jobs


def plan(config: Config, names: Iterable[str]) -> list[Job]:
    """The jobs of some arms in the order in which they are to be started, each after what it needs.

    Raises:
      ValueError: if an arm refers to something that is not there.
    """
    jobs: dict[str, Job] = {}
    for arm in names:
        for seed in seeds(config, arm):
            for job in _jobs(config, arm, seed):
                jobs.setdefault(job.name, job)
    return list(jobs.values())


def arms(config: Config) -> list[str]:
    """The arms that are asked for, in order.

    Raises:
      ValueError: for a name that no arm has, an arm that the order leaves out, or one that is asked
        for and has no seeds.
    """
    only = [name.strip() for name in config.only.split(",") if name.strip()]
    lines = [arm for key in ("checks", "coverage") for _, own in config.plots[key] for arm in own]
    for key, names in {
        "order": config.order,
        "only": only,
        "against": [name for arm in config.arms.values() for name in arm.against],
        "plots": [*config.plots.curves, *config.plots.confusion, *lines],
    }.items():
        if unknown := [name for name in names if name not in config.arms]:
            raise ValueError(f"{key}: no arm is named {unknown[0]!r}; there are {config.order}")
    if absent := sorted(set(config.arms) - set(config.order)):
        raise ValueError(f"order: {absent[0]!r} is missing, and so would never be run")
    for name in only:
        if not config.arms[name].seeds:
            raise ValueError(
                f"only: {name!r} has no seeds in the plan; set --config.arms.{name}.seeds too"
            )
    return [name for name in config.order if not only or name in only]


def seeds(config: Config, arm: str) -> list[int]:
    """The seeds of an arm, none of one that is run only where more are asked for.

    Raises:
      ValueError: if it has more than there are.
    """
    count = config.arms[arm].seeds
    if not 0 <= count <= len(config.seeds):
        raise ValueError(f"arms.{arm}.seeds={count}: expected 0 to {len(config.seeds)}, of seeds")
    return list(config.seeds[:count])


def _jobs(config: Config, arm: str, seed: int) -> list[Job]:
    """What one seed of an arm takes: its start, reward models, rates to choose from, itself."""
    own, first = config.arms[arm], config.seeds[0]
    if own.start not in config.starts:
        raise ValueError(f"arms.{arm}.start={own.start!r}: expected one of {sorted(config.starts)}")
    start = Job(kind="start", of=own.start, seed=seed)
    if not own.trained:
        return [start]
    before = [start]
    for kind, at in (("examiner", first), ("scalar", seed)):
        if PLACES[kind] in flat(own.to_dict()).values():
            source = replace(start, seed=at)
            model = Job(kind=kind, of=own.start, seed=at, needs=(source.name,))
            before += [source, model]
    needs = tuple(dict.fromkeys(one.name for one in before))
    job = Job(kind="arm", of=arm, seed=seed, needs=needs)
    like = tuned_on(config, arm)
    if not like:
        return [*before, replace(job, rate=_own_rate(config, arm))]
    if (like, seed) == (arm, first):
        return [*before, *_grid(config, job)]
    grid = _jobs(config, like, first)
    tried = tuple(one.name for one in grid if one.of == like and one.kind == "arm")
    return [*grid, *before, replace(job, like=like, after=tried)]


def _grid(config: Config, job: Job) -> list[Job]:
    """A job with each of the rates, those in the middle first."""
    jobs = [replace(job, rate=rate) for rate in sorted(config.rates)]
    start, end = _middle(len(jobs))
    below = [
        replace(jobs[n], after=tuple(one.name for one in jobs[n + 1 : end])) for n in range(start)
    ]
    above = [
        replace(jobs[n], after=tuple(one.name for one in jobs[start:n]))
        for n in range(end, len(jobs))
    ]
    return [*jobs[start:end], *reversed(below), *above]


def _middle(count: int) -> tuple[int, int]:
    """Where the three middle ones of so many begin and end."""
    return max(count // 2 - 1, 0), min(count // 2 + 2, count)


def row(config: Config, arm: str, scores: Mapping[float, float]) -> Job:
    """The job of the first seed whose figures are the arm's, given what each rate reached.

    Its rate is None as long as none was tried; other seeds differ in the seed alone.
    """
    own = config.arms[arm]
    if not own.trained:
        return Job(kind="start", of=own.start, seed=config.seeds[0])
    job = Job(kind="arm", of=arm, seed=config.seeds[0])
    if not tuned_on(config, arm):
        return replace(job, rate=_own_rate(config, arm))
    return replace(job, rate=best_rate(scores)) if scores else job


def _own_rate(config: Config, arm: str) -> float:
    """Of an arm whose rate is not chosen."""
    settings = flat(config.arms[arm].settings.to_dict())
    return float(settings.get("rl.learning_rate", config.recipe.rl.learning_rate))


def tuned_on(config: Config, arm: str) -> str:
    """The arm on whose runs the rate of this one is chosen; "" where it is the recipe's.

    Raises:
      ValueError: if that arm's rate is not chosen, or there is nothing to choose from.
    """
    tuned = config.arms[arm].tuned
    if not tuned:
        return ""
    like = arm if tuned is True else tuned
    if like not in config.arms or config.arms[like].tuned is not True:
        raise ValueError(f"arms.{arm}.tuned={tuned!r}: expected an arm that is tuned itself")
    if not config.rates or len({f"{rate:g}" for rate in config.rates}) < len(config.rates):
        raise ValueError(f"rates={config.rates}: expected some learning rates, each another one")
    return like


# -------------------------------------------------------------------------- their configs


def job_config(config: Config, workdir: Path, job: Job) -> Config:
    """The config of a job whose rate is known; its seed is added to a reward model's own.

    Raises:
      ValueError: if the recipe has a seed of its own, or its arm or start changes a key that the
        recipe does not have.
    """
    if job.kind in ("examiner", "scalar"):
        own = _changed(config[job.kind], {"seed": config[job.kind].seed + job.seed}, job.kind)
        source = Job(kind="start", of=job.of, seed=job.seed)
        return _changed(own, {"checkpoint": str(workdir / source.name)}, job.kind)
    if config.recipe.seed or config.recipe.shopworld.seed:
        raise ValueError(
            f"recipe.seed={config.recipe.seed}, recipe.shopworld.seed="
            f"{config.recipe.shopworld.seed}: expected 0, they are those of seeds={config.seeds}"
        )
    seeded = {
        "seed": job.seed,
        "shopworld.seed": job.seed,
        "data.dir": str(workdir / "data"),  # a set has a folder of its own there
    }
    recipe = _changed(config.recipe, seeded, "recipe")
    start = job.of if job.kind == "start" else config.arms[job.of].start
    recipe = _changed(recipe, flat(config.starts[start].to_dict()), f"starts.{start}")
    if job.kind == "start":
        return _changed(recipe, {"rl.steps": 0}, "recipe")
    arm = config.arms[job.of]
    folders = {
        PLACES["examiner"]: Job(kind="examiner", of=start, seed=config.seeds[0]),
        PLACES["scalar"]: Job(kind="scalar", of=start, seed=job.seed),
    }

    def placed(changes: Config) -> dict[str, Any]:
        return {
            key: str(workdir / folders[value].name) if value in PLACES.values() else value
            for key, value in flat(changes.to_dict()).items()
        }

    begin = workdir / Job(kind="start", of=start, seed=job.seed).name / "checkpoints" / "sft"
    recipe = _changed(recipe, placed(arm.settings), f"arms.{job.of}.settings")
    recipe = _changed(recipe, {"start": str(begin), "rl.learning_rate": job.rate}, job.of)
    if not arm.stages:
        return recipe
    changes = {name: placed(own) for name, own in arm.stages.items()}
    return _staged(recipe, changes, job, config.recipe.rl.learning_rate)


def _staged(
    recipe: Config, changes: Mapping[str, dict[str, Any]], job: Job, usual: float
) -> Config:
    """A curriculum of stages, in the order of their names; ``usual`` is the recipe's own rate."""
    stages = {}
    for name, own in changes.items():
        if (key := "rl.learning_rate") in own:
            own[key] *= recipe.rl.learning_rate / usual
        stages[name] = _changed(recipe, own, f"arms.{job.of}.stages.{name}").to_dict()
        stages[name]["start"] = ""  # the one before's, but for the first
    stages[min(stages)]["start"] = recipe.start
    shared = {"seed": recipe.seed, "cpu_devices": recipe.cpu_devices}
    return ConfigDict({"kind": "curriculum", **shared, "stages": stages}).lock()


def _changed(config: Config, changes: Mapping[str, Any], where: str) -> Config:
    own = config.copy_and_resolve_references().lock()
    try:
        own.update_from_flattened_dict(changes)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: {error.args[0]}") from error
    return own


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


# -------------------------------------------------------------------------- what is there


def done(workdir: Path, job: Job) -> bool:
    """Whether a job whose rate is known has its figures."""
    return (workdir / job.name / "summary.json").is_file()


def metrics(folder: Path) -> list[list[dict[str, Any]]]:
    """The lines of ``metrics.jsonl``, of each stage where the run is a curriculum.

    Raises:
      FileNotFoundError: if there are none.
      ValueError: if a line is not JSON.
    """
    files = [folder / "metrics.jsonl"]
    if not files[0].is_file():
        files = sorted(folder.glob("*/metrics.jsonl"))
    if not files:
        raise FileNotFoundError(f"{folder} has no metrics.jsonl")
    return [_lines(file) for file in files]


def _lines(file: Path) -> list[dict[str, Any]]:
    lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    return lines


def reached(folder: Path) -> float | None:
    """The best macro F1 on the validation split that a run saw while it trained."""
    told = [line.get(VALIDATION) for own in metrics(folder) for line in own if line["step"]]
    return max((score for score in told if score is not None), default=None)


def tried(config: Config, workdir: Path, arm: str) -> dict[float, float]:
    """What each rate of an arm reached on the first seed, of the runs that are done.

    Raises:
      ValueError, OSError: if the metrics of a run cannot be read.
    """
    scores = {}
    for rate in sorted(config.rates):
        job = Job(kind="arm", of=arm, seed=config.seeds[0], rate=rate)
        if done(workdir, job) and (score := reached(workdir / job.name)) is not None:
            scores[rate] = score
    return scores


def worth_trying(config: Config, scores: Mapping[float, float]) -> list[float]:
    """The rates to try, given what some reached: three, and on to where the outermost was best."""
    rates = sorted(config.rates)
    start, end = _middle(len(rates))
    while inner := {rate: scores[rate] for rate in rates[start:end] if rate in scores}:
        best = best_rate(inner)
        if start and best == rates[start]:
            start -= 1
        elif end < len(rates) and best == rates[end - 1]:
            end += 1
        else:
            break
    return rates[start:end]


def best_rate(scores: Mapping[float, float]) -> float:
    """The rate that reached most; of equals the lowest."""
    return max(sorted(scores), key=lambda rate: scores[rate])
