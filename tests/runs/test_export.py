"""Exported models in other programs: prompts have the tokens of training, answers our labels."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from recipes import ROOT, byte_level
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from she_jax.cot import CotSchema
from she_jax.data.dataset import open_split
from she_jax.generate.generator import Generator
from she_jax.generate.language_model import LanguageModel
from she_jax.generate.prompts import (
    PromptFormat,
    train_tokenizer,
)
from she_jax.models.decoder import ModelConfig, build_model, init_params
from she_jax.models.sharding import make_mesh
from she_jax.models.tokenizer import split_words
from she_jax.models.weights import load_model
from she_jax.runs.export import export, export_run
from she_jax.runs.load import load_run
from she_jax.types import Example

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>")
ADDED = [
    *(AddedToken(name, special=True) for name in NAMES),
    *(AddedToken(name, special=False) for name in ("<think>", "</think>")),
]
MERGES = [("?", "Ċ"), (".", "Ċ"), ("Ċ", "Ċ"), ('"', "Ċ"), ("Ġ", "Ġ"), ("1", "2"), ("12", "8")]
SMOLLM = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)
PAIRS = [
    Example(uid="0", query="red mug?", product={"title": "size:  128 GB", "brand": '10"'}),
    Example(uid="1", query="'s 128", product={"title": "naïve n\u0303 東京.", "brand": "Acme-?"}),
]


def make_tokenizer(pre_tokenizer, bos=False, nfc=False):
    tokenizer = byte_level(MERGES, ADDED, pre_tokenizer)
    if bos:
        index = tokenizer.token_to_id("<|bos|>")
        template = processors.TemplateProcessing(
            single=["<|bos|>", "$A"], pair=None, special_tokens=[("<|bos|>", index)]
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


LLAMA = make_tokenizer(split_words("{1,3}"), bos=True)
QWEN = make_tokenizer(split_words(""), nfc=True)
FAMILIES = {  # tokenizer, chat template, architecture, model_type, add_special_tokens
    "scratch": (train_tokenizer(["red mug? 128"], 300), None, {}, "llama", True),
    "llama3 base": (LLAMA, None, {}, "llama", True),
    "llama3": (LLAMA, "{{ bos_token }}" + CHAT, {}, "llama", True),
    "a begin token that the template lacks": (LLAMA, CHAT, {}, "llama", False),
    "smollm": (make_tokenizer(SMOLLM), CHAT, {}, "llama", True),
    "qwen2": (QWEN, CHAT, {"qkv_bias": True}, "qwen2", True),
    "qwen2, another tokenizer": (make_tokenizer(SMOLLM), CHAT, {"qkv_bias": True}, "llama", True),
    "qwen3": (QWEN, CHAT, {"qk_norm": True}, "qwen3", True),
}


def language_model(tokenizer, template, shape):
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        **{"dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 64},
        **shape,
    )
    end = tokenizer.token_to_id("<|im_end|>") or 1
    prompts = PromptFormat(
        tokenizer=tokenizer,
        schema=CotSchema(),
        eos_ids=(end,),
        pad_id=tokenizer.token_to_id("<|endoftext|>") or 0,
        prompt_length=600,
        completion_length=72,
        chat_template=template,
        specials={"bos_token": "<|bos|>"} if "<|bos|>" in tokenizer.get_vocab() else {},
    )
    return LanguageModel(model=build_model(config), prompts=prompts, mesh=make_mesh(data=-1))


def text_of(pair, prompt):
    """The prompt of a pair, written from what she_jax.json says alone."""
    fields = [prompt["field"].format(name=n, text=t) for n, t in pair.product.items()]
    return prompt["opening"] + pair.query + "".join(fields) + prompt["closing"]


@pytest.mark.filterwarnings("ignore")  # of what transformers imports
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_prompt_has_the_tokens_of_training_in_transformers(family, tmp_path):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer, template, shape, model_type, add_special_tokens = FAMILIES[family]
    lm = language_model(tokenizer, template, shape)
    params = init_params(lm.model.config, jax.random.key(0))
    export(tmp_path, lm, params, CotSchema().options)
    record = json.loads((tmp_path / "she_jax.json").read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.hidden_size, config.head_dim) == (model_type, 64, 16)
    assert record["add_special_tokens"] == add_special_tokens
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.padding_side == "left"
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert (generation.do_sample, generation.max_new_tokens) == (False, 72)
    bos = generation.bos_token_id  # Llama's default, 1, may be any token
    assert bos == config.bos_token_id == theirs.bos_token_id != 1 or family == "scratch"
    prompt = record["prompt"]
    options = {} if add_special_tokens else {"add_special_tokens": False}
    batch, _ = lm.prompts.encode_prompts(PAIRS)
    for tokens, mask, pair in zip(batch.tokens, batch.mask, PAIRS, strict=True):
        text = text_of(pair, prompt)
        assert theirs(text, **options)["input_ids"] == tokens[mask].tolist()
    if template is not None:
        named = Example(uid="2", query="a <|im_end|>\n", product={"title": "</think> <think>."})
        for pair in (*PAIRS, named):
            text = text_of(pair, prompt | {"opening": prompt["message"], "closing": ""})
            chat = theirs.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                return_dict=False,
                sanitize_control_tokens=True,
                **record["template"],
            )
            batch, _ = lm.prompts.encode_prompts([pair])
            assert chat == batch.tokens[0][batch.mask[0]].tolist()
    loaded = load_model(tmp_path)
    assert (loaded.config, loaded.notes) == (lm.model.config, ())
    assert loaded.vocabulary.eos_ids == lm.prompts.eos_ids
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """An exported judge that writes whole chains, with prompts and our answers to them."""
    pytest.importorskip("torch")  # the extra ``serve``
    folder = tmp_path_factory.mktemp("judge") / "run"
    settings = {
        "shopworld.pairs": "(4000, 64, 200, 64)",
        **{"model.layers": 2, "model.dim": 64, "model.head_dim": 16, "model.ffn": 128},
        "cpu_devices": 1,
        **{"sft.steps": 300, "sft.batch_size": 32, "sft.micro_batches": 1},
        **{"sft.learning_rate": 0.01, "rl.steps": 0, "filter.pairs": 0, "eval.pass_k": 0},
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "she_jax", "train", "stage1", f"--workdir={folder}", *flags]
    # Compiled as for users: a minute of training on one device.
    off = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "PYTEST_XDIST_WORKER")
    environment = {key: value for key, value in os.environ.items() if key not in off}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    lm, params, _ = load_run(folder, make_mesh(data=-1))
    data = next(folder.rglob("dataset_info.json")).parent
    examples = list(open_split(data, "test"))
    chains = Generator(lm, 50).greedy_samples(params, examples, lambda done: None)
    record = json.loads((export_run(folder) / "she_jax.json").read_text(encoding="utf-8"))
    texts = [text_of(example, record["prompt"]) for example in examples]
    labels = [sample.chain.label for sample in chains]
    assert sum(label is not None for label in labels) > 190
    assert len(set(labels)) > 2
    return folder / "export", lm.prompts.schema, texts, chains


def differing(chains, answers, schema):
    """How many answers have another label than ours."""
    labels = [schema.parse(answer).label for answer in answers]
    return sum(a != c.chain.label for a, c in zip(labels, chains, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what transformers imports
def test_what_users_of_transformers_write_gives_our_labels(judge):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, schema, texts, chains = judge
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert len(answers) == 200
    assert differing(chains, answers, schema) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ctranslate2_gives_our_labels(judge, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoTokenizer

    folder, schema, texts, chains = judge
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = ctranslate2.Generator(
        TransformersConverter(str(folder)).convert(str(tmp_path / "out"))
    )
    prompts = [tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) for text in texts]
    results = generator.generate_batch(prompts, max_length=72, include_prompt_in_result=False)
    answers = [
        tokenizer.decode(result.sequences_ids[0], skip_special_tokens=True) for result in results
    ]
    assert len(answers) == 200
    assert differing(chains, answers, schema) == 0
