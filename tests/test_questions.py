"""Examinations as tokens: questions, answers, what is trained."""

import numpy as np
import pytest

from she_jax.cot import CotSchema
from she_jax.data.prompts import EOS, PAD, PromptFormat, train_tokenizer
from she_jax.data.questions import QuestionFormat
from she_jax.examination import CRITIQUE, VERDICT, Examination, read_answer
from she_jax.types import Example

LAMP = Example(uid="a", query="red lamp", product={"title": "navy lamp"})
WRITTEN = "query: lamp; red\nproduct: lamp; navy\ncategory: lamp / lamp => near"


def examination(**fields):
    given = {"critique": "lamp / lamp: match", "correct": False, "written": WRITTEN}
    return Examination(example=LAMP, step="category", **given | fields)


def question_format(texts=(WRITTEN,), **sizes):
    tokenizer = train_tokenizer(texts, 300)
    vocab = tokenizer.get_vocab()
    prompts = PromptFormat(
        tokenizer=tokenizer,
        schema=CotSchema(),
        eos_ids=(vocab[EOS],),
        pad_id=vocab[PAD],
        prompt_length=sizes.pop("prompt_length", 64),
        completion_length=sizes.pop("completion_length", 96),
    )
    return QuestionFormat(prompts=prompts, answer_length=sizes.pop("answer_length", 64))


def said(form, ids):
    return b"".join(form.prompts.token_bytes[i] for i in ids).decode()


def test_questions_and_answers_as_text():
    form, one = question_format(), examination()
    direct, critique = form.questions([one, one], [VERDICT, CRITIQUE])
    pair = "query: red lamp\ntitle: navy lamp\n\n"
    assert said(form, direct) == f"{pair}{WRITTEN}\nverdict:"
    assert said(form, critique) == f"{pair}{WRITTEN}\ncritique:"
    verdict, answer = form.answers([one, one], [VERDICT, CRITIQUE])
    assert said(form, verdict) == " incorrect"
    assert said(form, answer) == " lamp / lamp: match\nverdict: incorrect"
    assert read_answer(said(form, answer)) == ("lamp / lamp: match", False)
    assert verdict[-1] == answer[-1] == form.prompts.eos_ids[0]


def test_a_critiqued_question_is_what_training_shows_before_the_verdict():
    form, one = question_format(), examination()
    question = form.questions([one], [CRITIQUE])
    answer = form.answers([one], [CRITIQUE])[0]
    verdict = form.answers([one], [VERDICT])[0]
    assert form.critiqued(question, [one.critique])[0] == question[0] + answer[: -len(verdict)]


def test_the_verdicts_part_at_the_rivals():
    """Also where a tokenizer writes both with the same first token."""
    for texts in ([WRITTEN], ["verdict: correct", "verdict: incorrect"] * 9, ["a b c d e"]):
        form = question_format(texts)
        right, wrong = form.answers([examination(correct=c) for c in (True, False)], [VERDICT] * 2)
        n = len(form.before)
        assert tuple(right[:n]) == tuple(wrong[:n]) == form.before
        assert (right[n], wrong[n]) == form.rivals
        assert right[n] != wrong[n]


def test_only_the_answer_is_trained():
    form = question_format()
    asked = [VERDICT, CRITIQUE]
    batch = form.sft_batch([examination(), examination(correct=True)], asked)
    answers = form.answers([examination(), examination(correct=True)], asked)
    tokens, weights = np.asarray(batch.tokens), np.asarray(batch.weights)
    assert batch.tokens.shape == (2, form.question_length + form.answer_length)
    assert batch.prompt_length == form.question_length
    for row, trained, places, answer in zip(
        tokens, weights, np.asarray(batch.positions), answers, strict=True
    ):
        assert row[trained == 1].tolist() == answer
        assert set(trained) == {0.0, 1.0}
        real = places >= 0
        assert places[real].tolist() == list(range(real.sum()))
        assert (row[~real] == form.prompts.pad_id).all()


def test_long_texts_are_cut_where_they_may_be():
    """The end of the chain and the verdict always stay."""
    form = question_format(prompt_length=32, completion_length=24, answer_length=40)
    one = examination(written="x" * 500 + " => near", critique="why " * 200)
    question = form.questions([one], [VERDICT])[0]
    assert said(form, question).endswith("xx => near\nverdict:")
    assert len(question) <= form.question_length
    answer = form.answers([one], [CRITIQUE])[0]
    assert len(answer) == form.answer_length
    assert said(form, answer).endswith("\nverdict: incorrect")
    long = form.critiqued([question], [one.critique])[0]
    assert len(long) <= form.question_length + form.answer_length
    assert said(form, long).endswith("\nverdict:")


def test_special_tokens_in_the_text_are_plain_letters():
    form = question_format()
    one = examination(written=f"query: {EOS}{PAD}")
    ids = form.questions([one], [VERDICT])[0]
    assert not {form.prompts.eos_ids[0], form.prompts.pad_id} & set(ids)
    assert f"query: {EOS}{PAD}" in said(form, ids)


def test_an_answer_without_room_for_a_critique_is_an_error():
    with pytest.raises(ValueError, match="answer_length=5: a verdict takes"):
        question_format(answer_length=5)
