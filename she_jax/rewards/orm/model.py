"""Scores rollouts with an outcome reward model (ORM), in batches, and loads one from its folder."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from she_jax.generate.language_model import Policy
from she_jax.generate.prompts import positions
from she_jax.models.sharding import batch_sharding, shardings
from she_jax.rewards.artifact import RewardFolder, tokenizer_digest
from she_jax.rewards.orm.loss import chain_scores, with_value
from she_jax.training.setup import make_policy
from she_jax.training.workdir import Config
from she_jax.types import Rollout

SCALAR = RewardFolder(
    key="reward.scalar",
    kind="scalar_reward",
    name="scalar reward model",
    identity="scalar_reward.json",
)


class ScalarReward:
    """An outcome reward model that scores rollouts.

    All batches of rollouts of one length have the same shape.

    Args:
      policy: the ORM's model and mesh, and its parameters, the value vector included.
      batch_size: rollouts per batch, rounded up to a multiple of the devices. The last batch is
        padded with repeated rows.
    """

    def __init__(self, policy: Policy, batch_size: int):
        self._policy = policy
        devices = policy.mesh.shape["data"] * policy.mesh.shape["fsdp"]
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
        layout = batch_sharding(self._policy.mesh)
        probabilities = [
            self._probabilities(
                self._policy.params, *jax.device_put((tokens[batch], position_ids[batch]), layout)
            )
            for batch in batches
        ]
        return np.concatenate(jax.device_get(probabilities))[: len(tokens)]

    def _score_batch(self, params: Any, tokens: Array, position_ids: Array) -> Float[Array, "B"]:
        forward = self._policy.model.forward
        return jax.nn.sigmoid(chain_scores(forward, params, tokens, position_ids))


def as_scalar(policy: Policy) -> Policy:
    """Returns an outcome reward model initialized from a policy, sharded over its mesh."""
    params = with_value(policy.params, policy.model.config.dim)
    return Policy(
        **vars(policy) | {"params": jax.device_put(params, shardings(params, policy.mesh))}
    )


def describe_scalar(policy: Policy) -> dict[str, Any]:
    """Returns the content of ``scalar_reward.json``: the token format of the rollouts it scores."""
    return {
        "tokenizer": tokenizer_digest(policy),
        "chat_template": policy.format.chat_template,
        "eos_ids": list(policy.format.eos_ids),
    }


def load_scalar(config: Config, policy: Policy) -> ScalarReward:
    """Loads the outcome reward model that ``config.reward.scalar`` names.

    Args:
      config: config of the policy's run.
      policy: the policy whose rollouts are to be scored.

    Raises:
      FileNotFoundError: if there is no finished outcome reward model in that folder.
      ValueError: if the folder is of another kind of run, for another chain, or for another
        tokenizer, chat template or end-of-sequence token than the policy's.
    """
    folder = Path(config.reward.scalar)
    untrained = make_policy(SCALAR.check(folder, config), folder, mesh=policy.mesh)
    expected, actual = describe_scalar(untrained), describe_scalar(policy)
    if mismatches := [name for name in expected if expected[name] != actual[name]]:
        raise ValueError(
            f"{SCALAR.key}={folder} reads other tokens than the policy writes (another "
            f"{', another '.join(mismatches)}); train one for this policy with "
            f"--config=configs/{SCALAR.kind}.py"
        )
    trained = SCALAR.restore(folder, as_scalar(untrained), expected)
    return ScalarReward(trained, config.reward.batch_size)
