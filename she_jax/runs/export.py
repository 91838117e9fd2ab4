"""Exports a policy as a Hugging Face directory, with a record of how it is prompted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from she_jax.generate.frame import added_tokens
from she_jax.generate.language_model import PROMPT_FILE, LanguageModel
from she_jax.generate.prompts import PromptFormat
from she_jax.models.sharding import make_mesh
from she_jax.models.vocabulary import Vocabulary
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


_RULES = {
    "encode": "the whole prompt at once, as one text; a chain apart from its prompt",
    "texts": "NFC, single blanks, none at the ends; one line for each field of the product",
    "too long": "cut the product's end, then the query's; never what stands around them",
    "names of added tokens in a query or a product": (
        "are text, no tokens; transformers: apply_chat_template(..., sanitize_control_tokens=True)"
    ),
}


def export(folder: Path, lm: LanguageModel, params: Any, chain: Mapping[str, Any]) -> None:
    """Writes a policy for ``transformers``, with ``she_jax.json``: prompt, lengths and chain.

    Args:
      folder: replaced if it exists, as a stopped export may be incomplete.
      lm: model and prompts.
      params: of the policy.
      chain: the keyword arguments of ``CotSchema.build``.
    """
    prompts = lm.prompts
    vocabulary = Vocabulary(
        tokenizer=prompts.tokenizer,
        eos_ids=prompts.eos_ids,
        pad_id=prompts.pad_id,
        chat_template=prompts.chat_template,
        specials=prompts.specials,
    )
    greedy = {  # by default some programs sample, and stop long before a chain's end
        "do_sample": False,
        "temperature": 0.0,
        "max_new_tokens": prompts.completion_length,
    }
    parameters = jax.device_get(params)
    save_model(folder, lm.model.config, parameters, vocabulary, overwrite=True, generation=greedy)
    lengths = {
        "prompt_length": prompts.prompt_length,
        "completion_length": prompts.completion_length,
        "thinking": prompts.thinking,
    }
    record = {**prompt_record(prompts), "model": lengths, "chain": dict(chain)}
    write_json(folder / PROMPT_FILE, record)


def prompt_record(prompts: PromptFormat) -> dict[str, Any]:
    """How a prompt is written and encoded: a text to fill in, and how to call the tokenizer.

    The text lacks the begin token where the tokenizer puts it before every text, as it does by
    default; ``add_special_tokens`` is False where that would add what was not there in training.
    """
    frame = prompts.frame
    before, after = added_tokens(prompts.tokenizer)
    begin = "".join(prompts.tokenizer.id_to_token(index) or "" for index in before)
    opening = frame.opening if prompts.chat_template is not None else begin + frame.opening
    default = not after and opening.startswith(begin)
    opening = opening.removeprefix(begin) if default else opening
    record: dict[str, Any] = {
        "prompt": f"{opening} {{query}}\n{{field}}: {{text}}\n{{field}}: {{text}}{frame.closing}",
        "add_special_tokens": default,
        "rules": dict(_RULES),
    }
    if prompts.chat_template is not None:
        record["template"] = {"enable_thinking": prompts.thinking}
    if frame.closed_thought:
        record["rules"]["thought"] = "the template opens one, and the prompt closes it at once"
    return record
