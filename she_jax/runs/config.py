"""The border: a recipe (``ConfigDict``) is parsed once, into the dataclasses of the rooms."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from she_jax.cot import CotSchema
from she_jax.data.shopworld.builder import CHECKS, TeacherErrors, World
from she_jax.data.sources import DataConfig
from she_jax.evaluation.decide import DecideConfig
from she_jax.evaluation.evaluate import EvalConfig
from she_jax.filtering.measure import MeasureConfig
from she_jax.filtering.select import FilterConfig
from she_jax.generate.language_model import LanguageModelConfig
from she_jax.models.sharding import MeshConfig
from she_jax.rewards.checked import checked_outcome_reward, checked_step_reward
from she_jax.rewards.hybrid import RewardConfig
from she_jax.rewards.orm.dataset import OrmConfig
from she_jax.rewards.prm.dataset import PrmConfig
from she_jax.rewards.prm.refresh import RefreshConfig
from she_jax.rewards.verifier import FULL_REWARD, OutcomeRewardFn
from she_jax.rl.advantages import CRITICAL, ESTIMATORS, SRPO_RANGES, STEPWISE
from she_jax.rl.checks import check_range
from she_jax.rl.losses import LossConfig
from she_jax.rollouts.collector import RolloutConfig
from she_jax.rollouts.credit import CreditConfig
from she_jax.rollouts.offline import OfflineConfig
from she_jax.rollouts.online import OnlineConfig
from she_jax.rollouts.prompt_source import PromptConfig
from she_jax.runs.plugins import (
    PLUGIN_FILE,
    Plugin,
    checked_estimator,
    is_plugin,
    load_plugin,
)
from she_jax.runs.predictions import OutputConfig
from she_jax.training.optimizer import OptimizerConfig
from she_jax.training.sft import SftConfig
from she_jax.training.workdir import read_recipe
from she_jax.types import UserError

# A ConfigDict. Its attributes are typed as a union of everything, which no checker can follow.
Recipe: TypeAlias = Any

METHODS = ("rl", "sft", "dpo")
PLUGIN_SETTINGS = ("data.name", "reward.step", "reward.outcome", "rl.estimator")
INHERITED = ("data", "shopworld", "chain", "model")  # what a run takes from its policy's run
_MEASURE = ("pairs", "skip", "rollouts", "records", "part", "parts")  # of filter: MeasureConfig's
_LENGTHS = ("prompt_length", "completion_length")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run has, parsed.

    Attributes:
      recipe: the recipe as plain values, which ``config.json`` keeps.
      kind: what to do, see ``she_jax.runs.run.KINDS``.
      seed: of parameters, data order and sampling.
      chain: the keyword arguments of ``CotSchema.build``.
      data: the pairs.
      model: the policy's model.
      mesh: the devices.
      plugins: a user's own objects, by setting.
    """

    recipe: Mapping[str, Any]
    kind: str
    seed: int
    chain: Mapping[str, Any]
    data: DataConfig
    model: LanguageModelConfig
    mesh: MeshConfig
    plugins: Mapping[str, Plugin]

    @property
    def schema(self) -> CotSchema:
        """The steps of the chain."""
        return CotSchema.build(**self.chain)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A policy's training.

    Attributes:
      export: write the policy as a Hugging Face directory, too.
      init_from: checkpoints to start from, "" for a cold start.
      method: what follows the cold start, one of ``METHODS``.
      balance: draw the classes in equal shares while training.
      measure: what the filter measures; with 0 pairs there is no filter.
    """

    export: bool
    init_from: str
    method: str
    balance: bool
    evaluation: EvalConfig
    sft: SftConfig
    online: OnlineConfig
    rollout: RolloutConfig
    credit: CreditConfig
    loss: LossConfig
    prompts: PromptConfig
    offline: OfflineConfig
    reward: RewardConfig
    measure: MeasureConfig
    filter: FilterConfig


@dataclass(frozen=True, kw_only=True)
class PredictConfig(RunConfig):
    """Predictions of a checkpoint for a data set."""

    checkpoint: str
    phase: str
    evaluation: EvalConfig
    decide: DecideConfig
    output: OutputConfig


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig(RunConfig):
    """The choice of pairs for people to annotate.

    Attributes:
      checkpoint: a policy, or a folder of predictions.
      phase: of a policy's run, see ``PredictConfig``.
      evaluation: how many chains are written at a time.
      pairs: how many to choose, >= 1.
      candidates: how many the policy looks at; 0 for ten times as many.
      samples: chains of each candidate that vote.
      split: the pairs' split.
    """

    checkpoint: str
    phase: str
    evaluation: EvalConfig
    pairs: int
    candidates: int
    samples: int
    split: str

    def __post_init__(self):
        if self.pairs < 1:
            raise ValueError(f"annotate.pairs={self.pairs}: expected at least 1")
        if self.candidates and self.candidates < self.pairs:
            raise ValueError(
                f"annotate.candidates={self.candidates}: expected at least the number of pairs, "
                f"{self.pairs}; or 0"
            )


@dataclass(frozen=True, kw_only=True)
class FilterRunConfig(RunConfig):
    """Filtering of a run's training pairs by its policy."""

    checkpoint: str
    measure: MeasureConfig
    filter: FilterConfig


@dataclass(frozen=True, kw_only=True)
class PrmRunConfig(RunConfig):
    """Training of a process reward model for a run's policy.

    Attributes:
      eval_split: measured beside the long tail.
      reference_sft: how it first learns to write chains itself; with 0 steps it does not.
      sft: how it learns to score steps.
    """

    checkpoint: str
    eval_split: str
    reference_sft: SftConfig
    sft: SftConfig
    prm: PrmConfig


@dataclass(frozen=True, kw_only=True)
class OrmRunConfig(RunConfig):
    """Training of an outcome reward model for a run's policy."""

    checkpoint: str
    eval_split: str
    sft: SftConfig
    orm: OrmConfig


def parse(recipe: Recipe, workdir: Path) -> RunConfig:
    """The dataclasses of a recipe, whose values check themselves.

    Args:
      recipe: a ``ConfigDict`` of the kind ``train``, ``evaluate``, ``annotate``, ``filter``,
        ``reward_model`` or ``scalar_reward``; the last four complete, see ``inherit``.
      workdir: the run's folder.

    Raises:
      UserError: for the first value that is out of its range.
    """
    parsers = {
        "train": _train,
        "check": _train,
        "time": _train,
        "evaluate": _predict,
        "annotate": _annotate,
        "filter": _filter_run,
        "reward_model": _prm_run,
        "scalar_reward": _orm_run,
    }
    _check_finite(recipe)
    try:
        return parsers[recipe.kind](recipe, _common(recipe, workdir, _load_plugins(recipe)))
    except UserError:
        raise
    except ValueError as error:  # a dataclass's check of itself
        raise UserError(str(error)) from error


def _check_finite(recipe: Recipe, prefix: str = "") -> None:
    """Checks that every number is finite: a NaN passes most checks of a range."""
    for key, value in recipe.items():
        if isinstance(value, ConfigDict):
            _check_finite(value, f"{prefix}{key}.")
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise UserError(f"{prefix}{key}={value}: expected a finite number")


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """What ``config.json`` of a policy's run says of its language model; it names no code."""

    seed: int
    chain: Mapping[str, Any]
    model: LanguageModelConfig

    @property
    def schema(self) -> CotSchema:
        """The steps of the chain."""
        return CotSchema.build(**self.chain)


def read_run(folder: Path) -> StoredRun:
    """The language model of a run that was started before.

    Raises:
      UserError: if an earlier version of she_jax wrote the file.
    """
    recipe = read_recipe(folder)
    return StoredRun(
        seed=recipe["seed"],
        chain=chain_options(recipe),
        model=LanguageModelConfig(**recipe["model"]),
    )


def inherit(recipe: Recipe) -> Recipe:
    """The recipe with the pairs, the chain and the model of the run ``recipe.checkpoint``.

    Raises:
      FileNotFoundError: if there is no run.
      UserError: if the folder belongs to another kind of run, or the run has no cold start yet.
    """
    folder = Path(recipe.checkpoint)
    hint = "give the folder of a policy's run with --config.checkpoint"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"checkpoint={folder}: there is no run there; {hint}")
    run = read_recipe(folder)
    if run.get("kind") != "train" or not (folder / "checkpoints" / "sft").is_dir():
        raise UserError(f"checkpoint={folder}: no policy was trained there; {hint}")
    whole: Recipe = ConfigDict(recipe.to_dict() | {name: run[name] for name in INHERITED})
    if is_plugin(whole.data.name):  # the pairs it wrote, not the code that wrote them
        plugins = json.loads((folder / PLUGIN_FILE).read_text(encoding="utf-8"))
        whole.data.name, whole.data.path = "prepared", plugins["data.name"]["prepared"]
    whole.data.dir = whole.data.dir or str(folder / "data")
    return whole.lock()


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as values that JSON returns unchanged."""
    return json.loads(json.dumps(recipe.to_dict()))


def _load_plugins(recipe: Recipe) -> dict[str, Plugin]:
    """A user's own objects, by setting."""
    plugins = {}
    for setting in PLUGIN_SETTINGS:
        section, key = setting.split(".")
        name = recipe.get(section, {}).get(key, "")
        if name and (is_plugin(name) or section == "reward"):
            plugins[setting] = load_plugin(setting, name)
    return plugins


def chain_options(recipe: Mapping[str, Any] | Recipe) -> dict[str, Any]:
    """The keyword arguments of ``CotSchema.build`` for the chain that a recipe describes.

    Raises:
      ValueError: if it describes none.
    """
    chain, data = dict(recipe["chain"]), recipe["data"]
    labels = {"labels": data.get("labels") or "1-4", "good": data.get("good", "")}
    return CotSchema.build(**chain | labels).options


def data_config(recipe: Recipe, workdir: Path, pairs: Plugin | None = None) -> DataConfig:
    """The pairs of a recipe.

    Args:
      recipe: the recipe.
      workdir: the run's folder.
      pairs: a user's class, if ``data.name`` is one.
    """
    data = recipe.data
    names = ("products", "queries", "columns", "subset", "validation_share", "test_share", "markup")
    return DataConfig(
        name=data.name,
        path=data.path,
        folder=Path(data.dir or workdir / "data"),
        max_bad_share=data.max_bad_share,
        locales=tuple(name.strip() for name in data.locales.split(",") if name.strip()),
        world=_world(recipe) if data.name == "shopworld" else None,
        evaluation=recipe.kind == "evaluate"
        or (recipe.kind == "annotate" and recipe.annotate.split != "train"),
        pairs=None if pairs is None else pairs.value,
        digest="" if pairs is None else pairs.digest,
        chain=chain_options(recipe),
        **{name: data[name] for name in names},
    )


def _balance(recipe: Recipe) -> bool:
    """Whether the classes are drawn in equal shares: if nobody says, where the labels are real."""
    balance = recipe.data.balance
    if balance is not None:
        return balance
    has_labels = CotSchema.build(**chain_options(recipe)).label_index >= 0
    return has_labels and recipe.data.name != "shopworld"


def _common(recipe: Recipe, workdir: Path, plugins: Mapping[str, Plugin]) -> dict[str, Any]:
    """The attributes of ``RunConfig``."""
    return {
        "recipe": plain(recipe),
        "kind": recipe.kind,
        "seed": recipe.seed,
        "chain": chain_options(recipe),
        "data": data_config(recipe, workdir, plugins.get("data.name")),
        "model": LanguageModelConfig(**recipe.model.to_dict()),
        "mesh": MeshConfig(**recipe.mesh.to_dict()),
        "plugins": plugins,
    }


def _world(recipe: Recipe) -> World:
    options = recipe.shopworld.to_dict()
    if recipe.chain.checks not in CHECKS:
        choices = " or ".join(map(str, CHECKS))
        raise UserError(f"chain.checks={recipe.chain.checks}: ShopWorld takes {choices}")
    return World(
        **options
        | {
            "pairs": tuple(options["pairs"]),
            "class_balance": tuple(options["class_balance"]),
            "errors": TeacherErrors(**options["errors"]),
            "checks": recipe.chain.checks,
            "label_first": recipe.chain.label_first,
        }
    )


def _evaluation(recipe: Recipe, outcome: OutcomeRewardFn | None = None) -> EvalConfig:
    return EvalConfig(
        outcome=outcome,
        split=recipe.data.eval_split,
        pairs=recipe.data.eval_pairs,
        seed=recipe.seed,
        **recipe.eval.to_dict(),
    )


def _optimizer(section: Recipe) -> OptimizerConfig:
    return OptimizerConfig(**{name: section[name] for name in OptimizerConfig.__dataclass_fields__})


def _sft(section: Recipe, seed: int, name: str = "sft") -> SftConfig:
    sizes = ("steps", "batch_size", "micro_batches", "checkpoint_every")
    return SftConfig(
        section=name,
        seed=seed,
        optimizer=_optimizer(section),
        **{size: section[size] for size in sizes},
    )


def _measure(recipe: Recipe, data: DataConfig) -> MeasureConfig:
    return MeasureConfig(
        seed=recipe.seed,
        batch_size=recipe.eval.batch_size,
        shuffled=data.shuffled,
        **{name: recipe.filter[name] for name in _MEASURE},
    )


def _filter(recipe: Recipe) -> FilterConfig:
    options = {k: v for k, v in recipe.filter.items() if k not in _MEASURE}
    # On the command line a list is one text: --config.filter.front=negation,brand.
    kinds = [kind.strip() for text in options["front"] for kind in text.split(",")]
    return FilterConfig(**options | {"front": tuple(filter(None, kinds)), "seed": recipe.seed})


def _train(recipe: Recipe, common: dict[str, Any]) -> TrainConfig:
    if recipe.method not in METHODS:
        raise UserError(f"method={recipe.method!r}: expected one of {METHODS}")
    rl, rollout, plugins = recipe.rl, _rollout(recipe), common["plugins"]
    reward = _reward(recipe, plugins)
    return TrainConfig(
        **common,
        export=recipe.export,
        init_from=recipe.init_from,
        method=recipe.method,
        balance=_balance(recipe),
        evaluation=_evaluation(recipe, reward.outcome),
        sft=_sft(recipe.sft, recipe.seed),
        online=OnlineConfig(
            optimizer=_optimizer(rl),
            steps=rl.steps,
            eval_every=rl.eval_every,
            checkpoint_every=rl.checkpoint_every,
            page_every=rl.sample_every,
            patience=rl.patience,
            dynamic_sampling_rounds=rl.dynamic_sampling_rounds,
            self_imitation=rl.self_imitation,
        ),
        rollout=rollout,
        credit=_credit(recipe, plugins.get("rl.estimator")),
        loss=LossConfig(**rl.loss),
        prompts=PromptConfig(
            prompts=rl.prompts,
            steps=rl.steps,
            seed=recipe.seed,
            difficulty=rl.difficulty,
            balance=_balance(recipe),
            unsolved_share=rl.unsolved_share,
            init_from=recipe.init_from,
        ),
        offline=OfflineConfig(
            group_size=rl.group_size,
            rows=rollout.rows,
            micro_batches=rl.loss.micro_batches,
            seed=recipe.seed,
            batch_size=recipe.eval.batch_size,
            **recipe.offline.to_dict(),
        ),
        reward=reward,
        measure=_measure(recipe, common["data"]),
        filter=_filter(recipe),
    )


def _rollout(recipe: Recipe) -> RolloutConfig:
    rl = recipe.rl
    if rl.group_size < 1 + (recipe.method == "rl"):
        raise UserError(f"group_size={rl.group_size}: the group baseline needs at least 2")
    names = ("prompts", "group_size", "temperature", "top_k", "top_p", "batch_compactions")
    return RolloutConfig(
        **{name: rl[name] for name in names},
        kl_coef=rl.kl_coef,
        loss_aggregation=rl.loss_aggregation,
        micro_batches=rl.loss.micro_batches,
        stepwise=rl.estimator in STEPWISE or is_plugin(rl.estimator),
    )


def _credit(recipe: Recipe, plugin: Plugin | None) -> CreditConfig:
    rl, options = recipe.rl, {}
    if plugin is None and rl.estimator not in ESTIMATORS:
        raise UserError(
            f"rl.estimator={rl.estimator!r}: expected one of {tuple(ESTIMATORS)}, or "
            "package.module:function"
        )
    if rl.srpo.critical not in CRITICAL:
        raise UserError(f"rl.srpo.critical={rl.srpo.critical!r}: expected one of {CRITICAL}")
    for name, interval in SRPO_RANGES.items():
        check_range(f"rl.srpo.{name}", rl.srpo[name], interval)
    if rl.estimator == "srpo":
        options = rl.srpo.to_dict()
        options["correct_from"] = min(rl.srpo.correct_from, FULL_REWARD)
    return CreditConfig(
        estimator=checked_estimator(plugin) if plugin else ESTIMATORS[rl.estimator],
        options=options,
        group_size=rl.group_size,
        min_std=rl.min_std,
        advantage_clip=rl.advantage_clip,
        negative_advantage_weight=rl.negative_advantage_weight,
    )


def _reward(recipe: Recipe, plugins: Mapping[str, Plugin]) -> RewardConfig:
    reward, schema = recipe.reward, CotSchema.build(**chain_options(recipe))
    step, outcome = plugins.get("reward.step"), plugins.get("reward.outcome")
    return RewardConfig(
        step=step and checked_step_reward(step.value, f"reward.step={step.name}", schema),
        outcome=outcome
        and checked_outcome_reward(outcome.value, f"reward.outcome={outcome.name}", schema),
        prm=reward.prm,
        orm=reward.orm,
        combine=reward.combine,
        votes=reward.votes,
        batch_size=reward.batch_size,
        devices=reward.devices,
        format_weight=recipe.rl.format_weight,
        refresh=RefreshConfig(
            every=reward.refresh_every,
            steps=reward.refresh_steps,
            batch_size=reward.refresh_batch_size,
            learning_rate=reward.refresh_learning_rate,
            seed=recipe.seed,
        ),
    )


def _predict(recipe: Recipe, common: dict[str, Any]) -> PredictConfig:
    return PredictConfig(
        **common,
        checkpoint=recipe.checkpoint,
        phase=recipe.phase,
        evaluation=_evaluation(recipe),
        decide=DecideConfig(**recipe.decide.to_dict(), seed=recipe.seed),
        output=OutputConfig(**recipe.predict.to_dict()),
    )


def _annotate(recipe: Recipe, common: dict[str, Any]) -> AnnotateConfig:
    return AnnotateConfig(
        **common,
        checkpoint=recipe.checkpoint,
        phase=recipe.phase,
        evaluation=_evaluation(recipe),
        **recipe.annotate.to_dict(),
    )


def _filter_run(recipe: Recipe, common: dict[str, Any]) -> FilterRunConfig:
    return FilterRunConfig(
        **common,
        checkpoint=recipe.checkpoint,
        measure=_measure(recipe, common["data"]),
        filter=_filter(recipe),
    )


def _prm_run(recipe: Recipe, common: dict[str, Any]) -> PrmRunConfig:
    return PrmRunConfig(
        **common,
        checkpoint=recipe.checkpoint,
        eval_split=recipe.data.eval_split,
        reference_sft=_sft(recipe.reference_sft, recipe.seed, "reference_sft"),
        sft=_sft(recipe.sft, recipe.seed),
        prm=PrmConfig(**recipe.prm.to_dict()),
    )


def _orm_run(recipe: Recipe, common: dict[str, Any]) -> OrmRunConfig:
    return OrmRunConfig(
        **common,
        checkpoint=recipe.checkpoint,
        eval_split=recipe.data.eval_split,
        sft=_sft(recipe.sft, recipe.seed),
        orm=OrmConfig(**recipe.orm.to_dict()),
    )
