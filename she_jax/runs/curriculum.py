"""Several runs in a row: the stages of a curriculum, and the run that another one starts from."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ml_collections import ConfigDict

from she_jax.evaluation.report import before_after_table
from she_jax.runs.config import Recipe, TrainConfig, parse, plain
from she_jax.runs.report import REPORT
from she_jax.runs.resolve import resolve
from she_jax.runs.validate import check_front, validate
from she_jax.training.files import write_json
from she_jax.training.logging import log, show
from she_jax.training.setup import prepare_dataset
from she_jax.training.workdir import ARTIFACTS, claim_workdir, lock_workdir, read_recipe
from she_jax.types import UserError

Run = Callable[[Recipe, Path], None]


def run_stages(recipe: Recipe, workdir: Path, run: Run) -> None:
    """Runs the stages one after the other, each from the best policy of the one before.

    Each has a folder of its own, ``stage1`` and so on; a finished stage is not run again.
    ``summary.json`` holds the metrics of all.

    Args:
      recipe: of the kind ``curriculum``; ``stages`` maps names to recipes.
      workdir: the curriculum's folder.
      run: runs one recipe.
    """
    for name, stage in recipe.stages.items():
        validate(parse(standalone(stage), workdir / name))
        if not stage.rl.steps:
            raise UserError(f"stages.{name}.rl.steps=0: expected at least 1, for the next stage")
    claim_workdir(workdir, plain(recipe), artifacts=(*ARTIFACTS, *recipe.stages))
    with lock_workdir(workdir):
        _run_each(recipe, workdir, run)


def _run_each(recipe: Recipe, workdir: Path, run: Run) -> None:
    for name, stage in recipe.stages.items():
        config = parse(standalone(stage), workdir / name)
        if isinstance(config, TrainConfig) and config.measure.pairs and config.filter.front:
            data = replace(config.data, folder=Path(stage.data.dir or workdir / "data"))
            check_front(prepare_dataset(data), config.filter.front)  # not after hours
    init_from, metrics = "", {}
    for name, stage in recipe.stages.items():
        changes = {"init_from": init_from or stage.init_from, "prerequisite": {}}
        stage_recipe: Recipe = ConfigDict(stage.to_dict() | changes)
        stage_recipe.data.dir = stage_recipe.data.dir or str(workdir / "data")
        log(f"{name}: {stage.rl.steps} updates" + (f", from {init_from}" if init_from else ""))
        run(stage_recipe.lock(), workdir / name)
        metrics[name] = json.loads((workdir / name / "summary.json").read_text(encoding="utf-8"))
        init_from = str(workdir / name / "checkpoints" / "policy")
    first, *_, last = metrics.values()
    write_json(workdir / "summary.json", last | {"before": first["before"], "stages": metrics})
    show(before_after_table(first["before"], last))
    log(f"a page a stage: {', '.join(str(workdir / name / REPORT) for name in metrics)}")


def standalone(recipe: Recipe) -> Recipe:
    """The recipe without what it starts from, to be checked before that exists."""
    copy: Recipe = ConfigDict(recipe.to_dict() | {"init_from": "", "prerequisite": {}})
    copy.rl.unsolved_share = 0.0
    return copy.lock()


def run_prerequisite(recipe: Recipe, workdir: Path, run: Run) -> None:
    """Runs or finishes the run that ``recipe.init_from`` points to, if its checkpoint is missing.

    An existing run is taken as it is, whatever its options; a difference from
    ``recipe.prerequisite`` is logged.
    """
    validate(parse(standalone(recipe), workdir))
    folder = Path(recipe.init_from).absolute().parent.parent
    finished = (folder / "summary.json").is_file()
    wanted = resolve(recipe.prerequisite, folder)
    if (folder / "config.json").is_file() and read_recipe(folder) != plain(wanted):
        difference = "its options are not the recipe's" + (
            "" if finished else ", and it has not ended"
        )
        log(f"init_from={recipe.init_from}: taken as it is, though {difference}")
        return
    if finished:
        return
    log(f"init_from={recipe.init_from} does not exist yet: first its own run, in {folder}")
    run(recipe.prerequisite, folder)
