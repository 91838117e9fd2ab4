"""Examinations as tokens: questions, answers, what is trained."""

import numpy as np
import pytest

from she_jax.cot import CotSchema
from she_jax.generate.prompts import EOS, PAD, PromptFormat, train_tokenizer
from she_jax.rewards.prm.packing import VERDICT_WEIGHT, StepQueryFormat
from she_jax.rewards.prm.step_query import CRITIQUE, VERDICT, StepQuery, read_answer
from she_jax.types import Example

LAMP = Example(uid="a", query="red lamp", product={"title": "navy lamp"})
WRITTEN = "query: lamp; red\nproduct: lamp; navy\ncategory: lamp / lamp => near"


def examination(**fields):
    given = {"critique": "lamp / lamp: match", "correct": False, "written": WRITTEN}
    return StepQuery(example=LAMP, step="category", **given | fields)


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
    return StepQueryFormat(prompts=prompts, answer_length=sizes.pop("answer_length", 64))


def said(form, ids):
    return b"".join(form.prompts.token_bytes[i] for i in ids).decode()


def test_questions_and_answers_as_text():
    form, one = question_format(), examination()
    (question,) = form.questions([one])
    assert said(form, question.ids) == f"query: red lamp\ntitle: navy lamp\n\n{WRITTEN}"
    verdict, answer = form.answers([one], [question])
    assert said(form, verdict.ids) == "\nverdict: incorrect"
    assert said(form, answer.ids) == "\ncritique: lamp / lamp: match\nverdict: incorrect"
    text = said(form, answer.ids).removeprefix(CRITIQUE)
    assert read_answer(text) == ("lamp / lamp: match", False)
    assert verdict.ids[-1] == answer.ids[-1] == form.prompts.eos_ids[0]


def test_a_row_goes_on_with_the_own_chain_which_sees_the_pair_alone():
    form, one = question_format(), examination()
    own = "query: lamp; red\nlabel: 2"
    batch, missing_steps = form.sft_batch([[one], [one]], 100, np.random.default_rng(0), [own, ""])
    assert missing_steps == 0
    assert batch.mask is not None
    weights, tokens = np.asarray(batch.loss_weights), np.asarray(batch.tokens)
    ids = [*form.prompts.encode([own])[0], form.prompts.eos_ids[0]]
    columns = form.trunk_length + 1 + np.arange(len(ids))
    assert tokens[0, columns].tolist() == ids
    assert (weights[0, columns] == 1).all()
    (question,) = form.questions([one])
    seen = np.flatnonzero(np.asarray(batch.mask)[0, columns[-1]])
    assert tokens[0, seen].tolist() == [*question.prompt, *ids]  # as where it is written
    assert np.asarray(batch.positions)[0, seen].tolist() == list(range(len(seen)))
    # What comes first is read off the column before it.
    assert tokens[0, columns[0] - 1] == question.prompt[-1]
    alone, _ = form.sft_batch([[one]], 100, np.random.default_rng(0))
    assert weights[1].sum() == np.asarray(alone.loss_weights).sum()


def test_a_chain_begins_with_the_same_tokens_whatever_follows():
    form = question_format(["lamp\nproduct", "navy\ncategory"] * 9)  # pieces across lines
    first = WRITTEN.partition("\n")[0]
    short, long = form.questions([examination(written=text) for text in (first, WRITTEN)])
    assert long.follows(short)
    assert not short.follows(long)
    assert long.ids[: len(short.ids)] == short.ids


def test_a_critiqued_question_is_what_training_shows_before_the_verdict():
    form, one = question_format(), examination()
    questions = form.questions([one])
    verdict, answer = form.answers([one], questions)
    after = len(verdict.ids) - len(form.marks[VERDICT]) - len(form.before)
    shown = [*questions[0].ids, *answer.ids[:-after]]
    assert form.critiqued(questions, [one.critique])[0] == shown


def test_the_verdicts_part_at_the_rivals():
    """Also where a tokenizer writes both with the same first token."""
    for texts in ([WRITTEN], ["verdict: correct", "verdict: incorrect"] * 9, ["a b c d e"]):
        form = question_format(texts)
        both = [examination(correct=c) for c in (True, False)]
        right, _, wrong, _ = (
            branch.ids[len(form.marks[VERDICT]) :]
            for branch in form.answers(both, form.questions(both))
        )
        n = len(form.before)
        assert tuple(right[:n]) == tuple(wrong[:n]) == form.before
        assert (right[n], wrong[n]) == form.rivals
        assert right[n] != wrong[n]


def test_only_the_answers_are_trained_and_the_verdict_most_of_all():
    form = question_format()
    chain = [examination(), examination(correct=True)]
    batch, missing_steps = form.sft_batch([chain, chain[:1]], 400, np.random.default_rng(0))
    assert missing_steps == 0
    assert batch.prompt_length == form.trunk_length
    tokens, weights = np.asarray(batch.tokens), np.asarray(batch.loss_weights)
    assert not weights[:, : batch.prompt_length].any()
    for row, weighed, expected in zip(tokens, weights, (chain, chain[:1]), strict=True):
        trained = said(form, row[weighed > 0])
        assert trained.count("verdict: ") == len(expected)  # behind the critiques
        assert trained.count("critique") == 0
        assert set(row[weighed == VERDICT_WEIGHT]) <= set(form.rivals)
        assert (weighed == VERDICT_WEIGHT).sum() == 2 * len(expected)
        assert set(weighed.tolist()) == {0.0, 1.0, VERDICT_WEIGHT}


def alone(form, question, ids):
    """Tokens and positions of a branch in a row of its own."""
    row = [*question.ids, *ids]
    return row, list(range(len(row)))


@pytest.mark.parametrize("aligned", [False, True])
def test_a_branch_sees_its_question_and_itself_as_it_would_alone(aligned):
    """Of three questions: one in the trunk, a part of it, and one whose last line is another."""
    form = question_format()
    spoilt = WRITTEN.replace("=> near", "=> match")
    written = [WRITTEN, WRITTEN.rpartition("\n")[0], spoilt]
    steps = [examination(written=text) for text in written]
    branches = [
        branch
        for one, question in zip(steps, form.questions(steps), strict=True)
        for branch in form.answers([one], [question])
    ]
    trunk = len(form.questions(steps[:1])[0].ids)
    before = form.trunk_length if aligned else None
    width = form.size(branches)  # no more than they take, lines of their own included
    width += form.trunk_length - trunk if aligned else 0
    assert (form.pack([branches], width - 1, before).ends == -1).sum() == 1
    packed = form.pack([branches], width, before)
    for branch, end in zip(branches, packed.ends[0], strict=True):
        seen = np.flatnonzero(packed.mask[0, end])
        assert (packed.tokens[0, seen].tolist(), packed.positions[0, seen].tolist()) == alone(
            form, branch.question, branch.ids
        )
        for n, column in enumerate(seen):  # and each token before it sees those before itself
            if column >= (before or trunk):
                assert np.flatnonzero(packed.mask[0, column]).tolist() == seen[: n + 1].tolist()
    real = packed.positions >= 0
    assert not packed.mask[0][:, ~real[0]].any()


def test_a_branch_without_room_is_left_out_and_counted():
    form, chain = question_format(), [examination(), examination(correct=True)]
    (verdict, critique) = form.answers(chain[:1], form.questions(chain[:1]))
    room = len(critique.ids) + 2
    before = form.trunk_length
    packed = form.pack([[critique, verdict, critique]], before + room, before)
    assert packed.ends.tolist() == [[form.trunk_length + len(critique.ids) - 1, -1, -1]]
    _, missing_steps = form.sft_batch([chain], room, np.random.default_rng(0))
    assert missing_steps > 0


def test_long_texts_are_cut_where_they_may_be():
    """Of a critique the end; a chain is never cut, but known to be too long."""
    form = question_format(prompt_length=32, completion_length=24, answer_length=40)
    one = examination(written="x" * 500 + " => near", critique="why " * 200)
    questions = form.questions([one])
    assert not form.fits(questions[0])
    answer = form.answers([one], questions)[1]
    assert len(answer.ids) == form.answer_length + len(form.marks[CRITIQUE])
    assert said(form, answer.ids).endswith("\nverdict: incorrect")
    packed = form.pack([form.answers([one], questions)], form.trunk_length + 100)
    assert packed.ends.tolist() == [[-1, -1]]
    (short,) = form.questions([examination(written="x => near")])
    assert form.fits(short)
    long = form.critiqued([short], [one.critique])[0]
    assert len(long) <= form.question_length + form.answer_length
    assert said(form, long).rstrip().endswith("\nverdict:")


def test_special_tokens_in_the_text_are_plain_letters():
    form = question_format()
    one = examination(written=f"query: {EOS}{PAD}")
    ids = form.questions([one])[0].ids
    assert not {form.prompts.eos_ids[0], form.prompts.pad_id} & set(ids)
    assert f"query: {EOS}{PAD}" in said(form, ids)


def test_an_answer_without_room_for_a_critique_is_an_error():
    with pytest.raises(ValueError, match="answer_length=5: a verdict takes"):
        question_format(answer_length=5)
