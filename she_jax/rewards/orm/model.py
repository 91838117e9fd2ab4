"""Scores rollouts with an outcome reward model (ORM), in batches, and loads one from its folder."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from she_jax.generate.language_model import LanguageModel
from she_jax.generate.prompts import positions
from she_jax.models.sharding import batch_sharding, shardings
from she_jax.rewards.artifact import RewardArtifact, token_format
from she_jax.rewards.orm.loss import chain_scores, init_orm_params
from she_jax.types import Rollout, UserError

ORM = RewardArtifact(
    key="reward.orm",
    kind="scalar_reward",
    name="outcome reward model",
    file="orm.json",
)


class OutcomeRewardModel:
    """An outcome reward model that scores rollouts.

    All batches of rollouts of one length have the same shape.

    Args:
      lm: the ORM's model and mesh.
      params: its parameters, the value vector included.
      batch_size: rollouts per batch, rounded up to a multiple of the devices. The last batch is
        padded with repeated rows.
    """

    def __init__(self, lm: LanguageModel, params: Any, batch_size: int):
        self._lm, self._params = lm, params
        devices = lm.mesh.shape["data"] * lm.mesh.shape["fsdp"]
        self._batch_size = math.ceil(batch_size / devices) * devices
        self._probabilities = jax.jit(self._score_batch)

    def score(self, rollout: Rollout) -> Float32[np.ndarray, "B"]:
        """Returns the probability that each rollout is correct, in [0, 1].

        Args:
          rollout: at least one row, on the host or on devices, tokenized with the tokenizer that
            the model was trained with. ``logps`` is not used.
        """
        masks = jax.device_get((rollout.prompt_mask, rollout.completion_mask))
        tokens, position_ids = np.asarray(rollout.tokens), positions(np.logical_or(*masks))
        rows = np.arange(math.ceil(len(tokens) / self._batch_size) * self._batch_size)
        batches = np.minimum(rows, len(tokens) - 1).reshape(-1, self._batch_size)
        layout = batch_sharding(self._lm.mesh)
        probabilities = [
            self._probabilities(
                self._params, *jax.device_put((tokens[batch], position_ids[batch]), layout)
            )
            for batch in batches
        ]
        return np.concatenate(jax.device_get(probabilities))[: len(tokens)]

    def _score_batch(self, params: Any, tokens: Array, position_ids: Array) -> Float[Array, "B"]:
        forward = self._lm.model.forward
        return jax.nn.sigmoid(chain_scores(forward, params, tokens, position_ids))


def as_orm(lm: LanguageModel, params: Any) -> Any:
    """Parameters of an outcome reward model that begins as a policy, sharded over its mesh."""
    with_head = init_orm_params(params, lm.model.config.dim)
    return jax.device_put(with_head, shardings(with_head, lm.mesh))


def load_orm(folder: Path, lm: LanguageModel, batch_size: int) -> OutcomeRewardModel:
    """Loads the outcome reward model of a folder, for the rollouts of a policy.

    Args:
      folder: of a finished run of ``configs/scalar_reward.py``.
      lm: the policy whose rollouts are to be scored.
      batch_size: rollouts per batch.

    Raises:
      FileNotFoundError: if there is no finished outcome reward model in that folder.
      UserError: if the folder is of another kind of run, for another chain, or for another
        tokenizer, chat template or end-of-sequence token than the policy's.
    """
    description = ORM.check(folder, lm.prompts.schema)
    expected, actual = description["tokens"], token_format(lm)
    if mismatches := [name for name in expected if expected[name] != actual[name]]:
        raise UserError(
            f"{ORM.key}={folder} reads other tokens than the policy writes (another "
            f"{', another '.join(mismatches)}); train one for this policy with "
            f"the recipe {ORM.kind}"
        )
    return OutcomeRewardModel(*ORM.load(folder, description, lm.mesh, as_orm), batch_size)
