"""Exports a policy as a Hugging Face directory."""

from pathlib import Path
from typing import Any

import jax

from she_jax.generate.language_model import Policy
from she_jax.models.weights import save_model
from she_jax.training.files import write_json
from she_jax.training.setup import ASKED
from she_jax.training.workdir import Config


def export(config: Config, folder: Path, policy: Policy, params: Any) -> None:
    """Writes a policy as a Hugging Face directory, with ``she_jax.json``: how it is asked."""
    own = policy.format
    before, between, behind = own.frame()
    lengths = {name: config.model[name] for name in ("prompt_length", "completion_length")}
    prompt = f"{before} {{query}}{between}\n{{field}}: {{text}}\n{{field}}: {{text}}{behind}"
    told = {"prompt": prompt, "model": lengths, "chain": config.chain.to_dict()}
    save_model(
        folder,
        policy.model.config,
        jax.device_get(params),
        own.tokenizer,
        eos_ids=own.eos_ids,
        pad_id=own.pad_id,
        chat_template=own.chat_template,
        specials=own.specials,
        overwrite=True,  # of a run that was stopped in between
    )
    write_json(folder / ASKED, told)
