"""SHE in JAX: stepwise reward policy optimization (SRPO) for search relevance.

The names below are the whole public interface. The import reads no file and no flag. Names that
need more than JAX and optax are imported on first access.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from she_jax.cot import Chain, CotSchema, ParsedStep, Step
from she_jax.models.sharding import make_mesh
from she_jax.rl.advantages import (
    ESTIMATORS,
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
    policy_loss,
    row_counts,
    sft_loss,
    token_weights,
)
from she_jax.rl.steps import step_token_counts
from she_jax.rl.update import jit_update_step, make_dpo_step, make_sft_step, make_update_step
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
)

if TYPE_CHECKING:
    from she_jax.generate.sampler import sample
    from she_jax.models.decoder import ModelConfig, build_model, init_params
    from she_jax.models.weights import load_model

_LAZY = {
    "ModelConfig": "she_jax.models.decoder",
    "build_model": "she_jax.models.decoder",
    "init_params": "she_jax.models.decoder",
    "load_model": "she_jax.models.weights",
    "sample": "she_jax.generate.sampler",
}

__all__ = [
    "ESTIMATORS",
    "Advantages",
    "BadRow",
    "Chain",
    "CotSchema",
    "DpoBatch",
    "Example",
    "LMOutput",
    "LossConfig",
    "ModelConfig",
    "ParsedStep",
    "PromptBatch",
    "Rollout",
    "SftBatch",
    "Step",
    "StepBatch",
    "TrainBatch",
    "TrainState",
    "build_model",
    "dpo_loss",
    "dr_grpo_advantages",
    "grpo_advantages",
    "informative_groups",
    "init_params",
    "jit_update_step",
    "load_model",
    "make_dpo_step",
    "make_mesh",
    "make_sft_step",
    "make_update_step",
    "policy_loss",
    "process_advantages",
    "prorag_advantages",
    "rloo_advantages",
    "row_counts",
    "sample",
    "sft_loss",
    "srpo_advantages",
    "step_token_counts",
    "token_advantages",
    "token_logps",
    "token_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
