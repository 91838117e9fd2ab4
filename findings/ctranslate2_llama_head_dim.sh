#!/usr/bin/env bash
# ctranslate2 4.8.5 (transformers 5.24.0, torch 2.13.0): a Llama whose config.json has a head_dim other
# than hidden_size / num_attention_heads is converted without a word, and Generator loads it. With as
# many key heads as heads it then computes other logits than transformers, without an error or a
# warning, so that its texts are wrong; with fewer key heads it raises "axis 2 has dimension 192 but
# expected 96". With head_dim = hidden_size / num_attention_heads all logits agree.
# Seen, the largest difference of a logit: head_dim 16 of 64 / 4: 2e-06; head_dim 32: 0.17.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  ctranslate2==4.8.5 transformers==5.24.0 torch==2.13.0
cd "$folder"
TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import ctranslate2
import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
names = {"bos_token": "<eos>", "eos_token": "<eos>", "pad_token": "<pad>"}
seen = {}
for key_heads, head_dim in ((4, 16), (4, 32), (1, 16), (1, 32)):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": head_dim}
    layers = {"num_hidden_layers": 2, "intermediate_size": 64, "num_key_value_heads": key_heads}
    config = LlamaConfig(vocab_size=10, initializer_range=0.3, **sizes, **layers)
    model = LlamaForCausalLM(config)
    name = f"{key_heads}-{head_dim}"
    model.save_pretrained(name)
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(name)
    generator = ctranslate2.Generator(TransformersConverter(name).convert(f"{name}-ct2"))
    expected = model(torch.tensor([[2, 3, 4]])).logits[0].detach().numpy()
    try:
        logits = np.array(generator.forward_batch([["a", "b", "c"]]))[0]
    except ValueError as error:
        seen[key_heads, head_dim] = str(error)
    else:
        seen[key_heads, head_dim] = float(abs(logits - expected).max())
print(ctranslate2.__version__, seen)
assert seen[4, 16] < 1e-4 > seen[1, 16], "the usual size of a head no longer agrees"
assert seen[4, 32] > 1e-2, "the other size is computed as transformers does"
assert seen[1, 32] == "axis 2 has dimension 192 but expected 96"
PYTHON
