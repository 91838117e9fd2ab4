"""Hugging Face directories: round trips, and errors for damaged ones."""

import json
import shutil
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import GOLDEN
from safetensors.numpy import load_file, save_file
from tokenizers import normalizers

from she_jax.models.decoder import ModelConfig, init_params
from she_jax.models.tokenizer import split_words
from she_jax.models.vocabulary import Vocabulary
from she_jax.models.weights import LoadedModel, load_model, save_model
from she_jax.types import UserError

FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a golden checkpoint, to be damaged."""

    def copy(family="llama"):
        shutil.copytree(GOLDEN / family, tmp_path / family)
        return tmp_path / family

    return copy


def edit(file, **changes):
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in content.items() if value is not ...}
    file.write_text(json.dumps(kept), encoding="utf-8")


def with_vocabulary(model, **changes):
    return replace(model, vocabulary=replace(model.vocabulary, **changes))


def export(model, path, **options):
    save_model(path, model.config, model.params, model.vocabulary, **options)


def assert_same(left, right):
    assert left.config == right.config
    assert jax.tree.structure(left.params) == jax.tree.structure(right.params)
    for a, b in zip(jax.tree.leaves(left.params), jax.tree.leaves(right.params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    left, right = vars(left.vocabulary), vars(right.vocabulary)
    assert left["tokenizer"].to_str() == right["tokenizer"].to_str()
    assert left | {"tokenizer": None} == right | {"tokenizer": None}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_load_of_save_is_the_same_bit_for_bit(family, dtype, tmp_path):
    model = load_model(GOLDEN / family, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(dtype)}
    export(model, tmp_path / "out")
    assert_same(load_model(tmp_path / "out", dtype=dtype), model)


def test_a_new_model_is_saved_as_llama(tmp_path):
    shape = {"dim": 16, "layers": 3, "heads": 4, "kv_heads": 1, "head_dim": 6, "ffn": 20}
    config = ModelConfig(vocab_size=130, **shape)
    params = init_params(config, jax.random.key(0))
    tokenizer = load_model(GOLDEN / "llama").vocabulary.tokenizer
    vocabulary = Vocabulary(tokenizer=tokenizer, eos_ids=(0,), pad_id=129)
    save_model(tmp_path / "out", config, params, vocabulary)
    model = load_model(tmp_path / "out")
    # Without a begin token, programs would take Llama's default, id 1, or refuse the model.
    expected = replace(vocabulary, specials={"eos_token": "<|end|>", "bos_token": "<|end|>"})
    assert_same(model, LoadedModel(config=config, params=params, vocabulary=expected))


@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_in_other_files_is_converted(checkpoint, monkeypatch):
    folder = checkpoint("qwen3")
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(stored["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in stored["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    settings = {"tokenizer_class": "Qwen2Tokenizer", "unk_token": "<|pad|>"}
    edit(folder / "tokenizer_config.json", **settings)
    (folder / "tokenizer.json").unlink()
    converted, whole = load_model(folder), load_model(GOLDEN / "qwen3")
    for text in ("red running shoes", 'naïve 日本語 36"<|end|>'):
        ids, expected = (m.vocabulary.tokenizer.encode(text).ids for m in (converted, whole))
        assert ids == expected
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"no tokenizer.json; pip install 'she_jax\[hf\]'"):
        load_model(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_keeps_names_layout_and_config_of_transformers(family, tmp_path):
    """Tensors and shapes as ``save_pretrained`` wrote them; so are config.json's values."""
    model = load_model(GOLDEN / family)
    if family == "qwen2":
        model.vocabulary.tokenizer.pre_tokenizer = split_words("")
        model.vocabulary.tokenizer.normalizer = normalizers.NFC()
        model.vocabulary.tokenizer.add_special_tokens(["<|endoftext|>"])
    export(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    golden = {}
    for file in (GOLDEN / family).glob("*.safetensors"):
        golden |= load_file(file)
    assert written.keys() == golden.keys()
    for name, value in golden.items():
        np.testing.assert_array_equal(written[name], value.astype(np.float32))
    ours = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    theirs = json.loads((GOLDEN / family / "config.json").read_text(encoding="utf-8"))
    rope = theirs["rope_parameters"]
    assert ours.pop("rope_theta") == rope.pop("rope_theta")
    assert (ours.pop("rope_scaling") or {"rope_type": "default"}) == rope
    assert [ours.pop("eos_token_id"), ours.pop("dtype")] == [[0], "float32"]
    head_dim = theirs["hidden_size"] // theirs["num_attention_heads"]
    assert {"head_dim": head_dim} | theirs == {"head_dim": head_dim} | theirs | ours


def test_every_field_of_the_golden_llama_config_is_read():
    config = load_model(GOLDEN / "llama").config
    assert (config.vocab_size, config.dim, config.layers, config.ffn) == (128, 32, 2, 48)
    assert (config.heads, config.kv_heads, config.head_dim) == (4, 2, 8)
    assert (config.rope_theta, config.norm_eps, config.max_positions) == (100.0, 1e-5, 64)
    assert config.rope_scaling.original_max_positions == 16
    assert (config.tie_embeddings, config.qkv_bias, config.qk_norm) == (False, False, False)


def test_older_file_layouts_load_the_same_model(checkpoint):
    """transformers 4's rope keys; special tokens as objects, the template in a list."""
    path = checkpoint()
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    rope = config["rope_parameters"]
    theta = rope.pop("rope_theta")
    edit(path / "config.json", rope_parameters=..., rope_theta=theta, rope_scaling=rope)
    template = (path / "chat_template.jinja").read_text(encoding="utf-8")
    (path / "chat_template.jinja").unlink()
    edit(
        path / "tokenizer_config.json",
        eos_token={"content": "<|end|>", "special": True},
        chat_template=[{"name": "default", "template": template}, {"name": "rag", "template": ""}],
    )
    assert_same(load_model(path), load_model(GOLDEN / "llama"))
    edit(path / "tokenizer_config.json", chat_template=[{"name": "rag", "template": ""}])
    with pytest.raises(
        ValueError, match=r"chat templates \['rag'\], expected one called 'default'"
    ):
        load_model(path)


def test_all_eos_ids_are_collected_and_padding_is_not_among_them(checkpoint):
    path = checkpoint()
    edit(path / "generation_config.json", eos_token_id=[5, 2], pad_token_id=2)
    edit(path / "config.json", eos_token_id=9, pad_token_id=2)
    vocabulary = load_model(path).vocabulary
    assert vocabulary.eos_ids == (0, 5, 2)  # the tokenizer's own, then generation_config.json's
    assert vocabulary.pad_id not in vocabulary.eos_ids
    edit(path / "generation_config.json", eos_token_id=...)
    assert load_model(path).vocabulary.eos_ids == (0, 9)
    edit(path / "config.json", eos_token_id=...)
    edit(path / "tokenizer_config.json", eos_token=...)
    with pytest.raises(ValueError, match=r"end-of-sequence ids \[\], expected at least one"):
        load_model(path)


def test_padding_and_truncation_saved_with_a_tokenizer_are_dropped(checkpoint):
    path = checkpoint()
    tokenizer = load_model(path).vocabulary.tokenizer
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path / "tokenizer.json"))
    assert 2 < len(load_model(path).vocabulary.tokenizer.encode("the lazy dog").ids) != 9


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "mistral"}, "'mistral', expected one of llama, qwen2, qwen3"),
        ("llama", {"hidden_size": "32", "vocab_size": ...}, "'vocab_size': None, 'hidden_size'"),
        ("llama", {"hidden_act": "gelu", "mlp_bias": True}, "hidden_act 'gelu'.*; mlp_bias true"),
        ("llama", {"rope_parameters": ..., "rope_scaling": {"type": "linear"}}, "type 'linear'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "type 'yarn'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "lacks 'factor'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantized safetensors"),
        ("llama", {"num_key_value_heads": 3}, "kv_heads must divide heads"),
        ("qwen3", {"attention_bias": True}, "attention_bias true"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        (
            "qwen2",
            {"layer_types": ..., "use_sliding_window": True, "max_window_layers": 1},
            "a sliding window",
        ),
    ],
)
def test_unsupported_features_are_refused(checkpoint, family, changes, message):
    path = checkpoint(family)
    edit(path / "config.json", **changes)
    with pytest.raises(ValueError, match=r"config\.json: .*" + message):
        load_model(path)


def test_a_sliding_window_that_no_layer_uses_is_accepted(checkpoint):
    path = checkpoint("qwen2")
    edit(path / "config.json", layer_types=..., use_sliding_window=True, max_window_layers=2)
    assert load_model(path).config == load_model(GOLDEN / "qwen2").config


def test_all_tensors_that_do_not_fit_are_listed_in_one_error(checkpoint):
    path = checkpoint()
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.o_proj.bias"] = np.zeros(32, np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((32, 32), np.float32)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match="5 tensors do not fit") as caught:
        load_model(path)
    assert set(str(caught.value).split("\n  ")[1:]) == {
        "missing model.layers.1.mlp.up_proj.weight (48, 32)",
        "missing model.norm.weight (32,)",
        "unexpected model.layers.0.self_attn.o_proj.bias (32,)",
        "unexpected model.layers.2.mlp.up_proj.weight (48, 32)",
        "model.layers.0.self_attn.k_proj.weight has shape (32, 32), expected (16, 32)",
    }


def test_buffers_and_a_second_copy_of_a_tied_embedding_are_tolerated(checkpoint):
    path = checkpoint("qwen3")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, path / "model.safetensors")
    assert_same(load_model(path), load_model(GOLDEN / "qwen3"))
    assert load_model(path).notes == ()


def test_a_head_that_differs_from_a_tied_embedding_is_kept_as_transformers_does(checkpoint):
    path = checkpoint("qwen3")
    assert load_model(path).config.tie_embeddings
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, path / "model.safetensors")
    model = load_model(path)
    assert not model.config.tie_embeddings
    np.testing.assert_array_equal(model.params["head"], tensors["lm_head.weight"].T)
    assert "its head differs and is kept" in model.notes[0]
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, path / "model.safetensors")
    model = load_model(path)  # the head alone is the table of both
    assert model.config.tie_embeddings
    np.testing.assert_array_equal(model.params["embed"], tensors["lm_head.weight"])


def test_the_weights_of_a_folder_are_those_that_transformers_reads(checkpoint):
    """A file that config.json names, else model.safetensors, else the shards of an index."""
    path = checkpoint("qwen2")
    sharded = load_model(path)
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    for name, change in (("model.safetensors", 1), ("other.safetensors", 2)):
        save_file({k: v + np.asarray(change, v.dtype) for k, v in tensors.items()}, path / name)
    model = load_model(path)
    np.testing.assert_array_equal(model.params["norm"], sharded.params["norm"] + 1)
    assert "model.safetensors is read, not ['model-00001-of-00003" in model.notes[0]
    for name, change in (("other.safetensors", 2), ("model.safetensors.index.json", 0)):
        edit(path / "config.json", transformers_weights=name)
        norm = load_model(path).params["norm"]
        np.testing.assert_array_equal(norm, sharded.params["norm"] + change)


def test_an_adapter_is_named_as_what_it_is(checkpoint):
    path = checkpoint()
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ValueError, match=r"an adapter \(LoRA\) of 'some/base', not a whole model"):
        load_model(path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_named_as_what_it_is(checkpoint, name):
    path = checkpoint()
    (path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=rf"{name}: .*a pointer of Git LFS: git lfs pull"):
        load_model(path)


def test_qwen2_with_another_tokenizer_is_saved_as_llama_and_read_back(tmp_path):
    """transformers builds Qwen2's tokenizer for every model of the type qwen2."""
    model = load_model(GOLDEN / "qwen2")
    export(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["attention_bias"]) == ("llama", True)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not tensors["model.layers.1.self_attn.o_proj.bias"].any()
    assert_same(load_model(tmp_path / "out"), model)
    tensors["model.layers.1.self_attn.o_proj.bias"] += 1
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected model\.layers\.1\.self_attn\.o_proj\.bias"):
        load_model(tmp_path / "out")


def test_tensors_that_are_not_floats_are_refused(checkpoint):
    path = checkpoint()
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = np.zeros(32, np.int8)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is I8, expected floats"):
        load_model(path)


@pytest.mark.parametrize("keep", [0, 5, 100, 50_000])
def test_the_error_names_a_truncated_safetensors_file(checkpoint, keep):
    path = checkpoint()
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged or not safetensors"):
        load_model(path)


def test_the_error_names_a_missing_or_damaged_file(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: expected a directory"):
        load_model(tmp_path / "nowhere")
    path = checkpoint("qwen2")
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors: no such"):
        load_model(path)
    edit(path / "model.safetensors.index.json", weight_map={"a": "../qwen2/x.safetensors"})
    with pytest.raises(ValueError, match="expected names of files beside it"):
        load_model(path)
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors, or several"):
        load_model(path)
    (path / "tokenizer.json").write_text('{"model": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json: damaged or not a tokenizer"):
        load_model(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json, or vocab"):
        load_model(path)
    (path / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json: holds a list"):
        load_model(path)
    (path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json: damaged or not JSON"):
        load_model(path)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(path)


def test_save_overwrites_only_on_request(tmp_path):
    model = load_model(GOLDEN / "llama")
    out = tmp_path / "out"
    out.mkdir()
    export(model, out)  # empty: nothing is lost
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    other = load_model(GOLDEN / "qwen3")
    with pytest.raises(FileExistsError, match=r"not empty; choose another directory, or overwrite"):
        export(other, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    without_template = with_vocabulary(other, chat_template=None)
    export(without_template, out, overwrite=True)
    assert_same(load_model(out), without_template)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]
    shards = tmp_path / "shards"
    shutil.copytree(GOLDEN / "qwen2", shards)
    with pytest.raises(FileExistsError, match="holds other weights"):
        export(other, shards, overwrite=True)


def test_a_failed_save_leaves_no_files(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("she_jax.models.weights.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export(load_model(GOLDEN / "llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_save_lists_all_parameters_that_do_not_fit(tmp_path):
    model = load_model(GOLDEN / "qwen2")
    layers = dict(model.params["layers"])
    layers["gate"] = layers["gate"][:1]
    layers["q_norm"] = layers.pop("q_bias")
    wrong = replace(model, params=model.params | {"layers": layers})
    with pytest.raises(ValueError, match="do not fit the config") as caught:
        export(wrong, tmp_path / "out")
    assert set(str(caught.value).split("\n  ")[1:]) == {
        "missing layers/q_bias (2, 4, 8)",
        "unexpected layers/q_norm (2, 4, 8)",
        "layers/gate has shape (1, 32, 48), expected (2, 32, 48)",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_ids": ()}, r"eos_ids=\[\]"),
        ({"eos_ids": (500,)}, r"eos_ids=\[500\]"),
        ({"pad_id": 0}, "pad_id=0: .* not among eos_ids"),
        ({"pad_id": 128}, "pad_id=128"),
        ({"specials": {"bos_token": "<nope>"}}, "bos_token='<nope>'"),
        ({"specials": {"end": "<|end|>"}}, "end='<|end|>'".replace("|", r"\|")),
        ({"specials": {"eos_token": "<|pad|>"}}, "is not among eos_ids"),
    ],
)
def test_save_checks_the_special_tokens(changes, message, tmp_path):
    model = with_vocabulary(load_model(GOLDEN / "llama"), **changes)
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
