#!/usr/bin/env bash
# transformers 5.24.0: AutoTokenizer.from_pretrained on the folder of a model whose tokenizer files
# are missing (model.save_pretrained writes none) raises for Llama and Mistral, but for Qwen2, Qwen3,
# GPT-2 and BERT gives a tokenizer with an empty vocabulary: no error, no warning. Qwen's and GPT-2's
# encode every text to no tokens at all, BERT's to [CLS] [UNK] ... [SEP], so that a judge sees empty
# prompts, or the same for all queries of two words. Its length (1 or 5 tokens) is the only sign.
# Seen: llama ValueError; qwen2 1 token, [] for "red mug"; bert 5 tokens, [2, 1, 1, 3].
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0
cd "$folder"
TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import transformers

seen = {}
for family in ("llama", "mistral", "qwen2", "qwen3", "gpt2", "bert"):
    Path(family).mkdir()
    Path(family, "config.json").write_text(json.dumps({"model_type": family, "vocab_size": 60_000}))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(family)
    except ValueError as error:
        seen[family] = type(error).__name__
    else:
        seen[family] = len(tokenizer), tokenizer("red mug")["input_ids"]
print(transformers.__version__, seen)
empty = (1, [])
assert seen == {
    "llama": "ValueError", "mistral": "ValueError", "qwen2": empty, "qwen3": empty, "gpt2": empty,
    "bert": (5, [2, 1, 1, 3]),
}  # fmt: skip
PYTHON
