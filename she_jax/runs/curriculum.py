"""Runs the stages of a curriculum one after the other."""

import json
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console

from she_jax.evaluation.report import before_after_table
from she_jax.runs.validate import check
from she_jax.training.files import write_json
from she_jax.training.logging import say
from she_jax.training.workdir import MADE, Config, claim_workdir, held

Run = Callable[[Config, Path], None]


def run_curriculum(config: Config, workdir: Path, run: Run) -> None:
    """The stages one after the other, each from the best policy of the one before.

    Each has a folder of its own, ``stage1`` and so on; a stage that is done is not done again.
    ``summary.json`` holds the figures of all.
    """
    for name, stage in config.stages.items():
        check(alone(stage), workdir / name)
        if not stage.rl.steps:
            raise ValueError(f"stages.{name}.rl.steps=0: expected at least 1, for the next stage")
    claim_workdir(workdir, config, made=(*MADE, *config.stages))
    with held(workdir):
        _run_stages(config, workdir, run)


def _run_stages(config: Config, workdir: Path, run: Run) -> None:
    start, figures = "", {}
    for name, stage in config.stages.items():
        own: Config = ConfigDict(stage.to_dict() | {"start": start or stage.start, "before": {}})
        own.data.dir = own.data.dir or str(workdir / "data")
        say(f"{name}: {own.rl.steps} updates" + (f", from {start}" if start else ""))
        run(own.lock(), workdir / name)
        figures[name] = json.loads((workdir / name / "summary.json").read_text(encoding="utf-8"))
        start = str(workdir / name / "checkpoints" / "srpo")
    first, *_, last = figures.values()
    write_json(workdir / "summary.json", last | {"before": first["before"], "stages": figures})
    console = Console(highlight=False)
    console.print(before_after_table(first["before"], last))


def alone(stage: Config) -> Config:
    """A stage's config as if it began anew: to be checked before what it starts from is there."""
    own: Config = ConfigDict(stage.to_dict() | {"start": "", "before": {}})
    own.rl.missed = 0.0
    return own.lock()


def make_start(config: Config, workdir: Path, run: Run) -> None:
    """Runs the stage before, or ends it, where what this one starts from is not there yet.

    A run that is there already is taken as it is, whatever its options; that they are other ones
    than those of ``config.before`` is said.
    """
    check(alone(config), workdir)
    folder = Path(config.start).absolute().parent.parent
    path = folder / "config.json"
    if path.is_file():
        then = json.loads(path.read_text(encoding="utf-8"))
        if then != json.loads(json.dumps(config.before.to_dict())):
            ended = (folder / "summary.json").is_file()
            told = "its options are not the recipe's" + ("" if ended else ", and it has not ended")
            say(f"start={config.start}: taken as it is, though {told}")
            return
    if (folder / "summary.json").is_file():
        return
    say(f"start={config.start} is not there yet: first the stage before, in {folder}")
    run(config.before, folder)
