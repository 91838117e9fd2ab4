"""The folder of a trained reward model, which describes itself to the run that uses it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from she_jax.cot import CotSchema
from she_jax.generate.language_model import LanguageModel, LanguageModelConfig
from she_jax.training.checkpoint import Checkpoints
from she_jax.training.files import write_json
from she_jax.training.setup import make_language_model, read_tokenizer
from she_jax.types import UserError


@dataclass(frozen=True, kw_only=True)
class RewardArtifact:
    """Layout of the folders of one kind of reward model.

    Attributes:
      key: the config key that names such a folder.
      kind: kind of the run that trains it, also the name of its recipe and its checkpoints.
      name: name of the reward model in messages.
      file: in the folder: the description, all that is needed to load the reward model.
    """

    key: str
    kind: str
    name: str
    file: str

    def describe(
        self,
        folder: Path,
        lm: LanguageModel,
        model: LanguageModelConfig,
        chain: Mapping[str, Any],
        **options: Any,
    ) -> None:
        """Writes the description of a reward model whose training is done.

        Args:
          folder: of the run that trained it.
          lm: the reward model.
          model: how it is built.
          chain: the keyword arguments of ``CotSchema.build``.
          options: of this kind of reward model.
        """
        write_json(
            folder / self.file,
            {
                "kind": self.kind,
                "chain": dict(chain),
                "model": asdict(model),
                "tokens": token_format(lm),
                **options,
            },
        )

    def check(self, folder: Path, schema: CotSchema) -> dict[str, Any]:
        """Checks that a folder holds a reward model of this kind, trained for chains of ``schema``.

        Returns:
          The description.

        Raises:
          FileNotFoundError: if there is none, or its training has not finished.
          UserError: if the folder is of another kind of run, or its chain has other steps or
            labels.
        """
        setting = f"{self.key}={folder}"
        hint = f"train one with the recipe {self.kind}"
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{setting}: there is no {self.name} there; {hint}")
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("kind")
        if kind != self.kind:
            raise UserError(f"{setting} is a run of kind {kind!r}, not {self.kind!r}; {hint}")
        if not (folder / "summary.json").is_file() or not (folder / self.file).is_file():
            raise FileNotFoundError(
                f"{setting} is not done: start the command that trains it again"
            )
        description = json.loads((folder / self.file).read_text(encoding="utf-8"))
        learned = CotSchema.build(**description["chain"])
        if learned.names != schema.names:
            raise UserError(
                f"{setting} is for chains of the steps {learned.names}, and the policy writes "
                f"{schema.names}; {hint} and a policy of this chain"
            )
        for step, ours in zip(learned.steps, schema.steps, strict=True):
            if step.verdicts != ours.verdicts:
                raise UserError(
                    f"{setting} is for the verdicts {step.verdicts} of the step {step.name!r}, and "
                    f"the policy writes {ours.verdicts}; {hint} for a policy of these labels"
                )
        return description

    def load(
        self,
        folder: Path,
        description: Mapping[str, Any],
        mesh: Mesh,
        prepare: Callable[[LanguageModel, Any], Any] = lambda lm, params: params,
    ) -> tuple[LanguageModel, Any]:
        """The trained reward model: a language model and its parameters.

        Args:
          folder: a folder that passed ``check``.
          description: as returned by ``check``.
          mesh: the devices.
          prepare: (language model, its parameters) -> parameters of the shape that was trained.

        Raises:
          FileNotFoundError: if there is no complete checkpoint.
          UserError: if the tokenizer is not the one that it was trained with.
        """
        model = LanguageModelConfig(**description["model"])
        tokenizer = read_tokenizer(folder) if model.name == "scratch" else None
        schema = CotSchema.build(**description["chain"])
        lm, params = make_language_model(model, schema, mesh, tokenizer=tokenizer)
        if token_format(lm) != description["tokens"]:
            raise UserError(
                f"{self.key}={folder}: its tokenizer is not the one it was trained with; put the "
                "old one back, or train it anew"
            )
        template = prepare(lm, params)
        restored = Checkpoints(folder / "checkpoints" / self.kind).restore_params(template)
        if restored is None:
            raise FileNotFoundError(f"{self.key}={folder} holds no whole checkpoint: train it anew")
        return lm, restored[1]


def token_format(lm: LanguageModel) -> dict[str, Any]:
    """What decides how rollouts look as tokens, as JSON values.

    The digest of the tokenizer is independent of white space in its file.
    """
    return {
        "tokenizer": hashlib.sha256(lm.prompts.tokenizer.to_str().encode()).hexdigest(),
        "chat_template": lm.prompts.chat_template,
        "eos_ids": list(lm.prompts.eos_ids),
    }
