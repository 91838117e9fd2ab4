"""Exports a policy as a Hugging Face directory, with a record of how it is prompted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from she_jax.generate.language_model import PROMPT_FILE, LanguageModel
from she_jax.models.tokenizer import Vocabulary
from she_jax.models.weights import save_model
from she_jax.training.files import write_json


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
