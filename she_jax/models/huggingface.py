"""Reader and writer of a Hugging Face model directory: config.json, safetensors, tokenizer.

The GGUF reader returns the same tensor names and shapes, so that one loader
(``she_jax.models.weights``) handles both formats.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from she_jax.models.decoder import ModelConfig, RopeScaling
from she_jax.types import UserError

FAMILIES = ("llama", "qwen2", "qwen3")
SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")

# Size names of config.json to those of ModelConfig; the default of max_position_embeddings.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn",
}
_POSITIONS = {"llama": 2048, "qwen2": 32768, "qwen3": 32768}


class StoredTensor(NamedTuple):
    """A tensor in a file: its shape, a function that reads it, whether it is bfloat16 there."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    bfloat16: bool


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """Contents of a model's files, not yet checked against each other.

    Attributes:
      config: the declared architecture.
      tensors: by Hugging Face name, in Hugging Face's layout.
      tokenizer: without truncation or padding.
      eos_ids: declared end-of-sequence ids.
      pad_ids: declared padding ids, highest precedence first.
      chat_template: jinja2 source, or None.
      specials: text of the declared special tokens, by the names of ``SPECIALS``.
      notes: what the user should know of the files that were read, or not.
    """

    config: ModelConfig
    tensors: dict[str, StoredTensor]
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    pad_ids: tuple[int, ...]
    chat_template: str | None
    specials: dict[str, str]
    notes: tuple[str, ...] = ()


def read_directory(path: Path, stack: ExitStack) -> StoredModel:
    """Reads a Hugging Face directory; its tensors can be read until ``stack`` closes.

    Raises:
      FileNotFoundError: if a file is missing.
      UserError: if a file is damaged, or needs a feature that this library does not support.
    """
    if (path / "adapter_config.json").exists():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise UserError(
            f"{path}: holds an adapter (LoRA) of {base!r}, not a whole model: merge them with peft "
            "(merge_and_unload, then save_pretrained) and give that folder"
        )
    raw = read_json(path / "config.json")
    settings = read_json(path / "tokenizer_config.json", optional=True)
    generation = read_json(path / "generation_config.json", optional=True)
    tokenizer = _read_tokenizer(path / "tokenizer.json")
    specials = {}
    for name in SPECIALS:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None:
            specials[name] = value

    def declared(kind: str, *sources: Mapping[str, Any]) -> tuple[int, ...]:
        """Distinct ids in the order they are declared, the tokenizer's last."""
        ids = []
        for source in sources:
            value = source.get(f"{kind}_token_id")
            ids += value if isinstance(value, list) else [value]
        ids.append(tokenizer.token_to_id(specials.get(f"{kind}_token", "")))
        return tuple(dict.fromkeys(index for index in ids if index is not None))

    # generation_config.json takes precedence: the config.json of a chat model often still has the
    # end-of-sequence id of its base model.
    ends = generation if "eos_token_id" in generation else raw
    files, notes = _weight_files(path, raw)
    return StoredModel(
        config=read_config(path / "config.json", raw),
        tensors=_open_safetensors(files, stack),
        tokenizer=tokenizer,
        eos_ids=declared("eos", ends),
        pad_ids=declared("pad", generation, raw),
        chat_template=_read_template(path, settings),
        specials=specials,
        notes=notes,
    )


def read_json(file: Path, *, optional: bool = False) -> dict[str, Any]:
    """Reads a JSON object; an empty one if an optional file is missing."""
    if optional and not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: damaged or not JSON ({_why(file, error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds a {type(value).__name__}, expected a JSON object")
    return value


def _why(file: Path, error: Exception) -> str:
    """What is wrong with a file that its library could not read."""
    with file.open("rb") as stream:
        if stream.read(40).startswith(b"version https://git-lfs"):
            return "a pointer of Git LFS: git lfs pull"
    return f"{error}; fetch it again"


def read_config(file: Path, raw: Mapping[str, Any]) -> ModelConfig:
    """Converts config.json to a ``ModelConfig``; unsupported features raise.

    Args:
      file: path of config.json, for error messages.
      raw: its content.

    Raises:
      UserError: for another family, a missing or invalid size, or unsupported features (all of
        them are listed).
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{file}: model_type {family!r}, expected one of {', '.join(FAMILIES)}")
    sizes: dict[str, Any] = {attribute: raw.get(key) for key, attribute in _SIZES.items()}
    if bad := {key: raw.get(key) for key in _SIZES if not isinstance(raw.get(key), int)}:
        raise UserError(f"{file}: {bad}, expected whole numbers")
    if unsupported := _unsupported(raw):
        raise UserError(f"{file}: not supported: {'; '.join(unsupported)}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    scaling = None
    if rope.get("rope_type", rope.get("type")) == "llama3":
        try:
            scaling = RopeScaling(
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_max_positions=int(rope["original_max_position_embeddings"]),
            )
        except KeyError as error:
            raise UserError(f"{file}: rope scaling {rope} lacks {error}") from error
    per_head = 128 if family == "qwen3" else sizes["dim"] // sizes["heads"]
    try:
        return ModelConfig(
            **sizes,
            kv_heads=raw.get("num_key_value_heads") or sizes["heads"],
            head_dim=raw.get("head_dim") or per_head,
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            rope_scaling=scaling,
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tie_embeddings=raw.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2" or bool(raw.get("attention_bias")),
            qk_norm=family == "qwen3",
            max_positions=raw.get("max_position_embeddings", _POSITIONS[family]),
        )
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def _unsupported(raw: Mapping[str, Any]) -> list[str]:
    """Descriptions of the features in config.json that this library does not support."""
    features = []
    if raw.get("hidden_act", "silu") != "silu":
        features.append(f"hidden_act {raw['hidden_act']!r} (only 'silu')")
    unread = ("attention_bias", "mlp_bias") if raw["model_type"] == "qwen3" else ("mlp_bias",)
    features += [f"{name} true" for name in unread if raw.get(name)]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        features.append(f"rope scaling of type {kind!r} (only 'default' and 'llama3')")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        features.append("partial_rotary_factor other than 1")
    # Only layers from max_window_layers on use the window, so a declared window may affect none.
    sliding = raw.get("use_sliding_window") and raw.get("max_window_layers", 28) < raw.get(
        "num_hidden_layers", 0
    )
    layer_types = set(raw.get("layer_types") or ["full_attention"])
    if layer_types != {"full_attention"}:
        features.append(f"layer types {sorted(layer_types - {'full_attention'})}")
    elif sliding and "layer_types" not in raw:
        features.append("a sliding window")
    if raw.get("quantization_config"):
        features.append("quantized safetensors (use the original weights, or a GGUF file)")
    return features


def write_config(config: ModelConfig, family: str) -> dict[str, Any]:
    """The architecture part of config.json; the inverse of ``read_config``."""
    scaling = config.rope_scaling
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    raw: dict[str, Any] = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": family,
        **{key: getattr(config, attribute) for key, attribute in _SIZES.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        },
        "tie_word_embeddings": config.tie_embeddings,
    }
    if family != "qwen2":
        raw["attention_bias"] = config.qkv_bias
    return raw | ({"mlp_bias": False} if family == "llama" else {"use_sliding_window": False})


def _read_tokenizer(file: Path) -> Tokenizer:
    if not file.exists():
        return _convert_tokenizer(file.parent)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{file}: damaged or not a tokenizer ({_why(file, error)})") from error
    # Saved with the tokenizer, these settings would silently truncate or pad all encoded texts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _convert_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a directory without a ``tokenizer.json``, as transformers converts it."""
    # Without its files transformers returns an empty tokenizer.
    names = {file.name for file in folder.iterdir()}
    if not ({"vocab.json", "merges.txt"} <= names or "tokenizer.model" in names):
        raise FileNotFoundError(
            f"{folder}: expected tokenizer.json, or vocab.json and merges.txt, or tokenizer.model"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(
            f"{folder}: there is no tokenizer.json; pip install 'she_jax[hf]' to convert other "
            "tokenizers"
        ) from error
    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).backend_tokenizer
    except Exception as error:  # of many kinds: a missing file, a missing package, code to trust
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{folder}: there is no tokenizer.json, and transformers cannot convert what is there "
            f"({reason})"
        ) from error


def _read_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    if (file := path / "chat_template.jinja").exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates, in older files
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise UserError(
                f"{path / 'tokenizer_config.json'}: chat templates {sorted(named)}, expected one "
                "called 'default'"
            )
        return named["default"]
    return template


def _weight_files(path: Path, raw: Mapping[str, Any]) -> tuple[list[Path], tuple[str, ...]]:
    """The files of a directory that transformers takes for the weights, and a note on others.

    A file that config.json names, else model.safetensors, else what an index lists.
    """
    # The name alone: with a folder in it, it could refer to any file on the machine.
    whole = path / Path(raw.get("transformers_weights") or "model.safetensors").name
    index = whole if whole.name.endswith(".index.json") else path / "model.safetensors.index.json"
    if index != whole and whole.exists():
        others = sorted(f.name for f in path.glob("model*.safetensors*") if f != whole)
        return [whole], (f"{path}: {whole.name} is read, not {others}",) if others else ()
    if not index.exists():
        present = sorted(file.name for file in path.glob("*.safetensors"))
        raise FileNotFoundError(
            f"{path}: {present}, expected {whole.name}, or several safetensors files with "
            f"{index.name}"
        )
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    files = [path / name for name in names if Path(name).name == name]
    if not files or len(files) < len(names):
        raise UserError(f"{index}: weight_map {names}, expected names of files beside it")
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file, and {index.name} names it")
    return files, ()


def _open_safetensors(files: list[Path], stack: ExitStack) -> dict[str, StoredTensor]:
    """All tensors of some files, by name; only the headers are read."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            handle = stack.enter_context(safe_open(file, framework="np"))
        except SafetensorError as error:
            raise UserError(f"{file}: damaged or not safetensors ({_why(file, error)})") from error
        for name in handle.keys():  # noqa: SIM118 - no mapping, it cannot be iterated
            piece = handle.get_slice(name)
            if piece.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise UserError(f"{file}: tensor {name} is {piece.get_dtype()}, expected floats")
            tensors[name] = StoredTensor(
                tuple(piece.get_shape()),
                partial(handle.get_tensor, name),
                bfloat16=piece.get_dtype() == "BF16",
            )
    return tensors
