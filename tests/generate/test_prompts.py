"""Encoding of prompts and chains, and decoding of completions."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from she_jax.cot import CotSchema
from she_jax.generate.prompts import PromptFormat, instruction, positions, train_tokenizer
from she_jax.types import Example, Rollout, UserError

TEXTS = [
    "query: red running shoes\ntitle: velora crimson running shoes\nbrand: velora\n",
    "category: running shoes / trail shoes => near\nattributes: red / none unstated\nlabel: 3",
] * 4
TOKENIZER = train_tokenizer(TEXTS, 320)
FORMAT = PromptFormat(
    tokenizer=TOKENIZER,
    schema=CotSchema(),
    eos_ids=(1,),
    pad_id=0,
    prompt_length=48,
    completion_length=64,
)
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PAIR = Example(uid="0", query="red shoes", product={"title": "Red shoes", "brand": "velora"})


def decoded(row, mask):
    return b"".join(FORMAT.token_bytes[t] for t in np.asarray(row)[np.asarray(mask)]).decode()


def test_a_prompt_is_the_query_and_the_fields_padded_on_the_left():
    batch, cut = FORMAT.encode_prompts([PAIR])
    assert decoded(batch.tokens[0], batch.mask[0]) == (
        "query: red shoes\ntitle: Red shoes\nbrand: velora\n\n"
    )
    assert cut == 0
    assert batch.tokens.shape == (1, 48)
    first = int(np.argmax(np.asarray(batch.mask[0])))
    assert not np.asarray(batch.mask[0][:first]).any()
    assert (np.asarray(batch.tokens[0][:first]) == 0).all()


def test_trap_8_long_prompts_are_cut_by_a_stated_rule_and_counted():
    """The product is cut first, at its end; then the query; the template never."""
    long_title = dataclasses.replace(PAIR, product={"title": "velora " * 500})
    batch, cut = FORMAT.encode_prompts([PAIR, long_title])
    assert cut == 1
    text = decoded(batch.tokens[1], batch.mask[1])
    assert text.startswith("query: red shoes\ntitle: velora")
    assert text.endswith("\n\n")
    assert batch.tokens.shape == (2, 48)
    both, cut = FORMAT.encode_prompts([dataclasses.replace(long_title, query="red shoes " * 99)])
    text = decoded(both.tokens[0], both.mask[0])
    assert cut == 1
    assert text.startswith("query: red shoes red")
    assert "title:" in text
    with pytest.raises(ValueError, match="prompt_length=10: the instruction takes"):
        dataclasses.replace(FORMAT, prompt_length=10)


@given(st.lists(st.sampled_from(["red", "shoes", "velora", "x1", "'s", "?", "-"]), min_size=1))
def test_without_a_chat_template_prompts_are_cut_token_by_token(words):
    """They are those of the pieces, encoded apart and cut."""
    pair = dataclasses.replace(
        PAIR, query=" ".join(words), product={"title": " ".join(words[::-1])}
    )
    texts = ["query:", f" {pair.query}", f"\ntitle: {pair.product['title']}", "\n\n"]
    opening, query, product, closing = (TOKENIZER.encode(text).ids for text in texts)
    for length in (16, 20, 48):
        room = length - len(opening) - len(closing)
        kept = query[: max(room - len(product), room // 2)]
        batch, cut = dataclasses.replace(FORMAT, prompt_length=length).encode_prompts([pair])
        ids = [*opening, *kept, *product[: room - len(kept)], *closing]
        assert batch.tokens[0][batch.mask[0]].tolist() == ids
        assert cut == (len(query) + len(product) > room)


def test_a_chain_ends_with_the_end_of_sequence_or_is_counted_as_cut():
    tokens, mask, cut = FORMAT.encode_chains(["label: 3", "label: 3\n" * 100])
    assert cut == 1
    assert tokens[0][mask[0]][-1] == 1
    assert mask[1].all()
    assert not (tokens[1] == 1).any()


def test_a_completion_decodes_to_the_encoded_text():
    text = "label: 3\n naïve 日本語 🙂"
    tokens, mask, _ = FORMAT.encode_chains([text])
    rollout = Rollout(tokens=tokens, prompt_mask=~mask, completion_mask=mask, logps=mask * 1.0)
    assert FORMAT.decode(rollout) == [text]
    pieces = FORMAT.pieces(ids := tokens[mask].tolist())
    assert (len(pieces), "".join(pieces)) == (len(ids), text)
    assert not FORMAT.truncated(rollout)[0]
    assert FORMAT.newlines(400).sum() >= 1
    assert FORMAT.newlines(400)[tokens[0][mask[0]]].sum() == 1


def test_product_texts_cannot_contain_special_tokens():
    """A title that spells the end of sequence is encoded as plain text."""
    pair = dataclasses.replace(PAIR, product={"title": "a <eos> <pad> b"})
    batch, _ = FORMAT.encode_prompts([pair])
    ids = np.asarray(batch.tokens[0])[np.asarray(batch.mask[0])]
    assert not np.isin(ids, [0, 1]).any()
    assert "<eos> <pad>" in decoded(batch.tokens[0], batch.mask[0])


def test_an_instruction_of_ones_own_is_a_sandboxed_template():
    own = "Urteile:\n{% for s in steps %}{{ s['name'] }}? {% endfor %}{{ labels[-1].value }}"
    schema = dataclasses.replace(CotSchema.build(labels="0-3"), instruction=own)
    text = instruction(schema)
    assert text == "Urteile:\nquery? product? category? attributes? label? 3"
    for template, opening in ((TEMPLATE, f"<|start|>user\n{text}"), (None, text)):
        chat = dataclasses.replace(FORMAT, chat_template=template, schema=schema, prompt_length=400)
        batch, _ = chat.encode_prompts([PAIR])
        ids = np.asarray(batch.tokens[0])[np.asarray(batch.mask[0])]
        shown = b"".join(chat.token_bytes[t] for t in ids).decode()
        assert shown.startswith(f"{opening}\n\nquery: red shoes")
    for bad in ("{{ steps.__class__.__mro__ }}", "{% if %}", "{{ steps.append(1) }}"):
        with pytest.raises(UserError, match=r"chain\.instruction: "):
            instruction(dataclasses.replace(schema, instruction=bad))


def test_a_chat_template_frames_the_prompt_and_keeps_its_special_tokens():
    chat = dataclasses.replace(FORMAT, chat_template=TEMPLATE, prompt_length=400)
    batch, cut = chat.encode_prompts([PAIR])
    ids = np.asarray(batch.tokens[0])[np.asarray(batch.mask[0])]
    text = b"".join(chat.token_bytes[t] for t in ids).decode()
    assert cut == 0
    assert (ids == 1).sum() == 1
    assert text.startswith("<|start|>user\nJudge how well")
    assert "query: red shoes\ntitle: Red shoes\nbrand: velora" in text
    assert text.endswith("<|start|>assistant\n")
    with pytest.raises(ValueError, match="leaves out the user's message"):
        dataclasses.replace(FORMAT, chat_template="nothing")


def test_the_instruction_names_every_step_and_verdict():
    text = instruction(CotSchema.build(checks=2))
    for word in ("query", "check_2", "match|near|mismatch", "met|unstated|conflict", "1|2|3|4"):
        assert word in text


def test_positions_count_real_tokens():
    mask = np.array([[False, True, True, False, True]])
    assert positions(mask).tolist() == [[-1, 0, 1, -1, 2]]


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ValueError, match="258"):
        train_tokenizer(TEXTS, 100)
