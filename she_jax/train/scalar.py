"""The scalar reward model at work: one score for each rollout, a batch at a time."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from she_jax.data.prompts import positions
from she_jax.models.sharding import batch_sharding, shardings
from she_jax.rl.scalar import chain_scores, with_value
from she_jax.train.reward_folder import RewardFolder, tokenizer_digest
from she_jax.train.setup import Policy, make_policy
from she_jax.train.workdir import Config
from she_jax.types import Rollout

SCALAR = RewardFolder(
    key="reward.scalar",
    kind="scalar_reward",
    name="scalar reward model",
    identity="scalar_reward.json",
)


class ScalarReward:
    """A scalar reward model that scores rollouts.

    All batches have one shape for rollouts of one length.

    Args:
      policy: model, devices, and the parameters with the value among them.
      batch_size: rollouts at a time; the last batch is filled up with repetitions.
    """

    def __init__(self, policy: Policy, batch_size: int):
        self._policy = policy
        devices = policy.mesh.shape["data"] * policy.mesh.shape["fsdp"]
        self._batch_size = math.ceil(batch_size / devices) * devices
        self._probabilities = jax.jit(self._read)

    def score(self, rollout: Rollout) -> Float32[np.ndarray, "B"]:
        """The probability that each rollout is right, in [0, 1].

        Args:
          rollout: of at least one row, on the host or on devices, its tokens those of the
            tokenizer that the model was trained with. ``logps`` is not read.
        """
        masks = jax.device_get((rollout.prompt_mask, rollout.completion_mask))
        tokens, place = np.asarray(rollout.tokens), positions(np.logical_or(*masks))
        rows = np.arange(math.ceil(len(tokens) / self._batch_size) * self._batch_size)
        parts = np.minimum(rows, len(tokens) - 1).reshape(-1, self._batch_size)
        layout = batch_sharding(self._policy.mesh)
        found = [
            self._probabilities(
                self._policy.params, *jax.device_put((tokens[part], place[part]), layout)
            )
            for part in parts
        ]
        return np.concatenate(jax.device_get(found))[: len(tokens)]

    def _read(self, params: Any, tokens: Array, place: Array) -> Float[Array, "B"]:
        return jax.nn.sigmoid(chain_scores(self._policy.model.forward, params, tokens, place))


def as_scalar(policy: Policy) -> Policy:
    """The scalar reward model that begins as a policy, laid out on its mesh."""
    params = with_value(policy.params, policy.model.config.dim)
    return Policy(
        **vars(policy) | {"params": jax.device_put(params, shardings(params, policy.mesh))}
    )


def describe_scalar(policy: Policy) -> dict[str, Any]:
    """What ``scalar_reward.json`` holds: what a policy's rollouts must have in common with it."""
    return {
        "tokenizer": tokenizer_digest(policy),
        "chat_template": policy.format.chat_template,
        "eos_ids": list(policy.format.eos_ids),
    }


def load_scalar(config: Config, policy: Policy) -> ScalarReward:
    """The scalar reward model that ``config.reward.scalar`` names, for the rollouts of a policy.

    Args:
      config: of the policy's run.
      policy: whose rollouts it is to score.

    Raises:
      FileNotFoundError: if it is not there.
      ValueError: if it is of another kind, for another chain, or reads other tokens than the policy
        writes.
    """
    folder = Path(config.reward.scalar)
    own = SCALAR.check(folder, config)
    made = make_policy(own, folder, mesh=policy.mesh)
    read, written = describe_scalar(made), describe_scalar(policy)
    if others := [name for name in read if read[name] != written[name]]:
        raise ValueError(
            f"{SCALAR.key}={folder} reads other tokens than the policy writes (another "
            f"{', another '.join(others)}); train one for this policy with "
            f"--config=configs/{SCALAR.kind}.py"
        )
    return ScalarReward(SCALAR.restore(folder, as_scalar(made), read), config.reward.batch_size)
