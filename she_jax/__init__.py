"""SHE in JAX: stepwise reward policy optimization (SRPO) for search relevance.

The names below are the whole public interface. The import reads no file and no flag, and nothing
else is imported before a name is first used: a mistake on the command line need not wait for JAX.
"""

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from she_jax.cot import Chain, CotSchema, LabelSet, ParsedStep, Step
    from she_jax.generate.sampler import sample
    from she_jax.models.decoder import ModelConfig, build_model, init_params
    from she_jax.models.sharding import make_mesh
    from she_jax.models.weights import load_model
    from she_jax.rewards.verifier import (
        OutcomeRewardFn,
        StepRewardFn,
        annotation_reward,
        label_reward,
        step_batch,
    )
    from she_jax.rl.advantages import (
        ESTIMATORS,
        clip_advantages,
        dr_grpo_advantages,
        grpo_advantages,
        informative_groups,
        process_advantages,
        prorag_advantages,
        rloo_advantages,
        srpo_advantages,
        token_advantages,
    )
    from she_jax.rl.logprobs import token_logps
    from she_jax.rl.losses import (
        LossConfig,
        dpo_loss,
        loss_denominators,
        policy_loss,
        sft_loss,
        token_weights,
    )
    from she_jax.rl.steps import step_ids, step_token_counts
    from she_jax.rl.update import (
        jit_update_step,
        make_dpo_step,
        make_scorer,
        make_sft_step,
        make_update_step,
    )
    from she_jax.runs.api import Judge, load_judge, train
    from she_jax.types import (
        Advantages,
        BadRow,
        DpoBatch,
        Example,
        LMOutput,
        PromptBatch,
        Rollout,
        SftBatch,
        StepBatch,
        TrainBatch,
        TrainState,
        UserError,
    )

__version__ = "0.1.0"

_NAMES = {  # by the module that has them
    "she_jax.cot": "Chain CotSchema LabelSet ParsedStep Step",
    "she_jax.generate.sampler": "sample",
    "she_jax.models.decoder": "ModelConfig build_model init_params",
    "she_jax.models.sharding": "make_mesh",
    "she_jax.models.weights": "load_model",
    "she_jax.rewards.verifier": (
        "OutcomeRewardFn StepRewardFn annotation_reward label_reward step_batch"
    ),
    "she_jax.rl.advantages": (
        "ESTIMATORS clip_advantages dr_grpo_advantages grpo_advantages informative_groups "
        "process_advantages prorag_advantages rloo_advantages srpo_advantages token_advantages"
    ),
    "she_jax.rl.logprobs": "token_logps",
    "she_jax.rl.losses": (
        "LossConfig dpo_loss loss_denominators policy_loss sft_loss token_weights"
    ),
    "she_jax.runs.api": "Judge load_judge train",
    "she_jax.rl.steps": "step_ids step_token_counts",
    "she_jax.rl.update": "jit_update_step make_dpo_step make_scorer make_sft_step make_update_step",
    "she_jax.types": (
        "Advantages BadRow DpoBatch Example LMOutput PromptBatch Rollout SftBatch StepBatch "
        "TrainBatch TrainState UserError"
    ),
}
# These need the packages of the full install; the rest needs JAX, optax and jaxtyping.
_FULL = {
    "she_jax.generate.sampler",
    "she_jax.models.decoder",
    "she_jax.models.weights",
    "she_jax.runs.api",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

# Old names, kept for one release.
_RENAMED = {"row_counts": "loss_denominators"}

__all__ = [
    "ESTIMATORS",
    "Advantages",
    "BadRow",
    "Chain",
    "CotSchema",
    "DpoBatch",
    "Example",
    "Judge",
    "LMOutput",
    "LabelSet",
    "LossConfig",
    "ModelConfig",
    "OutcomeRewardFn",
    "ParsedStep",
    "PromptBatch",
    "Rollout",
    "SftBatch",
    "Step",
    "StepBatch",
    "StepRewardFn",
    "TrainBatch",
    "TrainState",
    "UserError",
    "annotation_reward",
    "build_model",
    "clip_advantages",
    "dpo_loss",
    "dr_grpo_advantages",
    "grpo_advantages",
    "informative_groups",
    "init_params",
    "jit_update_step",
    "label_reward",
    "load_judge",
    "load_model",
    "loss_denominators",
    "make_dpo_step",
    "make_mesh",
    "make_scorer",
    "make_sft_step",
    "make_update_step",
    "policy_loss",
    "process_advantages",
    "prorag_advantages",
    "rloo_advantages",
    "sample",
    "sft_loss",
    "srpo_advantages",
    "step_batch",
    "step_ids",
    "step_token_counts",
    "token_advantages",
    "token_logps",
    "token_weights",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(
            f"she_jax.{name} is now she_jax.{_RENAMED[name]}", DeprecationWarning, stacklevel=2
        )
        name = _RENAMED[name]
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("she_jax"):
            raise
        raise ImportError(f"she_jax.{name}: {lacking(error)}") from None


def lacking(error: ModuleNotFoundError) -> str:
    """What a module beyond the core lacks, and how to get it."""
    return (
        f"there is no package {error.name!r}; this needs the full install: pip install she_jax, or "
        "pip install . in a checkout"
    )


def __dir__() -> list[str]:
    """The names that can be loaded, which is what ``help`` does."""
    full = all(find_spec(package) for package in ("flax", "ml_collections", "safetensors"))
    return [*globals(), *(name for name in __all__ if full or _MODULES[name] not in _FULL)]
