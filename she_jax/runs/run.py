"""Runs a recipe: the kind of run decides what is called."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from she_jax.runs.annotate import annotate, complete
from she_jax.runs.check import check
from she_jax.runs.config import Recipe, inherit, parse
from she_jax.runs.curriculum import run_prerequisite, run_stages
from she_jax.runs.filter import filter_run
from she_jax.runs.outcome_reward import train_orm
from she_jax.runs.plugins import record_plugins
from she_jax.runs.policy import train
from she_jax.runs.predict import predict
from she_jax.runs.process_reward import train_prm
from she_jax.runs.resolve import resolve
from she_jax.runs.validate import validate
from she_jax.training.workdir import check_local, claim_workdir, lock_workdir
from she_jax.types import UserError

KINDS = (
    "train",
    "check",
    "time",
    "curriculum",
    "filter",
    "evaluate",
    "annotate",
    "reward_model",
    "scalar_reward",
)


def run(recipe: Recipe, workdir: Path) -> None:
    """Does what a recipe says, or resumes an earlier run of it.

    Args:
      recipe: a ``ConfigDict`` of ``she_jax.recipes``.
      workdir: the run's folder.

    Raises:
      UserError: for a recipe that cannot be run, or a folder of another one.
      SystemExit: after a signal, once the state is saved.
    """
    check_local(recipe.to_dict(), workdir)
    if jax.process_count() > 1:
        raise UserError(
            f"{jax.process_count()} processes: a run on several hosts is not supported yet; start "
            "it on one host"
        )
    if recipe.kind not in KINDS:
        raise UserError(f"kind={recipe.kind!r}: expected one of {KINDS}")
    if recipe.kind == "curriculum":
        run_stages(recipe, workdir, run)
        return
    if recipe.kind in ("reward_model", "scalar_reward", "filter"):
        recipe = inherit(recipe)
    if recipe.kind == "annotate":
        recipe = complete(recipe)
    recipe = resolve(recipe, workdir)
    if recipe.get("prerequisite") and recipe.init_from:
        run_prerequisite(recipe, workdir, run)
    config = parse(recipe, workdir)
    validate(config)
    claim_workdir(workdir, config.recipe)
    record_plugins(workdir, config.plugins)
    runs: dict[str, Callable[[Any, Path], None]] = {
        "train": train,
        "check": check,
        "time": check,
        "filter": filter_run,
        "evaluate": predict,
        "annotate": annotate,
        "reward_model": train_prm,
        "scalar_reward": train_orm,
    }
    with lock_workdir(workdir):
        runs[config.kind](config, workdir)
