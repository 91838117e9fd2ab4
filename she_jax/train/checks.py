"""What would make a run fail, or go wrong without a word, found as early as it can be."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from she_jax.data.dataset import Prepared
from she_jax.models.sharding import check_batch, make_mesh
from she_jax.rl.advantages import CRITICAL
from she_jax.rl.losses import NORMALISATIONS, LossConfig
from she_jax.train.checkpoint import Checkpoints
from she_jax.train.rollouts import ESTIMATORS
from she_jax.train.setup import make_builder
from she_jax.train.workdir import Config


def check(config: Config, workdir: Path) -> None:
    """Finds what would stop the run later, before it takes any time or leaves anything.

    Raises:
      ValueError: for the first thing that cannot work.
      FileNotFoundError: if the data set's files are not there.
    """
    make_builder(config, workdir)
    if config.kind == "evaluate":
        return
    mesh, sft, rl = make_mesh(**config.mesh.to_dict()), config.sft, config.rl
    LossConfig(**rl.loss)
    for name, value in {
        **{
            f"sft.{k}": sft[k] for k in ("steps", "batch_size", "micro_batches", "checkpoint_every")
        },
        **{f"rl.{k}": rl[k] for k in ("steps", "prompts", "eval_every", "checkpoint_every")},
        "rl.sample_every": rl.sample_every,
        "eval.batch_size": config.eval.batch_size,
    }.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    if rl.group_size < 2:
        raise ValueError(f"group_size={rl.group_size}: the group baseline needs at least 2")
    if not rl.temperature > 0:
        raise ValueError(f"rl.temperature={rl.temperature}: expected a positive number")
    if rl.halvings < 0:
        raise ValueError(f"rl.halvings={rl.halvings}: expected 0 (leave no row behind) or more")
    if rl.top_p < 1 and not rl.top_k:
        raise ValueError(f"rl.top_p={rl.top_p} narrows the top k: set rl.top_k too, 100 say")
    for name, value, choices in (
        ("estimator", rl.estimator, ESTIMATORS),
        ("normalisation", rl.normalisation, NORMALISATIONS),
        ("srpo.critical", rl.srpo.critical, CRITICAL),
    ):
        if value not in choices:
            raise ValueError(f"rl.{name}={value!r}: expected one of {choices}")
    check_batch(rl.prompts, mesh)
    for rows, parts in (
        (sft.batch_size, sft.micro_batches),
        (rl.prompts * rl.group_size, rl.loss.micro_batches),
    ):
        if rows % parts:
            raise ValueError(f"{rows} rows do not divide into micro_batches={parts}")
        check_batch(rows // parts, mesh)


def check_splits(config: Config, made: Prepared) -> None:
    """Checks that there are pairs to train on, to pick a checkpoint on and to report on.

    Raises:
      ValueError: if one of the three splits is empty.
    """
    for split in ("train", "validation", config.data.eval_split):
        if not made.splits.get(split):
            raise ValueError(
                f"no pairs in the split {split!r}, only in {sorted(made.splits)}: a run trains on "
                "train, picks its checkpoint on validation and reports on data.eval_split"
            )


def fingerprint(made: Prepared) -> str:
    """Tells one data set from another: its options, and the size and time of its files."""
    return made.path.parent.name


def check_data(host: Mapping[str, Any], made: Prepared) -> None:
    """Checks that a checkpoint goes on with the pairs it began with.

    Raises:
      ValueError: if they have changed, for the position in them would mean nothing.
    """
    if host["data"] != fingerprint(made):
        raise ValueError(
            f"the pairs changed since the last checkpoint (data set {host['data']} then, "
            f"{fingerprint(made)} now): put the old files back, or start anew in another --workdir"
        )


def finite(
    figures: Mapping[str, Any], phase: str, step: int, saved: Checkpoints
) -> dict[str, float]:
    """The figures as numbers.

    Raises:
      ValueError: if the loss or the gradient is no longer a number; nothing is saved after that.
    """
    numbers = {name: float(value) for name, value in figures.items()}
    if not math.isfinite(numbers["loss"]) or not math.isfinite(numbers["grad_norm"]):
        raise ValueError(
            f"{phase} step {step + 1}: loss {numbers['loss']}, gradient norm "
            f"{numbers['grad_norm']}. Stopped; the last good checkpoint is step "
            f"{saved.latest_step} in {saved.directory}. As a rule a lower {phase} learning_rate "
            "helps, in another --workdir"
        )
    return numbers
