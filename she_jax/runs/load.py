"""Builds or loads the policy of a run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from she_jax.cot import CotSchema
from she_jax.data.dataset import PreparedDataset, open_split
from she_jax.generate.language_model import (
    PROMPT_FILE,
    LanguageModel,
    LanguageModelConfig,
    with_lengths,
)
from she_jax.generate.lengths import Sizes, check_lengths, choose_lengths, longer_prompts, measure
from she_jax.runs.config import RunConfig, TrainConfig, read_run
from she_jax.training.checkpoint import Checkpoints
from she_jax.training.logging import log
from she_jax.training.setup import (
    make_language_model,
    read_tokenizer,
    run_tokenizer,
    split_mesh,
)
from she_jax.training.workdir import keep_settings, read_recipe
from she_jax.types import UserError

PHASES = ("policy", "sft")  # of a policy's run, the later one first


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where exactly a policy is from; as text a phrase for messages.

    Attributes:
      folder: of its run; None for a model in files.
      phase: the run's folder of checkpoints, ``policy`` or ``sft``; "" for a model in files.
      text: the phrase.
    """

    folder: Path | None
    phase: str
    text: str

    def __str__(self) -> str:
        return self.text


def new_policy(
    config: TrainConfig, workdir: Path, dataset: PreparedDataset
) -> tuple[LanguageModel, Any]:
    """The policy before any training, its parameters laid out on the mesh.

    A tokenizer that is trained is kept in the run's folder, and read again on resume.
    """
    mesh, _ = split_mesh(config.mesh, config.reward.devices)
    tokenizer = None
    if config.model.name == "scratch":
        size = config.model.vocab_size
        tokenizer = run_tokenizer(workdir, dataset, size, config.init_from)
    lm, params = make_language_model(
        config.model, config.schema, mesh, seed=config.seed, tokenizer=tokenizer
    )
    if config.data.name == "shopworld" and not _unmeasured(config.model):
        return lm, params
    sizes = measure(lm.prompts, open_split(dataset.path, "train"))
    if _unmeasured(config.model):
        lm = fit_lengths(lm, config.model, sizes)
        lengths = {
            "prompt_length": lm.prompts.prompt_length,
            "completion_length": lm.prompts.completion_length,
        }
        keep_settings(workdir, {"model": lengths})
    if config.sft.steps and not config.init_from:
        check_lengths(sizes, lm.prompts.completion_length)
    return lm, params


def _unmeasured(model: LanguageModelConfig) -> bool:
    return 0 in (model.prompt_length, model.completion_length)


def fit_lengths(lm: LanguageModel, config: LanguageModelConfig, sizes: Sizes) -> LanguageModel:
    """The language model with the lengths that a config leaves to the pairs, and says them.

    Args:
      lm: made of ``config``.
      config: a length other than 0 is kept.
      sizes: of the pairs.
    """
    prompt, completion = choose_lengths(
        lm.prompts,
        sizes,
        pretrained=config.name != "scratch",
        context=lm.model.config.max_positions,
    )
    prompt, completion = config.prompt_length or prompt, config.completion_length or completion
    log(
        f"lengths, by the pairs: model.prompt_length={prompt}, model.completion_length={completion}"
    )
    if longer := longer_prompts(sizes, prompt, lm.model.config.max_positions):
        log(longer)
    return with_lengths(lm, prompt, completion)


def load_policy(
    config: RunConfig, checkpoint: str, mesh: Mesh, phases: Sequence[str] = PHASES
) -> tuple[LanguageModel, Any, Source]:
    """The policy of a checkpoint, and where exactly it is from.

    A run's folder brings its own model, chain and lengths, and the best checkpoint of the first of
    ``phases`` that it has.

    Args:
      config: gives model, chain and seed where the checkpoint is a model in files.
      checkpoint: a run's folder, a Hugging Face directory or a .gguf file.
      mesh: the devices.
      phases: folders under ``checkpoints/``.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      UserError: if the folder is one of a curriculum.
    """
    folder = Path(checkpoint)
    if not checkpoint:
        raise UserError("evaluating needs --config.checkpoint: a run's folder or a model's")
    recipe = read_recipe(folder) if (folder / "config.json").is_file() else {}
    if "kind" not in recipe:
        source = Source(folder=None, phase="", text=checkpoint)
        return *_model_in_files(config, checkpoint, mesh), source
    if recipe["kind"] == "curriculum":
        raise UserError(
            f"checkpoint={folder} has stages: give one of them, for example "
            f"{folder / max(recipe['stages'])}"
        )
    return load_run(folder, mesh, phases)


def load_run(
    folder: Path, mesh: Mesh, phases: Sequence[str] = PHASES
) -> tuple[LanguageModel, Any, Source]:
    """The policy of a run, and where exactly it is from.

    Raises:
      FileNotFoundError: if the run has no whole checkpoint, or none of these phases.
    """
    run = read_run(folder)
    tokenizer = read_tokenizer(folder) if run.model.name == "scratch" else None
    lm, params = make_language_model(
        run.model, run.schema, mesh, seed=run.seed, tokenizer=tokenizer
    )
    for phase in phases:
        if (folder / "checkpoints" / phase).is_dir():
            restored = Checkpoints(folder / "checkpoints" / phase).restore_params(params)
            if restored is not None:
                text = f"{folder}, {phase} step {restored[0]}"
                return lm, restored[1], Source(folder=folder, phase=phase, text=text)
    names = " or ".join(phases)
    raise FileNotFoundError(f"{folder / 'checkpoints'} holds no whole {names}: train first")


def _model_in_files(config: RunConfig, checkpoint: str, mesh: Mesh) -> tuple[LanguageModel, Any]:
    model, schema = replace(config.model, name=checkpoint), config.schema
    record = Path(checkpoint) / PROMPT_FILE
    if record.is_file():  # exported by a run: prompted as it was trained
        prompted = json.loads(record.read_text(encoding="utf-8"))
        model = replace(model, **prompted["model"])
        schema = CotSchema.build(**prompted["chain"])
    return make_language_model(model, schema, mesh, seed=config.seed)
