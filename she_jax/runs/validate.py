"""What would make a run fail, or go wrong without a word, found as early as it can be."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from she_jax.data.curriculum import AIMS
from she_jax.data.dataset import Prepared, open_prepared
from she_jax.filtering.measure import filter_config
from she_jax.models.sharding import check_batch
from she_jax.rewards.hybrid import COMBINATIONS
from she_jax.rewards.orm.dataset import LOSSES
from she_jax.rewards.orm.model import SCALAR
from she_jax.rewards.prm.model import EXAMINER
from she_jax.rl.advantages import CRITICAL, ESTIMATORS
from she_jax.rl.losses import NORMALISATIONS, LossConfig
from she_jax.training.logging import say
from she_jax.training.setup import examiner_mesh, make_builder, policy_mesh
from she_jax.training.workdir import MISSED, Config

METHODS = ("online", "sft", "dpo")
CHAINS = ("rejection", "written")


def check(config: Config, workdir: Path) -> None:
    """Finds what would stop the run later, before it takes any time or leaves anything.

    Raises:
      ValueError: for the first thing that cannot work.
      FileNotFoundError: if the data set's files are not there.
    """
    if config.data.name == "made":
        open_prepared(config.data.path)
    else:
        make_builder(config, workdir)
    if config.kind == "evaluate":
        return
    mesh, sft = policy_mesh(config), config.get("sft")
    for part, names in {
        "sft": ("steps", "batch_size", "micro_batches", "checkpoint_every"),
        "rl": ("prompts", "eval_every", "checkpoint_every", "sample_every"),
        "eval": ("batch_size",),
        "reward": ("batch_size", "refresh_steps", "refresh_batch_size"),
        "examiner": ("pairs", "rollouts", "eval_pairs", "batch_size"),
        "scalar": ("pairs", "rollouts", "eval_pairs", "batch_size"),
    }.items():
        for name in names if part in config else ():
            if config[part][name] < 1:
                raise ValueError(f"{part}.{name}={config[part][name]}: expected at least 1")
    if "filter" in config:
        _check_filter(config)
    if config.kind == "filter":
        return
    rows = sft.batch_size
    if config.kind in ("train", EXAMINER.kind):
        rows //= 2  # two pairs a row
        if sft.batch_size % 2:
            raise ValueError(
                f"sft.batch_size={sft.batch_size}: two share a row, so expected an even number"
            )
    _check_rows(rows, sft.micro_batches, mesh, "sft")
    if config.kind == "train":
        _check_method(config)
        _check_rl(config, mesh)
        _check_start(config)
        _check_reward(config)
    if config.kind == EXAMINER.kind:
        _check_examiner(config.examiner)
    if config.kind == SCALAR.kind:
        _check_scalar(config)


def _check_rl(config: Config, mesh: Mesh) -> None:
    rl = config.rl
    LossConfig(**rl.loss)
    if rl.group_size < 1 + (config.method == "online"):
        raise ValueError(f"group_size={rl.group_size}: the group baseline needs at least 2")
    if not rl.temperature > 0:
        raise ValueError(f"rl.temperature={rl.temperature}: expected a positive number")
    for name in ("steps", "refill", "patience"):
        if rl[name] < 0:
            raise ValueError(f"rl.{name}={rl[name]}: expected 0 (none) or more")
    if not 0 < rl.srpo.correct_from <= 1:
        raise ValueError(
            f"rl.srpo.correct_from={rl.srpo.correct_from}: expected a reward in (0, 1]"
        )
    if not 0 <= rl.format_weight < 1:
        raise ValueError(
            f"rl.format_weight={rl.format_weight}: expected a reward in [0, 1), below that of a "
            "right label"
        )
    if not rl.replay >= 0:
        raise ValueError(f"rl.replay={rl.replay}: expected 0 (none) or a positive advantage")
    if not 0 <= rl.negative <= 1:
        raise ValueError(f"rl.negative={rl.negative}: expected a weight in [0, 1]")
    if not rl.tol >= 0:
        raise ValueError(f"rl.tol={rl.tol}: expected 0 or more")
    if rl.halvings < 0:
        raise ValueError(f"rl.halvings={rl.halvings}: expected 0 (leave no row behind) or more")
    if rl.top_p < 1 and not rl.top_k:
        raise ValueError(f"rl.top_p={rl.top_p} narrows the top k: set rl.top_k too, 100 say")
    for name, value, choices in (
        ("estimator", rl.estimator, tuple(ESTIMATORS)),
        ("normalisation", rl.normalisation, NORMALISATIONS),
        ("srpo.critical", rl.srpo.critical, CRITICAL),
        ("aim", rl.aim, AIMS),
    ):
        if value not in choices:
            raise ValueError(f"rl.{name}={value!r}: expected one of {choices}")
    check_batch(rl.prompts, mesh, "rl.prompts: batch", "prompts")
    rows, parts = rl.prompts * rl.group_size, rl.loss.micro_batches
    if config.method == "sft":
        rows //= 2  # two chains a row
    _check_rows(rows, parts, mesh, "rl.loss")
    if config.method == "online":  # the rows of a group that are in one micro-batch stay together
        groups = rows // parts // math.gcd(rl.group_size, rows // parts)
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        if groups < devices:
            say(
                f"rl.loss.micro_batches={parts}: a micro-batch has {groups} groups, and so work "
                f"for {groups} of {devices} devices; fewer micro-batches have work for all"
            )


def _check_method(config: Config) -> None:
    rl, offline, rows = config.rl, config.offline, config.rl.prompts * config.rl.group_size
    for name, value, choices in (
        ("method", config.method, METHODS),
        ("offline.chains", offline.chains, CHAINS),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: expected one of {choices}")
    if offline.pairs < 0:
        raise ValueError(f"offline.pairs={offline.pairs}: expected 0 (as many as online) or more")
    own = (rl.temperature, rl.top_k, rl.top_p, rl.refill, rl.replay, rl.aim)
    if config.method != "online" and own != (1.0, 0, 1.0, 0, 0.0, "even"):
        raise ValueError(
            f"method={config.method!r} samples once, at temperature 1 from the whole vocabulary, "
            "and takes the prompts as they come: set rl.temperature=1, rl.top_k=0, rl.top_p=1, "
            "rl.refill=0, rl.replay=0 and rl.aim=even"
        )
    imitates = config.method == "sft" and offline.chains == "rejection"
    if config.method != "online" and (
        config.reward.scalar or (config.reward.model and not imitates)
    ):
        raise ValueError(
            f"method={config.method!r} has no use for that reward model: leave reward.model and "
            "reward.scalar empty (an examiner, reward.model, can judge what method=sft with "
            "offline.chains=rejection samples)"
        )
    if imitates and config.reward.model and config.reward.combine != "precedence":
        raise ValueError(
            f"reward.combine={config.reward.combine!r}: with method=sft the examiner speaks of "
            "what humans said nothing of, so expected 'precedence'"
        )
    if not 0 <= rl.missed <= 1:
        raise ValueError(f"rl.missed={rl.missed}: expected a share in [0, 1]")
    if rl.missed and (not config.start or config.filter.pairs):
        raise ValueError(
            f"rl.missed takes the prompts that an SFT before it missed, as they are: expected its "
            f"checkpoints for start={config.start!r}, and 0 for filter.pairs={config.filter.pairs}"
        )
    if not offline.beta > 0:
        raise ValueError(f"offline.beta={offline.beta}: expected a positive number")
    if config.method != "online" and rows % (2 * rl.loss.micro_batches):
        raise ValueError(
            f"rl.prompts x rl.group_size = {rows} rows: method={config.method!r} takes them two by "
            f"two and in micro_batches={rl.loss.micro_batches}, so expected a multiple of "
            f"{2 * rl.loss.micro_batches}"
        )


def _check_rows(rows: int, parts: int, mesh: Mesh, where: str) -> None:
    if rows % parts:
        raise ValueError(f"{rows} rows do not divide into {where}.micro_batches={parts}")
    check_batch(rows // parts, mesh, f"{where}.micro_batches={parts}: micro-batch")


def _check_filter(config: Config) -> None:
    own = config.filter
    filter_config(config)
    if own.pairs < (config.kind == "filter"):
        raise ValueError(f"filter.pairs={own.pairs}: expected some training pairs to look at")
    if own.skip < 0:
        raise ValueError(f"filter.skip={own.skip}: expected 0 (begin with the first) or more")
    if own.pairs and own.rollouts < 1:
        raise ValueError(f"filter.rollouts={own.rollouts}: expected at least 1")
    if not 0 <= own.part < own.parts:
        raise ValueError(f"filter.part={own.part}: expected 0 to {own.parts - 1}, of filter.parts")


def _check_start(config: Config) -> None:
    if not config.start:
        return
    folder = Path(config.start)
    path = folder.absolute().parent.parent / "config.json"
    if not folder.is_dir() or not path.is_file():
        raise FileNotFoundError(
            f"start={folder}: expected the checkpoints of a run, such as runs/stage1/checkpoints/"
            "srpo"
        )
    then = json.loads(path.read_text(encoding="utf-8"))
    if config.rl.missed:
        if not path.with_name(MISSED).is_file():
            raise FileNotFoundError(
                f"start={folder} has no {MISSED}: rl.missed wants a run with method=sft and "
                "offline.chains=rejection to begin with"
            )
        if _pairs(then) != _pairs(json.loads(json.dumps(config.to_dict()))):
            raise ValueError(f"start={folder}: rl.missed wants the pairs of that run, not others")
    chain = then.get("chain")
    if chain != config.chain.to_dict():
        raise ValueError(f"start={folder} writes the chain {chain}, not {config.chain.to_dict()}")
    theirs, own = then.get("model", {}), config.model.to_dict()
    sizes = own.keys() - {"prompt_length", "completion_length", "dtype", "remat"}
    other = [name for name in sorted(sizes) if theirs.get(name) != own[name]]
    # A loaded model has its sizes, and its name, a path, may be another one by now.
    if other and "scratch" in (own["name"], theirs.get("name")):
        told = ", ".join(f"model.{n}={theirs.get(n)!r} there, {own[n]!r} here" for n in other)
        raise ValueError(f"start={folder} is of another model: {told}. Set what is there")


def _pairs(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What says which pairs a run has."""
    return config["data"]["name"], config["data"]["path"], config["shopworld"]


def _check_reward(config: Config) -> None:
    reward = config.reward
    if reward.combine not in COMBINATIONS:
        raise ValueError(f"reward.combine={reward.combine!r}: expected one of {COMBINATIONS}")
    if not 0 <= reward.model_weight <= 1:
        raise ValueError(f"reward.model_weight={reward.model_weight}: expected a share in [0, 1]")
    if reward.refresh_every < 0:
        raise ValueError(f"reward.refresh_every={reward.refresh_every}: expected 0 (never) or more")
    for name in ("refresh_every", "devices"):
        if reward[name] and not reward.model:
            raise ValueError(f"reward.{name}={reward[name]} needs an examiner: set reward.model")
    if reward.refresh_every:
        check_batch(reward.refresh_batch_size, examiner_mesh(config))
    if reward.votes < 0:
        raise ValueError(f"reward.votes={reward.votes}: expected 0 (no critiques) or more")
    if reward.model:
        EXAMINER.check(Path(reward.model), config)
    elif reward.combine == "model_only":
        raise ValueError("reward.combine='model_only' needs an examiner: set reward.model")
    if reward.scalar:
        SCALAR.check(Path(reward.scalar), config)


def _check_examiner(examiner: Config) -> None:
    if examiner.room < 2 * examiner.answer_length:
        raise ValueError(
            f"examiner.room={examiner.room}: expected at least {2 * examiner.answer_length}, for "
            f"two answers of answer_length={examiner.answer_length}"
        )
    if examiner.votes < 0:
        raise ValueError(f"examiner.votes={examiner.votes}: expected 0 (no critiques) or more")


def _check_scalar(config: Config) -> None:
    loss, sft = config.scalar.loss, config.sft
    if loss not in LOSSES:
        raise ValueError(f"scalar.loss={loss!r}: expected one of {LOSSES}")
    if loss == "pairwise" and sft.batch_size % (2 * sft.micro_batches):
        raise ValueError(
            f"sft.batch_size={sft.batch_size}: chains come in pairs and in micro_batches="
            f"{sft.micro_batches}, so expected a multiple of {2 * sft.micro_batches}"
        )


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
