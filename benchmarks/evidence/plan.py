"""The plan of the study: its jobs in order, their folders, configs and learning rates.

Nothing here runs anything. A job is a config for ``she_jax.runs.run.run``, made of the recipe and
of what its arm changes in it, and a folder that it alone writes to.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from she_jax.types import UserError

# A ConfigDict. Its attributes are typed as a union of everything, which no type checker can follow.
Config: TypeAlias = Any

# Stand for the folders of reward models in an arm's settings and stages.
PLACEHOLDERS = {"prm": "{prm}", "orm": "{orm}"}
VALIDATION = "validation/macro_f1"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run.

    Attributes:
      kind: ``start``, ``prm``, ``orm`` or ``arm``.
      target: name of the arm, or of the cold start that is trained or that a reward model is for.
      seed: of everything in it.
      rate: an arm's learning rate; None until it is chosen.
      rate_arm: the arm on whose runs the rate is chosen, if it is None.
      needs: names of the jobs that must be done before.
      after: names of the jobs that must have ended before, with or without success. An arm's job
        with a rate is run only if their scores make the rate worth trying, see ``rates_to_try``.
    """

    kind: str
    target: str
    seed: int
    rate: float | None = None
    rate_arm: str = ""
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its folder within the study's."""
        if self.kind == "arm":
            rate = "rate" if self.rate is None else f"{self.rate:g}"
            return f"seed{self.seed}/{self.target}-{rate}"
        # A process reward model reads text, so one serves all seeds. An outcome reward model reads
        # the tokens of its policy, and each seed has its own tokenizer.
        prefix = "" if self.kind == "prm" else f"seed{self.seed}/"
        return f"{prefix}{self.kind}-{self.target}"


# -------------------------------------------------------------------------- the jobs


def plan_jobs(config: Config, arms: Iterable[str]) -> list[Job]:
    """The jobs of some arms in the order in which they are started, each after what it needs.

    Raises:
      ValueError: if an arm refers to something that does not exist.
    """
    jobs: dict[str, Job] = {}
    for arm in arms:
        for seed in arm_seeds(config, arm):
            for job in _seed_jobs(config, arm, seed):
                jobs.setdefault(job.name, job)
    return list(jobs.values())


def selected_arms(config: Config) -> list[str]:
    """The arms that ``only`` selects, in order.

    Raises:
      ValueError: for a name that no arm has, an arm missing from the order, or a selected one
        without seeds.
    """
    only = [name.strip() for name in config.only.split(",") if name.strip()]
    points = [
        arm for key in ("checks", "coverage") for _, arms in config.plots[key] for arm in arms
    ]
    for key, names in {
        "order": config.order,
        "only": only,
        "against": [name for arm in config.arms.values() for name in arm.against],
        "plots": [*config.plots.curves, *config.plots.confusion, *points],
    }.items():
        if unknown := [name for name in names if name not in config.arms]:
            raise UserError(f"{key}: no arm is named {unknown[0]!r}; there are {config.order}")
    if absent := sorted(set(config.arms) - set(config.order)):
        raise UserError(f"order: {absent[0]!r} is missing, and so would never be run")
    for name in only:
        if not config.arms[name].seeds:
            raise UserError(
                f"only: {name!r} has no seeds in the plan; set --config.arms.{name}.seeds too"
            )
    return [name for name in config.order if not only or name in only]


def arm_seeds(config: Config, arm: str) -> list[int]:
    """The seeds that an arm is run with; none for an arm that is run on request only.

    Raises:
      ValueError: if it has more than there are.
    """
    count = config.arms[arm].seeds
    if not 0 <= count <= len(config.seeds):
        raise UserError(f"arms.{arm}.seeds={count}: expected 0 to {len(config.seeds)}, of seeds")
    return list(config.seeds[:count])


def _seed_jobs(config: Config, arm: str, seed: int) -> list[Job]:
    """The jobs of one seed of an arm: cold start, reward models, rates to try, the arm itself."""
    spec, first = config.arms[arm], config.seeds[0]
    if spec.start not in config.starts:
        raise UserError(f"arms.{arm}.start={spec.start!r}: expected one of {sorted(config.starts)}")
    start = Job(kind="start", target=spec.start, seed=seed)
    if not spec.trained:
        return [start]
    required = [start]
    for kind, model_seed in (("prm", first), ("orm", seed)):
        if PLACEHOLDERS[kind] in flatten(spec.to_dict()).values():
            policy = replace(start, seed=model_seed)
            model = Job(kind=kind, target=spec.start, seed=model_seed, needs=(policy.name,))
            required += [policy, model]
    needs = tuple(dict.fromkeys(job.name for job in required))
    job = Job(kind="arm", target=arm, seed=seed, needs=needs)
    rate_arm = tuned_on(config, arm)
    if not rate_arm:
        return [*required, replace(job, rate=_fixed_rate(config, arm))]
    if (rate_arm, seed) == (arm, first):
        return [*required, *_rate_jobs(config, job)]
    tuning = _seed_jobs(config, rate_arm, first)
    trials = tuple(job.name for job in tuning if job.kind == "arm" and job.target == rate_arm)
    return [*tuning, *required, replace(job, rate_arm=rate_arm, after=trials)]


def _rate_jobs(config: Config, job: Job) -> list[Job]:
    """A job with each of the rates, those in the middle first."""
    jobs = [replace(job, rate=rate) for rate in sorted(config.rates)]
    start, end = _middle(len(jobs))
    below = [
        replace(jobs[n], after=tuple(inner.name for inner in jobs[n + 1 : end]))
        for n in range(start)
    ]
    above = [
        replace(jobs[n], after=tuple(inner.name for inner in jobs[start:n]))
        for n in range(end, len(jobs))
    ]
    return [*jobs[start:end], *reversed(below), *above]


def _middle(count: int) -> tuple[int, int]:
    """Begin and end of the three in the middle of ``count`` items."""
    return max(count // 2 - 1, 0), min(count // 2 + 2, count)


def chosen_job(config: Config, arm: str, scores: Mapping[float, float]) -> Job:
    """The job whose metrics are the arm's on the first seed; other seeds differ in the seed alone.

    Args:
      config: of the study.
      arm: its name.
      scores: each rate that was tried to its score; without any the job's rate is None.
    """
    spec = config.arms[arm]
    if not spec.trained:
        return Job(kind="start", target=spec.start, seed=config.seeds[0])
    job = Job(kind="arm", target=arm, seed=config.seeds[0])
    if not tuned_on(config, arm):
        return replace(job, rate=_fixed_rate(config, arm))
    return replace(job, rate=best_rate(scores)) if scores else job


def _fixed_rate(config: Config, arm: str) -> float:
    """The learning rate of an arm that is not tuned: its settings', or the recipe's."""
    settings = flatten(config.arms[arm].settings.to_dict())
    return float(settings.get("rl.learning_rate", config.recipe.rl.learning_rate))


def tuned_on(config: Config, arm: str) -> str:
    """The arm on whose runs the learning rate of this one is chosen; "" for an arm not tuned.

    Raises:
      ValueError: if that arm's rate is not chosen, or there is nothing to choose from.
    """
    tuned = config.arms[arm].tuned
    if not tuned:
        return ""
    rate_arm = arm if tuned is True else tuned
    if rate_arm not in config.arms or config.arms[rate_arm].tuned is not True:
        raise UserError(f"arms.{arm}.tuned={tuned!r}: expected an arm that is tuned itself")
    if not config.rates or len({f"{rate:g}" for rate in config.rates}) < len(config.rates):
        raise UserError(f"rates={config.rates}: expected some learning rates, all different")
    return rate_arm


# -------------------------------------------------------------------------- configs of the jobs


def job_config(config: Config, workdir: Path, job: Job) -> Config:
    """The config of a job whose rate is known.

    The seed of a reward model is the job's plus that of its own config.

    Raises:
      ValueError: if the recipe has a seed, or its arm or start changes a key that the recipe does
        not have.
    """
    if job.kind in ("prm", "orm"):
        policy = Job(kind="start", target=job.target, seed=job.seed)
        changes = {
            "seed": config[job.kind].seed + job.seed,
            "checkpoint": str(workdir / policy.name),
        }
        return _changed(config[job.kind], changes, job.kind)
    if config.recipe.seed or config.recipe.shopworld.seed:
        raise UserError(
            f"recipe.seed={config.recipe.seed}, recipe.shopworld.seed="
            f"{config.recipe.shopworld.seed}: expected 0, they are those of seeds={config.seeds}"
        )
    seeded = {
        "seed": job.seed,
        "shopworld.seed": job.seed,
        "data.dir": str(workdir / "data"),  # each data set has its own folder there
    }
    recipe = _changed(config.recipe, seeded, "recipe")
    start = job.target if job.kind == "start" else config.arms[job.target].start
    recipe = _changed(recipe, flatten(config.starts[start].to_dict()), f"starts.{start}")
    if job.kind == "start":
        return _changed(recipe, {"rl.steps": 0}, "recipe")
    arm = config.arms[job.target]
    folders = {
        PLACEHOLDERS["prm"]: Job(kind="prm", target=start, seed=config.seeds[0]),
        PLACEHOLDERS["orm"]: Job(kind="orm", target=start, seed=job.seed),
    }

    def resolved(changes: Config) -> dict[str, Any]:
        return {
            key: str(workdir / folders[value].name) if value in PLACEHOLDERS.values() else value
            for key, value in flatten(changes.to_dict()).items()
        }

    cold_start = Job(kind="start", target=start, seed=job.seed)
    checkpoint = workdir / cold_start.name / "checkpoints" / "sft"
    recipe = _changed(recipe, resolved(arm.settings), f"arms.{job.target}.settings")
    start_from = {"init_from": str(checkpoint), "rl.learning_rate": job.rate}
    recipe = _changed(recipe, start_from, job.target)
    if not arm.stages:
        return recipe
    stages = {name: resolved(changes) for name, changes in arm.stages.items()}
    return _curriculum(recipe, stages, job, config.recipe.rl.learning_rate)


def _curriculum(
    recipe: Config, changes: Mapping[str, dict[str, Any]], job: Job, recipe_rate: float
) -> Config:
    """A curriculum of stages, in the order of their names.

    Args:
      recipe: of the arm, with the chosen rate.
      changes: what each stage changes in it.
      job: the arm's.
      recipe_rate: the learning rate for which those of the stages are given.
    """
    stages = {}
    for name, flat in changes.items():
        if (key := "rl.learning_rate") in flat:
            flat[key] *= recipe.rl.learning_rate / recipe_rate
        stages[name] = _changed(recipe, flat, f"arms.{job.target}.stages.{name}").to_dict()
        stages[name]["init_from"] = ""  # the stage before, except for the first one
    stages[min(stages)]["init_from"] = recipe.init_from
    shared = {"seed": recipe.seed, "cpu_devices": recipe.cpu_devices}
    return ConfigDict({"kind": "curriculum", **shared, "stages": stages}).lock()


def _changed(config: Config, changes: Mapping[str, Any], origin: str) -> Config:
    """A locked copy with some keys changed; ``origin`` names the changes in an error's message."""
    copy = config.copy_and_resolve_references().lock()
    try:
        copy.update_from_flattened_dict(changes)
    except (KeyError, TypeError) as error:
        raise UserError(f"{origin}: {error.args[0]}") from error
    return copy


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


# -------------------------------------------------------------------------- what has been run


def is_done(workdir: Path, job: Job) -> bool:
    """Whether a job whose rate is known has written its summary."""
    return (workdir / job.name / "summary.json").is_file()


def read_metrics(folder: Path) -> list[list[dict[str, Any]]]:
    """The lines of ``metrics.jsonl``, one list a run: several for the stages of a curriculum.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a line is not JSON.
    """
    files = [folder / "metrics.jsonl"]
    if not files[0].is_file():
        files = sorted(folder.glob("*/metrics.jsonl"))
    if not files:
        raise FileNotFoundError(f"{folder} has no metrics.jsonl")
    return [_read_lines(file) for file in files]


def _read_lines(file: Path) -> list[dict[str, Any]]:
    lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}") from error
    return lines


def best_score(folder: Path) -> float | None:
    """The best macro F1 on the validation split during a run's training; None without any."""
    lines = [line for part in read_metrics(folder) for line in part if line["step"]]
    scores = [line[VALIDATION] for line in lines if line.get(VALIDATION) is not None]
    return max(scores, default=None)


def rate_scores(config: Config, workdir: Path, arm: str) -> dict[float, float]:
    """Learning rate to ``best_score`` on the first seed, of the arm's runs that are done.

    Raises:
      ValueError, OSError: if the metrics of a run cannot be read.
    """
    scores = {}
    for rate in sorted(config.rates):
        job = Job(kind="arm", target=arm, seed=config.seeds[0], rate=rate)
        if is_done(workdir, job) and (score := best_score(workdir / job.name)) is not None:
            scores[rate] = score
    return scores


def rates_to_try(config: Config, scores: Mapping[float, float]) -> list[float]:
    """The three rates in the middle, and further ones as long as the outermost is the best.

    Args:
      config: of the study, with its ``rates``.
      scores: those known so far, by rate.
    """
    rates = sorted(config.rates)
    start, end = _middle(len(rates))
    while known := {rate: scores[rate] for rate in rates[start:end] if rate in scores}:
        best = best_rate(known)
        if start and best == rates[start]:
            start -= 1
        elif end < len(rates) and best == rates[end - 1]:
            end += 1
        else:
            break
    return rates[start:end]


def best_rate(scores: Mapping[float, float]) -> float:
    """The rate with the highest score; of several the lowest."""
    return max(sorted(scores), key=lambda rate: scores[rate])
