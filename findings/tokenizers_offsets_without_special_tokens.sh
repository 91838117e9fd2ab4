#!/usr/bin/env bash
# tokenizers 0.23.3: a byte-level post-processor changes the offsets of an encoding that is made with
# add_special_tokens=False, where a post-processor has nothing to add: it trims the blank from the
# token " b", and gives a token that is only a blank an empty span. Whoever cuts a text at a token's
# offset, or finds the tokens of a part of it, is off by the blanks, but only with tokenizers whose
# file has such a post-processor.
# Seen: [(0, 1), (1, 2), (2, 3), (3, 5)] without it, [(0, 0), (1, 2), (3, 3), (4, 5)] with it.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
trainer = trainers.BpeTrainer(
    vocab_size=270, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
)
tokenizer.train_from_iterator(["a b  c"] * 3, trainer)
before = tokenizer.encode(" a  b", add_special_tokens=False)
tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
after = tokenizer.encode(" a  b", add_special_tokens=False)
print(tokenizers.__version__, before.tokens, before.offsets, after.offsets)
assert before.ids == after.ids
assert before.offsets == [(0, 1), (1, 2), (2, 3), (3, 5)]
assert after.offsets == [(0, 0), (1, 2), (3, 3), (4, 5)]
PYTHON
