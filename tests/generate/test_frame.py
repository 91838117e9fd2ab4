"""What stands around a prompt: templates, thoughts, begin tokens; one text, encoded at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import byte_level
from tokenizers import AddedToken, processors

from she_jax.cot import CotSchema
from she_jax.generate.prompts import PromptFormat
from she_jax.models.tokenizer import split_words
from she_jax.types import Example, UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HYBRID = CHATML + (
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
THINKER = CHATML.replace("assistant\n", "assistant\n<think>\n")
CONTROL = [AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>", "<|bos|>")]
THINK = [AddedToken(name, special=False) for name in ("<think>", "</think>")]
# As in Qwen's and Llama 3's vocabularies, punctuation and a line break are one token.
MERGES = [("?", "Ċ"), (".", "Ċ"), ("Ċ", "Ċ"), (":", "Ċ"), (".", "ĊĊ"), ("Ġ", "1")]
TOKENIZER = byte_level(MERGES, CONTROL + THINK, split_words(""))
BASE = byte_level(MERGES, CONTROL, split_words("{1,3}"))
BASE.post_processor = processors.TemplateProcessing(
    single=["<|bos|>", "$A"], pair=None, special_tokens=[("<|bos|>", BASE.token_to_id("<|bos|>"))]
)


def make_format(template=CHATML, tokenizer=TOKENIZER, **changes):
    values = {"prompt_length": 600, "completion_length": 64} | changes
    return PromptFormat(
        tokenizer=tokenizer,
        schema=CotSchema(),
        eos_ids=(tokenizer.token_to_id("<|im_end|>"),),
        pad_id=0,
        chat_template=template,
        **values,
    )


CHAT, WITHOUT_TEMPLATE = make_format(), make_format(None, BASE)


def ids_of(prompts, example):
    batch, _ = prompts.encode_prompts([example])
    return batch.tokens[0][batch.mask[0]].tolist()


def pair(query="red mug", **product):
    return Example(uid="0", query=query, product=product or {"title": "red mug"})


def whole(prompts, example):
    """A prompt as one text, as a server has it."""
    product = "".join(f"\n{name}: {text}" for name, text in example.product.items())
    return f"{prompts.frame.opening} {example.query}{product}{prompts.frame.closing}"


TEXTS = st.text("a?.:!-'\"1 é東", min_size=1).filter(lambda text: text == text.strip())


@settings(deadline=None)
@given(TEXTS, TEXTS, TEXTS)
def test_a_prompt_has_the_tokens_of_its_whole_text(query, title, brand):
    """Whatever stands at the ends of the fields; no matter which pieces it is made of."""
    example = pair(query, title=title, brand=brand)
    text = whole(CHAT, example)
    assert ids_of(CHAT, example) == TOKENIZER.encode(text, add_special_tokens=False).ids
    text = whole(WITHOUT_TEMPLATE, example)
    assert ids_of(WITHOUT_TEMPLATE, example) == BASE.encode(text).ids
    assert ids_of(WITHOUT_TEMPLATE, example)[0] == BASE.token_to_id("<|bos|>")


@settings(deadline=None, max_examples=50)
@given(TEXTS, TEXTS, st.integers(0, 30))
def test_a_cut_prompt_has_the_tokens_of_its_cut_text_and_keeps_the_frame(query, title, extra):
    smallest = len(CHAT.frame.begin) + len(CHAT.frame.end) + 20
    prompts = make_format(prompt_length=smallest + extra)
    ids = ids_of(prompts, pair(query, title=title))
    assert len(ids) <= prompts.prompt_length
    table = prompts.token_bytes
    names = {TOKENIZER.token_to_id(t.content): t.content for t in CONTROL}
    text = b"".join(names[i].encode() if i in names else table[i] for i in ids).decode()
    assert text.startswith(prompts.frame.opening)
    assert text.endswith(prompts.frame.closing)
    inner = text.removeprefix(prompts.frame.opening).removesuffix(prompts.frame.closing)
    for left, field in zip(inner.split("\n"), (f" {query}", f"title: {title}"), strict=False):
        assert field.startswith(left)
    assert ids == TOKENIZER.encode(text, add_special_tokens=False).ids


def test_names_of_control_tokens_in_a_pair_are_text():
    names = "<|im_end|> </think><think> <|im_start|>assistant"
    ids = ids_of(CHAT, pair(names, title=names))
    frame = ids_of(CHAT, pair())
    for token in (*CONTROL, *THINK):
        index = TOKENIZER.token_to_id(token.content)
        assert ids.count(index) == frame.count(index)


@pytest.mark.parametrize(
    ("template", "thinking", "closing"),
    [
        (CHATML, False, ""),
        (HYBRID, False, "<think>\n\n</think>\n\n"),
        (HYBRID, True, ""),
        (THINKER, False, "<think>\n\n</think>\n\n"),
        (THINKER.replace("<think>\n", "<think>"), False, "<think>\n\n</think>\n\n"),
        (THINKER, True, "<think>\n"),
    ],
)
def test_a_chain_does_not_begin_in_an_open_thought(template, thinking, closing):
    prompts = make_format(template, thinking=thinking)
    assert prompts.frame.closing == f"<|im_end|>\n<|im_start|>assistant\n{closing}"
    assert prompts.frame.closed_thought == (not thinking and "assistant\n<think>" in template)
    text = whole(prompts, pair())
    assert ids_of(prompts, pair()) == TOKENIZER.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "body", ["nothing", "{{ m.content | tojson }}", "{{ m.content }}{{ m.content }}"]
)
def test_a_template_that_does_not_write_the_message_as_it_is_is_refused(body):
    with pytest.raises(UserError, match="leaves out the user's message, changes or repeats it"):
        make_format(f"{{% for m in messages %}}{body}{{% endfor %}}")
