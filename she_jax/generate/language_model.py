"""A language model without its parameters: architecture, prompts and devices."""

from dataclasses import dataclass, replace

from jax.sharding import Mesh

from she_jax.generate.prompts import PromptFormat
from she_jax.models.decoder import Model, ModelConfig
from she_jax.types import UserError

PROMPT_FILE = "she_jax.json"  # beside an exported model: the prompt that it was trained with


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Which model, and how long its prompts and completions may be.

    Attributes:
      name: ``scratch``, or a model as ``she_jax.models.hub.locate_model`` takes it.
      dtype, remat: see ``ModelConfig``.
      prompt_length: P, tokens a prompt may have; 0 for as many as the pairs need.
      completion_length: C, tokens a completion may have, its end included; 0 as above.
      thinking: ``enable_thinking`` of the model's chat template.
      vocab_size: of the tokenizer, at most; from here on for ``scratch`` only.
      dim, layers, heads, kv_heads, head_dim, ffn: see ``ModelConfig``.
    """

    name: str
    dtype: str
    remat: bool
    prompt_length: int
    completion_length: int
    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    thinking: bool = False  # also that of runs from before there was a choice


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """What it takes to prompt a model, beside its parameters, which are always passed separately.

    Attributes:
      model: the decoder as pure functions.
      prompts: how examples become tokens, and tokens text.
      mesh: the devices.
      stored_dtype: in which the parameters are exported: bfloat16 if the model that training began
        with is stored so.
    """

    model: Model
    prompts: PromptFormat
    mesh: Mesh
    stored_dtype: str = "float32"


UNLIMITED = 1 << 20  # a length that is not chosen yet


def with_lengths(lm: LanguageModel, prompt_length: int, completion_length: int) -> LanguageModel:
    """The language model with other lengths.

    Raises:
      UserError: if they are beyond the model's context, or the prompt has no room for a product.
    """
    check_context(lm.model.config, prompt_length + completion_length)
    lengths = {"prompt_length": prompt_length, "completion_length": completion_length}
    return replace(lm, prompts=replace(lm.prompts, **lengths))


def check_context(model: ModelConfig, length: int) -> None:
    """Checks that sequences are no longer than those the model was trained on.

    Raises:
      UserError: if they are.
    """
    if length > model.max_positions:
        raise UserError(
            f"model.prompt_length, model.completion_length and the answers of a reward model take "
            f"{length} tokens together, and the model was trained on {model.max_positions} at most "
            "(max_position_embeddings): lower them"
        )
