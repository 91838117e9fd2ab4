"""Exports a policy as a Hugging Face directory, with a record of how it is prompted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from she_jax.generate.language_model import PROMPT_FILE, LanguageModel
from she_jax.models.sharding import make_mesh
from she_jax.models.tokenizer import Vocabulary
from she_jax.models.weights import save_model
from she_jax.runs.config import read_run
from she_jax.runs.load import load_run
from she_jax.training.files import write_json
from she_jax.training.logging import log
from she_jax.training.workdir import lock_workdir, read_recipe
from she_jax.types import UserError


def export_run(run: Path) -> Path:
    """Exports the best policy that a run has so far, to ``run/export``, which is returned.

    Raises:
      FileNotFoundError: if there is no run, or it has no checkpoint yet.
      UserError: if the folder is not of a policy's run.
    """
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run}: there is no run; expected the folder of a policy's run")
    if (kind := read_recipe(run).get("kind")) != "train":
        raise UserError(f"{run}: kind={kind!r}; expected the folder of a policy's run")
    with lock_workdir(run):
        lm, params, source = load_run(run, make_mesh(fsdp=-1))  # parameters split over the devices
        log(f"exporting {source}")
        export(run / "export", lm, params, read_run(run).chain)
    return run / "export"


def export(folder: Path, lm: LanguageModel, params: Any, chain: Mapping[str, Any]) -> None:
    """Writes a policy for ``transformers``, with ``she_jax.json``: prompt, lengths and chain.

    Args:
      folder: replaced if it exists, as a stopped export may be incomplete.
      lm: model and prompts.
      params: of the policy.
      chain: the keyword arguments of ``CotSchema.build``.
    """
    prompts = lm.prompts
    before, between, after = prompts.template_pieces()
    lengths = {
        "prompt_length": prompts.prompt_length,
        "completion_length": prompts.completion_length,
    }
    prompt = f"{before} {{query}}{between}\n{{field}}: {{text}}\n{{field}}: {{text}}{after}"
    vocabulary = Vocabulary(
        tokenizer=prompts.tokenizer,
        eos_ids=prompts.eos_ids,
        pad_id=prompts.pad_id,
        chat_template=prompts.chat_template,
        specials=prompts.specials,
    )
    save_model(folder, lm.model.config, jax.device_get(params), vocabulary, overwrite=True)
    write_json(folder / PROMPT_FILE, {"prompt": prompt, "model": lengths, "chain": dict(chain)})
