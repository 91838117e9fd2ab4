"""Special tokens: padding, ends, and added tokens that the model has no row for."""

from pathlib import Path

import pytest
from recipes import byte_level
from tokenizers import AddedToken

from she_jax.models.decoder import ModelConfig
from she_jax.models.huggingface import StoredModel
from she_jax.models.vocabulary import choose_pad, read_vocabulary


def test_trap_1_padding_is_never_the_end_of_a_sequence():
    """A sampler that may not sample padding would never end."""
    specials = ["<|im_start|>", "<|im_end|>", "<|vision_pad|>", "<|endoftext|>"]
    tokenizer = byte_level(added=[AddedToken(token, special=True) for token in specials])
    start, end, pad, text_end = (tokenizer.token_to_id(token) for token in specials)
    assert choose_pad(tokenizer, [None, text_end], [end], 300) == text_end
    assert choose_pad(tokenizer, [end, 299], [end], 300) == 299
    assert choose_pad(tokenizer, [end, text_end], [end, text_end], 300) == pad
    assert choose_pad(tokenizer, [300, -1], [end, pad], 300) == text_end
    assert choose_pad(tokenizer, [], [end, pad, text_end], 300) == start
    bare = byte_level()
    assert choose_pad(bare, [], [0], 300) == 256  # a row that is no token
    with pytest.raises(ValueError, match="no padding token"):
        choose_pad(bare, [], [0], 256)


def stored(tokenizer, rows, **changes):
    shape = {"dim": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "ffn": 8}
    values = {
        "config": ModelConfig(vocab_size=rows, **shape),
        "tensors": {},
        "tokenizer": tokenizer,
        "eos_ids": (257, 258),
        "pad_ids": (),
        "chat_template": None,
        "specials": {"eos_token": "<|eot|>"},
    }
    return StoredModel(**values | changes)


NAMES = ["<|begin|>", "<|end_of_text|>", "<|eom|>", "<|eot|>"]
TOKENIZER = byte_level(added=[AddedToken(name, special=True) for name in NAMES])


@pytest.mark.parametrize(
    ("template", "eos_token", "eos_ids"),
    [
        (None, "<|eot|>", (259, 257, 258)),
        ("{% for m in messages %}{{ m.content }}<|eom|>{% endfor %}", "<|eot|>", (258, 259, 257)),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "<|eom|>", (258, 257)),
    ],
)
def test_chains_end_as_template_and_tokenizer_say_and_the_other_ends_still_stop(
    template, eos_token, eos_ids
):
    model = stored(TOKENIZER, 260, chat_template=template, specials={"eos_token": eos_token})
    assert read_vocabulary(Path("m"), model)[0].eos_ids == eos_ids


def test_added_tokens_without_a_row_are_left_out_with_a_word():
    """As a tokenizer that got a padding token, whose model was not resized."""
    specials = {"eos_token": "<|eom|>", "pad_token": "<|eot|>"}
    model = stored(TOKENIZER, 259, specials=specials, pad_ids=(259,))
    vocabulary, notes = read_vocabulary(Path("m"), model)
    assert notes == ["m: the tokens ['<|eot|>'] have no row in the model and are left out"]
    assert vocabulary.tokenizer.token_to_id("<|eot|>") is None
    assert vocabulary.pad_id == 256
    assert vocabulary.specials == {"eos_token": "<|eom|>", "pad_token": "<|begin|>"}
    with pytest.raises(ValueError, match="ids up to 259, the model has 200 rows"):
        read_vocabulary(Path("m"), stored(TOKENIZER, 200))
