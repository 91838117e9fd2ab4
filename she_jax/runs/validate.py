"""Checks that span two parts of a run's config, made before anything is computed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from she_jax.data.dataset import PreparedDataset, open_prepared, open_split
from she_jax.data.sources import make_builder
from she_jax.models.hub import locate_model
from she_jax.models.sharding import check_batch
from she_jax.rewards.orm.model import ORM
from she_jax.rewards.prm.model import PRM
from she_jax.rollouts.prompt_source import UNSOLVED
from she_jax.runs.config import (
    FilterRunConfig,
    OrmRunConfig,
    PrmRunConfig,
    RunConfig,
    TrainConfig,
    chain_options,
)
from she_jax.training.logging import log
from she_jax.training.setup import split_mesh
from she_jax.training.sft import SftConfig
from she_jax.training.workdir import read_recipe
from she_jax.types import UserError


def validate(config: RunConfig) -> None:
    """Finds what would stop the run later, before it takes any time or leaves any file.

    Raises:
      UserError: for the first thing that cannot work.
      FileNotFoundError: if the data set's files, a checkpoint or a reward model are missing.
    """
    if config.data.name == "prepared":
        open_prepared(config.data.path)
    elif config.kind != "evaluate" or not config.data.folder.is_dir():
        make_builder(config.data)  # what is evaluated follows the policy's chain: it may be there
    if config.model.name != "scratch":
        locate_model(config.model.name)
    if isinstance(config, FilterRunConfig) and config.measure.pairs < 1:
        raise UserError(
            f"filter.pairs={config.measure.pairs}: expected the number of pairs to measure"
        )
    if isinstance(config, OrmRunConfig):
        _check_micro_batches(config.sft, config.sft.batch_size, split_mesh(config.mesh, 0)[0])
        config.orm.check_batches(config.sft.batch_size, config.sft.micro_batches)
    if isinstance(config, PrmRunConfig):
        _check_two_a_row(config.sft, split_mesh(config.mesh, 0)[0])
    if isinstance(config, TrainConfig):
        _check_training(config)


def check_front(dataset: PreparedDataset, front: Sequence[str]) -> None:
    """Checks that the kinds of query that a filter puts in front exist.

    Pairs that have no kinds at all are filtered without.

    Raises:
      UserError: if the training split has no pair of one of them; lists the kinds it has.
    """
    known = set(open_split(dataset.path, "train").texts("kind")) - {""} if front else set()
    if known and (unknown := [kind for kind in front if kind not in known]):
        raise UserError(
            f"filter.front: no training pair is of the kind {' or '.join(map(repr, unknown))}; "
            f"expected some of: {', '.join(sorted(known)[:40])}; or none, with "
            "--config.filter.front="
        )


def check_splits(dataset: PreparedDataset, eval_split: str) -> None:
    """Checks that there are pairs to train on, to select a checkpoint on and to report on.

    Raises:
      UserError: if one of the three splits is empty.
    """
    for split in ("train", "validation", eval_split):
        if not dataset.splits.get(split):
            raise UserError(
                f"no pairs in the split {split!r}, only in {sorted(dataset.splits)}: a run trains "
                "on train, selects its checkpoint on validation and reports on data.eval_split. "
                "Where no column 'split' says it, whole queries are divided by "
                "data.validation_share and data.test_share: with at least three queries and shares "
                "above 0 no split is empty"
            )


def _check_training(config: TrainConfig) -> None:
    mesh, reward_mesh = split_mesh(config.mesh, config.reward.devices)
    _check_two_a_row(config.sft, mesh)
    _check_labels(config)
    _check_method(config)
    rollout, parts = config.rollout, config.loss.micro_batches
    check_batch(rollout.prompts, mesh, "rl.prompts: batch", "prompts")
    rows = rollout.rows // (1 + (config.method == "sft"))  # two chains a row
    _check_rows(rows, parts, mesh, "rl.loss")
    if config.method == "rl":  # the rows of a group that are in one micro-batch stay together
        groups = rows // parts // math.gcd(rollout.group_size, rows // parts)
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        if groups < devices:
            log(
                f"rl.loss.micro_batches={parts}: a micro-batch has {groups} groups, and so work "
                f"for {groups} of {devices} devices; fewer micro-batches have work for all"
            )
    _check_init_from(config)
    if config.reward.refresh.every:
        check_batch(config.reward.refresh.batch_size, reward_mesh)
    if config.reward.prm:
        PRM.check(Path(config.reward.prm), config.schema)
    if config.reward.orm:
        ORM.check(Path(config.reward.orm), config.schema)


def _check_two_a_row(sft: SftConfig, mesh: Mesh) -> None:
    if sft.batch_size % 2:
        raise UserError(
            f"sft.batch_size={sft.batch_size}: two share a row, so expected an even number"
        )
    _check_micro_batches(sft, sft.batch_size // 2, mesh)


def _check_micro_batches(sft: SftConfig, rows: int, mesh: Mesh) -> None:
    _check_rows(rows, sft.micro_batches, mesh, "sft")


def _check_rows(rows: int, parts: int, mesh: Mesh, section: str) -> None:
    if rows % parts:
        raise UserError(f"{rows} rows do not divide into {section}.micro_batches={parts}")
    check_batch(rows // parts, mesh, f"{section}.micro_batches={parts}: micro-batch")


def _check_labels(config: TrainConfig) -> None:
    """What a chain without the step ``label`` needs and cannot have."""
    if config.schema.label_index >= 0:
        return
    steps = f"the chain {config.schema.names} has no step 'label'"
    if config.reward.outcome is None or config.method != "rl":
        raise UserError(
            f"{steps}, so its outcome is not known: give --config.reward.outcome=package.module:"
            "function (and method=rl), or add the step 'label'"
        )
    if config.measure.pairs or config.balance:
        raise UserError(f"{steps}: set filter.pairs=0 and data.balance=False, which go by labels")


def _check_method(config: TrainConfig) -> None:
    """What sft and dpo cannot do, and what continues an earlier rejection sampling."""
    rollout, reward, online = config.rollout, config.reward, config.online
    if config.method != "rl":
        sampling = (rollout.temperature, rollout.top_k, rollout.top_p)
        prompts = (online.dynamic_sampling_rounds, online.self_imitation, config.prompts.difficulty)
        if (sampling, prompts) != ((1.0, 0, 1.0), (0, 0.0, "even")):
            raise UserError(
                f"method={config.method!r} samples once, at temperature 1 from the whole "
                "vocabulary, and takes the prompts as they come: set rl.temperature=1, rl.top_k=0, "
                "rl.top_p=1, rl.dynamic_sampling_rounds=0, rl.self_imitation=0 and "
                "rl.difficulty=even"
            )
        if reward.step or reward.outcome:
            raise UserError(
                f"method={config.method!r} takes its chains by labels and annotation: leave "
                "reward.step and reward.outcome empty, or set method=rl"
            )
        rejects = config.method == "sft" and config.offline.chains == "rejection"
        if reward.orm or (reward.prm and not rejects):
            raise UserError(
                f"method={config.method!r} has no use for that reward model: leave reward.prm and "
                "reward.orm empty (a process reward model, reward.prm, can score what method=sft "
                "with offline.chains=rejection samples)"
            )
        if rejects and reward.prm and reward.combine != "precedence":
            raise UserError(
                f"reward.combine={reward.combine!r}: with method=sft the process reward model "
                "scores what humans did not annotate, so expected 'precedence'"
            )
        if rollout.rows % (2 * config.loss.micro_batches):
            raise UserError(
                f"rl.prompts x rl.group_size = {rollout.rows} rows: method={config.method!r} takes "
                f"them two by two and in micro_batches={config.loss.micro_batches}, so expected a "
                f"multiple of {2 * config.loss.micro_batches}"
            )
    if config.prompts.unsolved_share and (not config.init_from or config.measure.pairs):
        raise UserError(
            "rl.unsolved_share takes the prompts that an earlier rejection sampling left unsolved: "
            f"expected its checkpoints for init_from={config.init_from!r}, and 0 for "
            f"filter.pairs={config.measure.pairs}"
        )


def _check_init_from(config: TrainConfig) -> None:
    """Whether the run behind ``init_from`` has the same chain, model and, if needed, pairs."""
    if not config.init_from:
        return
    folder = Path(config.init_from)
    run = folder.absolute().parent.parent
    if not folder.is_dir() or not (run / "config.json").is_file():
        raise FileNotFoundError(
            f"init_from={folder}: expected the checkpoints of a run, such as "
            "runs/stage1/checkpoints/policy"
        )
    earlier = read_recipe(run)
    if config.prompts.unsolved_share:
        if not (run / UNSOLVED).is_file():
            raise FileNotFoundError(
                f"init_from={folder} has no {UNSOLVED}: rl.unsolved_share continues a run with "
                "method=sft and offline.chains=rejection"
            )
        if _pairs(earlier) != _pairs(config.recipe):
            raise UserError(
                f"init_from={folder}: rl.unsolved_share needs the pairs of that run, not others"
            )
    chain = chain_options(earlier)
    if chain != config.chain:
        raise UserError(f"init_from={folder} writes the chain {chain}, not {config.chain}")
    theirs, ours = earlier.get("model", {}), config.recipe["model"]
    sizes = ours.keys() - {"prompt_length", "completion_length", "dtype", "remat", "thinking"}
    other = [name for name in sorted(sizes) if theirs.get(name) != ours[name]]
    # A loaded model has its sizes, and its name, a path, may be another one by now.
    if other and "scratch" in (ours["name"], theirs.get("name")):
        values = ", ".join(f"model.{n}={theirs.get(n)!r} there, {ours[n]!r} here" for n in other)
        raise UserError(f"init_from={folder} is of another model: {values}. Set what is there")


def _pairs(recipe: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values that decide which pairs a run has."""
    return recipe["data"]["name"], recipe["data"]["path"], recipe["shopworld"]
