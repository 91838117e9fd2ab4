"""The folder of a trained reward model, as the run that it rewards finds it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from she_jax.cot import CotSchema
from she_jax.train.checkpoint import Checkpoints
from she_jax.train.setup import Policy
from she_jax.train.workdir import Config


@dataclass(frozen=True, kw_only=True)
class RewardFolder:
    """What folders of one kind of reward model have in common.

    Attributes:
      key: of the config, that names the folder.
      kind: of the run that trains it; its recipe and its checkpoints have the same name.
      name: for people.
      identity: the file in the folder by which its parts are known to fit together.
    """

    key: str
    kind: str
    name: str
    identity: str

    def check(self, folder: Path, config: Config) -> Config:
        """Checks that a folder holds such a reward model, and one for the config's chain.

        Returns:
          The config that it was trained with.

        Raises:
          FileNotFoundError: if there is none, or its training is not done.
          ValueError: if the folder is of another kind of run, or its chain has other steps.
        """
        path, where = folder / "config.json", f"{self.key}={folder}"
        hint = f"train one with --config=configs/{self.kind}.py"
        if not path.is_file():
            raise FileNotFoundError(f"{where}: there is no {self.name} there; {hint}")
        own: Config = ConfigDict(json.loads(path.read_text(encoding="utf-8")))
        if own.get("kind") != self.kind:
            raise ValueError(
                f"{where} is a run of kind {own.get('kind')!r}, not {self.kind!r}; {hint}"
            )
        chains = [CotSchema.build(**c.chain.to_dict()).names for c in (own, config)]
        if chains[0] != chains[1]:
            raise ValueError(
                f"{where} is for chains of the steps {chains[0]}, and the policy "
                f"writes {chains[1]}; {hint} and a policy of this chain"
            )
        if not (folder / "summary.json").is_file():
            raise FileNotFoundError(f"{where} is not done: start the command that trains it again")
        return own

    def restore(self, folder: Path, policy: Policy, described: Mapping[str, Any]) -> Policy:
        """The policy with the parameters that were trained.

        Args:
          folder: checked.
          policy: made of what the folder says, not trained.
          described: the same as the ``identity`` file, of this policy.

        Raises:
          FileNotFoundError: if no checkpoint is whole.
          ValueError: if the tokenizer is not the one that it was trained with.
        """
        trained = json.loads((folder / self.identity).read_text(encoding="utf-8"))
        if dict(described) != trained:
            raise ValueError(
                f"{self.key}={folder}: its tokenizer is not the one it was trained with; put the "
                "old one back, or train it anew"
            )
        found = Checkpoints(folder / "checkpoints" / self.kind).restore_params(policy.params)
        if found is None:
            raise FileNotFoundError(f"{self.key}={folder} holds no whole checkpoint: train it anew")
        return Policy(**vars(policy) | {"params": found[1]})


def tokenizer_digest(policy: Policy) -> str:
    """Tells one tokenizer from another, whatever white space its file has."""
    return hashlib.sha256(policy.format.tokenizer.to_str().encode()).hexdigest()
