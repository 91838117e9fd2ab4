"""Exports a policy as a Hugging Face directory, with a record of how it is prompted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from she_jax.generate.frame import QUERY, added_tokens
from she_jax.generate.language_model import PROMPT_FILE, LanguageModel
from she_jax.generate.prompts import PromptFormat, instruction
from she_jax.models.sharding import make_mesh
from she_jax.models.vocabulary import Vocabulary
from she_jax.models.weights import save_model
from she_jax.runs.config import read_run
from she_jax.runs.load import load_run
from she_jax.training.files import write_json
from she_jax.training.logging import log
from she_jax.training.workdir import lock_workdir, read_recipe
from she_jax.types import UserError

_RULES = {
    "encode": "the whole prompt at once, as one text; a chain apart from its prompt",
    "texts": (
        "NFC, single blanks, none at the ends, no control characters, HTML read as text; the "
        "product's fields as in training"
    ),
    "too long": (
        "cut the product's end, the query's where it takes more than half of the room; nothing else"
    ),
    "answer": "greedy; the label is in the line that begins with 'label: '",
}
_NAMES = "names of added tokens in a query or a product"


def export_run(run: Path, dtype: str = "") -> Path:
    """Exports the best policy that a run has so far, to ``run/export``, which is returned.

    Args:
      run: the folder of a policy's run.
      dtype: of the weights, float32 or bfloat16; "" for that of the model that the run began with.

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
        log(f"exporting {source} in {dtype or lm.stored_dtype}")
        export(run / "export", lm, params, read_run(run).chain, dtype)
    return run / "export"


def export(
    folder: Path, lm: LanguageModel, params: Any, chain: Mapping[str, Any], dtype: str = ""
) -> None:
    """Writes a policy for ``transformers``, with ``she_jax.json``: prompt, lengths and chain.

    Args:
      folder: replaced if it exists, as a stopped export may be incomplete.
      lm: model and prompts.
      params: of the policy.
      chain: the keyword arguments of ``CotSchema.build``.
      dtype: of the weights, float32 or bfloat16; "" for ``lm.stored_dtype``.
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
    stored = jnp.dtype(dtype or lm.stored_dtype)
    weights = jax.tree.map(lambda leaf: np.asarray(leaf).astype(stored, copy=False), params)
    save_model(folder, lm.model.config, weights, vocabulary, overwrite=True, generation=greedy)
    lengths = {
        "prompt_length": prompts.prompt_length,
        "completion_length": prompts.completion_length,
        "thinking": prompts.thinking,
    }
    record = {**prompt_record(prompts), "model": lengths, "chain": dict(chain)}
    write_json(folder / PROMPT_FILE, record)


def prompt_record(prompts: PromptFormat) -> dict[str, Any]:
    """How a prompt is written, as opening, query, fields and closing, and how it is encoded.

    The opening lacks the begin token where the tokenizer puts it before every text, as it does by
    default; ``add_special_tokens`` is False where that would add what was not there in training.
    """
    frame = prompts.frame
    before, after = added_tokens(prompts.tokenizer)
    begin = "".join(prompts.tokenizer.id_to_token(index) or "" for index in before)
    opening = frame.opening if prompts.chat_template is not None else begin + frame.opening
    default = not after and opening.startswith(begin)
    opening = opening.removeprefix(begin) if default else opening
    record: dict[str, Any] = {
        "prompt": {"opening": f"{opening} ", "field": "\n{name}: {text}", "closing": frame.closing},
        "add_special_tokens": default,
        "rules": dict(_RULES),
    }
    if prompts.chat_template is None:
        record["rules"][_NAMES] = "are text, no tokens: tokenizer(..., split_special_tokens=True)"
        return record
    record["template"] = {"enable_thinking": prompts.thinking}
    record["rules"][_NAMES] = (
        "are text, no tokens: apply_chat_template(..., sanitize_control_tokens=True)"
    )
    if frame.closed_thought:
        record["rules"]["thought"] = "the template opens one, and the prompt closes it at once"
    else:  # the whole message, query and product behind it, is what a server of chats is sent
        record["prompt"]["message"] = f"{instruction(prompts.schema)}\n\n{QUERY} "
    return record
