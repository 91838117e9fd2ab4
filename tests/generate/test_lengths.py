"""Lengths that the pairs give, and the chains that would be cut."""

import dataclasses

import pytest

from she_jax.cot import CotSchema
from she_jax.generate.lengths import Sizes, check_lengths, choose_lengths, measure
from she_jax.generate.prompts import PromptFormat, tokenizer_corpus, train_tokenizer
from she_jax.types import Example, UserError

PAIRS = [
    Example(uid=str(n), query="red mug", product={"title": "mug " * (1 + n)}, label=1 + n % 4)
    for n in range(100)
]
FORMAT = PromptFormat(
    tokenizer=train_tokenizer(tokenizer_corpus(PAIRS), 300),
    schema=CotSchema(),
    eos_ids=(1,),
    pad_id=0,
    prompt_length=1 << 20,
    completion_length=1 << 20,
)


def test_lengths_fit_nearly_all_pairs_in_multiples_up_to_a_limit():
    sizes = measure(FORMAT, PAIRS)
    assert (len(sizes.prompts), len(sizes.chains)) == (100, 100)
    wide = choose_lengths(FORMAT, sizes, pretrained=True, context=2048)
    small = choose_lengths(FORMAT, sizes, pretrained=False, context=2048)
    assert all(length % 32 == 0 for length in (*wide, *small))
    assert small[0] == 64 < wide[0] <= 256
    assert sum(size > wide[1] for size in sizes.chains) <= 1
    assert sum(size > wide[0] for size in sizes.prompts) <= 5
    tight = choose_lengths(FORMAT, sizes, pretrained=True, context=128)
    assert sum(tight) <= 128


def test_pairs_without_labels_have_prompts_alone():
    unlabeled = [dataclasses.replace(pair, label=None) for pair in PAIRS]
    sizes = measure(FORMAT, unlabeled)
    assert not sizes.chains
    assert choose_lengths(FORMAT, sizes, pretrained=False, context=2048)[1] == 128
    check_lengths(sizes, 1)


def test_a_length_that_would_cut_chains_is_refused():
    sizes = Sizes(prompts=[10] * 200, chains=[40] * 197 + [90] * 3)
    with pytest.raises(UserError, match=r"completion_length=64: 2% of the chains.*expected 96"):
        check_lengths(sizes, 64)
    check_lengths(Sizes(prompts=[10], chains=[40] * 199 + [90]), 64)
