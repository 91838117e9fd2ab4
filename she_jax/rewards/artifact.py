"""Checks and loads the folder of a trained reward model for the run that uses it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from she_jax.cot import CotSchema
from she_jax.generate.language_model import Policy
from she_jax.training.checkpoint import Checkpoints
from she_jax.training.workdir import Config


@dataclass(frozen=True, kw_only=True)
class RewardFolder:
    """Layout of the folders of one kind of reward model.

    Attributes:
      key: the config key that names the folder.
      kind: kind of the run that trains it, also the name of its recipe and its checkpoints.
      name: name of the reward model in messages.
      identity: file in the folder with the tokenizer description that ``restore`` checks.
    """

    key: str
    kind: str
    name: str
    identity: str

    def check(self, folder: Path, config: Config) -> Config:
        """Checks that a folder holds a reward model of this kind, trained for the config's chain.

        Returns:
          The config that it was trained with.

        Raises:
          FileNotFoundError: if there is none, or its training has not finished.
          ValueError: if the folder is of another kind of run, or its chain has other steps.
        """
        path, setting = folder / "config.json", f"{self.key}={folder}"
        hint = f"train one with --config=configs/{self.kind}.py"
        if not path.is_file():
            raise FileNotFoundError(f"{setting}: there is no {self.name} there; {hint}")
        trained_config: Config = ConfigDict(json.loads(path.read_text(encoding="utf-8")))
        if (kind := trained_config.get("kind")) != self.kind:
            raise ValueError(f"{setting} is a run of kind {kind!r}, not {self.kind!r}; {hint}")
        chains = [CotSchema.build(**c.chain.to_dict()).names for c in (trained_config, config)]
        if chains[0] != chains[1]:
            raise ValueError(
                f"{setting} is for chains of the steps {chains[0]}, and the policy "
                f"writes {chains[1]}; {hint} and a policy of this chain"
            )
        if not (folder / "summary.json").is_file():
            raise FileNotFoundError(
                f"{setting} is not done: start the command that trains it again"
            )
        return trained_config

    def restore(self, folder: Path, policy: Policy, described: Mapping[str, Any]) -> Policy:
        """Returns the policy with the trained parameters of the folder.

        Args:
          folder: a folder that passed ``check``.
          policy: built from the folder's config, with untrained parameters.
          described: description of this policy, to be equal to the ``identity`` file.

        Raises:
          FileNotFoundError: if there is no complete checkpoint.
          ValueError: if the tokenizer is not the one that it was trained with.
        """
        trained = json.loads((folder / self.identity).read_text(encoding="utf-8"))
        if dict(described) != trained:
            raise ValueError(
                f"{self.key}={folder}: its tokenizer is not the one it was trained with; put the "
                "old one back, or train it anew"
            )
        restored = Checkpoints(folder / "checkpoints" / self.kind).restore_params(policy.params)
        if restored is None:
            raise FileNotFoundError(f"{self.key}={folder} holds no whole checkpoint: train it anew")
        return Policy(**vars(policy) | {"params": restored[1]})


def tokenizer_digest(policy: Policy) -> str:
    """Returns a digest of the policy's tokenizer, independent of white space in its file."""
    return hashlib.sha256(policy.format.tokenizer.to_str().encode()).hexdigest()
