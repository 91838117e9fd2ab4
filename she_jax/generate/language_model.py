"""A language model without its parameters: architecture, prompts and devices."""

from dataclasses import dataclass

from jax.sharding import Mesh

from she_jax.generate.prompts import PromptFormat
from she_jax.models.decoder import Model

PROMPT_FILE = "she_jax.json"  # beside an exported model: the prompt that it was trained with


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Which model, and how long its prompts and completions may be.

    Attributes:
      name: ``scratch``, or a model as ``she_jax.models.hub.locate_model`` takes it.
      dtype, remat: see ``ModelConfig``.
      prompt_length: P, tokens a prompt may have.
      completion_length: C, tokens a completion may have, its end included.
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


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """What it takes to prompt a model, beside its parameters, which are always passed separately.

    Attributes:
      model: the decoder as pure functions.
      prompts: how examples become tokens, and tokens text.
      mesh: the devices.
    """

    model: Model
    prompts: PromptFormat
    mesh: Mesh
