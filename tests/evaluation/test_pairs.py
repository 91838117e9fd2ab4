"""What a look at pairs finds before anything is trained."""

import pytest

from she_jax.cot import CotSchema, LabelSet
from she_jax.evaluation.pairs import (
    contradictions,
    distinct_queries,
    languages,
    rater_agreement,
    spelled_share,
    telling_fields,
)
from she_jax.generate.prompts import PromptFormat, train_tokenizer
from she_jax.types import Example

LABELS = LabelSet.parse("0-3")


def pair(n, label=0, title="mug", **fields):
    return Example(uid=str(n), query=f"mug {n}", product={"title": title} | fields, label=label)


def rated(*raters):
    return Example(uid="a", query="q", product={"title": "t"}, raters=raters)


def test_raters_agree_by_the_whole_scale():
    assert rater_agreement([rated(), rated(1)], LABELS) is None
    same = rater_agreement([rated(0, 0), rated(3, 3), rated(2)], LABELS)
    assert (same.pairs, same.same, same.kappa) == (2, 1.0, 1.0)
    # Of the pairs (0, 3) and (3, 3) in both orders: 1 - 18 / 4 over 9 times 2 x 1/4 x 3/4.
    apart = rater_agreement([rated(0, 3), rated(3, 3)], LABELS)
    assert apart.same == 0.5
    assert apart.kappa == pytest.approx(1 - (9 * 2 / 4) / (9 * 2 * (1 / 4) * (3 / 4)))


def test_a_pair_that_comes_twice_with_different_labels_is_found():
    first, second = pair(1, 0), pair(1, 3)
    assert contradictions([first, pair(2, 3), second]) == [(first, second)]
    assert not contradictions([first, first, pair(1, None)])


def test_a_field_that_gives_the_label_away_is_found():
    train = [pair(n, n % 4, title=f"mug {n}", bucket=str(n % 4), shop="a") for n in range(80)]
    held_out = [pair(n, n % 4, title=f"mug {n}", bucket=str(n % 4), shop="a") for n in range(100)]
    assert telling_fields(train, held_out) == [("bucket", 1.0, 0.25)]
    assert telling_fields(train, []) == []


def test_languages_queries_and_bytes():
    german = Example(
        uid="g", query="stuhl für den garten", product={"title": "Stuhl mit Lehne und"}
    )
    japanese = Example(uid="j", query="赤い マグカップ", product={"title": "マグカップ 赤"})
    assert languages([german, japanese]) == {"German": 1, "Japanese": 1}
    assert distinct_queries(["Stuhl", "stuhl ", "Tisch"]) == 2
    tokenizer = train_tokenizer(["plain text " * 9], 270)
    prompts = PromptFormat(
        tokenizer=tokenizer,
        schema=CotSchema(),
        eos_ids=(1,),
        pad_id=0,
        prompt_length=64,
        completion_length=64,
    )
    assert spelled_share(prompts, ["plain text"]) == 0
    assert spelled_share(prompts, ["赤"]) == 1
