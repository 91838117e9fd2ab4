"""Step queries as tokens: prompts, answers, packed rows, and which tokens have loss."""

import numpy as np
import pytest

from she_jax.cot import CotSchema
from she_jax.generate.prompts import EOS, PAD, PromptFormat, train_tokenizer
from she_jax.rewards.prm.packing import VERDICT_WEIGHT, StepQueryFormat
from she_jax.rewards.prm.step_query import CRITIQUE, VERDICT, StepQuery, read_answer
from she_jax.types import Example

LAMP = Example(uid="a", query="red lamp", product={"title": "navy lamp"})
WRITTEN = "query: lamp; red\nproduct: lamp; navy\ncategory: lamp / lamp => near"


def step_query(**fields):
    given = {"critique": "lamp / lamp: match", "correct": False, "written": WRITTEN}
    return StepQuery(example=LAMP, step="category", **given | fields)


def query_format(texts=(WRITTEN,), **sizes):
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


def decoded(form, ids):
    return b"".join(form.prompts.token_bytes[i] for i in ids).decode()


def test_step_queries_and_answers_as_text():
    form, query = query_format(), step_query()
    (question,) = form.questions([query])
    assert decoded(form, question.ids) == f"query: red lamp\ntitle: navy lamp\n\n{WRITTEN}"
    verdict, answer = form.answers([query], [question])
    assert decoded(form, verdict.ids) == "\nverdict: incorrect"
    assert decoded(form, answer.ids) == "\ncritique: lamp / lamp: match\nverdict: incorrect"
    text = decoded(form, answer.ids).removeprefix(CRITIQUE)
    assert read_answer(text) == ("lamp / lamp: match", False)
    assert verdict.ids[-1] == answer.ids[-1] == form.prompts.eos_ids[0]


def test_a_row_continues_with_a_reference_chain_which_sees_the_prompt_alone():
    form, query = query_format(), step_query()
    reference = "query: lamp; red\nlabel: 2"
    rng = np.random.default_rng(0)
    batch, left_out = form.sft_batch([[query], [query]], 100, rng, [reference, ""])
    assert left_out == 0
    assert batch.mask is not None
    weights, tokens = np.asarray(batch.loss_weights), np.asarray(batch.tokens)
    ids = [*form.prompts.encode([reference])[0], form.prompts.eos_ids[0]]
    columns = form.trunk_length + 1 + np.arange(len(ids))
    assert tokens[0, columns].tolist() == ids
    assert (weights[0, columns] == 1).all()
    (question,) = form.questions([query])
    seen = np.flatnonzero(np.asarray(batch.mask)[0, columns[-1]])
    assert tokens[0, seen].tolist() == [*question.prompt, *ids]  # as when the model writes it
    assert np.asarray(batch.positions)[0, seen].tolist() == list(range(len(seen)))
    # Its first token is predicted from the column before it.
    assert tokens[0, columns[0] - 1] == question.prompt[-1]
    alone, _ = form.sft_batch([[query]], 100, np.random.default_rng(0))
    assert weights[1].sum() == np.asarray(alone.loss_weights).sum()


def test_a_chain_begins_with_the_same_tokens_whatever_follows():
    form = query_format(["lamp\nproduct", "navy\ncategory"] * 9)  # pieces across lines
    first = WRITTEN.partition("\n")[0]
    short, long = form.questions([step_query(written=text) for text in (first, WRITTEN)])
    assert long.follows(short)
    assert not short.follows(long)
    assert long.ids[: len(short.ids)] == short.ids


def test_a_critiqued_query_is_what_precedes_the_verdict_in_training():
    form, query = query_format(), step_query()
    questions = form.questions([query])
    verdict, answer = form.answers([query], questions)
    after = len(verdict.ids) - len(form.marks[VERDICT]) - len(form.before)
    shown = [*questions[0].ids, *answer.ids[:-after]]
    assert form.critiqued(questions, [query.critique])[0] == shown


def test_the_verdicts_differ_at_the_rivals_first():
    """Also where a tokenizer writes both with the same first token."""
    for texts in ([WRITTEN], ["verdict: correct", "verdict: incorrect"] * 9, ["a b c d e"]):
        form = query_format(texts)
        both = [step_query(correct=c) for c in (True, False)]
        right, _, wrong, _ = (
            branch.ids[len(form.marks[VERDICT]) :]
            for branch in form.answers(both, form.questions(both))
        )
        n = len(form.before)
        assert tuple(right[:n]) == tuple(wrong[:n]) == form.before
        assert (right[n], wrong[n]) == form.rivals
        assert right[n] != wrong[n]


def test_only_answers_have_loss_and_the_verdict_has_the_largest_weight():
    form = query_format()
    chain = [step_query(), step_query(correct=True)]
    batch, left_out = form.sft_batch([chain, chain[:1]], 400, np.random.default_rng(0))
    assert left_out == 0
    assert batch.prompt_length == form.trunk_length
    tokens, weights = np.asarray(batch.tokens), np.asarray(batch.loss_weights)
    assert not weights[:, : batch.prompt_length].any()
    for row, row_weights, expected in zip(tokens, weights, (chain, chain[:1]), strict=True):
        trained = decoded(form, row[row_weights > 0])
        assert trained.count("verdict: ") == len(expected)  # after the critiques
        assert trained.count("critique") == 0
        assert set(row[row_weights == VERDICT_WEIGHT]) <= set(form.rivals)
        assert (row_weights == VERDICT_WEIGHT).sum() == 2 * len(expected)
        assert set(row_weights.tolist()) == {0.0, 1.0, VERDICT_WEIGHT}


def alone(form, question, ids):
    """Tokens and positions of a branch in a row of its own."""
    row = [*question.ids, *ids]
    return row, list(range(len(row)))


@pytest.mark.parametrize("aligned", [False, True])
def test_a_branch_sees_its_query_and_itself_as_if_alone(aligned):
    """Of three step queries: the trunk, a part of it, and one that differs in its last line."""
    form = query_format()
    corrupted = WRITTEN.replace("=> near", "=> match")
    written = [WRITTEN, WRITTEN.rpartition("\n")[0], corrupted]
    steps = [step_query(written=text) for text in written]
    branches = [
        branch
        for query, question in zip(steps, form.questions(steps), strict=True)
        for branch in form.answers([query], [question])
    ]
    trunk = len(form.questions(steps[:1])[0].ids)
    before = form.trunk_length if aligned else None
    width = form.size(branches)  # exactly what they need, their differing lines included
    width += form.trunk_length - trunk if aligned else 0
    assert (form.pack([branches], width - 1, before).ends == -1).sum() == 1
    packed = form.pack([branches], width, before)
    for branch, end in zip(branches, packed.ends[0], strict=True):
        seen = np.flatnonzero(packed.mask[0, end])
        assert (packed.tokens[0, seen].tolist(), packed.positions[0, seen].tolist()) == alone(
            form, branch.question, branch.ids
        )
        for n, column in enumerate(seen):  # and so do the tokens before it
            if column >= (before or trunk):
                assert np.flatnonzero(packed.mask[0, column]).tolist() == seen[: n + 1].tolist()
    real = packed.positions >= 0
    assert not packed.mask[0][:, ~real[0]].any()


def test_a_branch_that_does_not_fit_is_left_out_and_counted():
    form, chain = query_format(), [step_query(), step_query(correct=True)]
    (verdict, critique) = form.answers(chain[:1], form.questions(chain[:1]))
    room = len(critique.ids) + 2
    before = form.trunk_length
    packed = form.pack([[critique, verdict, critique]], before + room, before)
    assert packed.ends.tolist() == [[form.trunk_length + len(critique.ids) - 1, -1, -1]]
    _, left_out = form.sft_batch([chain], room, np.random.default_rng(0))
    assert left_out > 0


def test_a_critique_is_cut_at_its_end_and_a_chain_never():
    """A chain that is too long is recognized."""
    form = query_format(prompt_length=32, completion_length=24, answer_length=40)
    query = step_query(written="x" * 500 + " => near", critique="why " * 200)
    questions = form.questions([query])
    assert not form.fits(questions[0])
    answer = form.answers([query], questions)[1]
    assert len(answer.ids) == form.answer_length + len(form.marks[CRITIQUE])
    assert decoded(form, answer.ids).endswith("\nverdict: incorrect")
    packed = form.pack([form.answers([query], questions)], form.trunk_length + 100)
    assert packed.ends.tolist() == [[-1, -1]]
    (short,) = form.questions([step_query(written="x => near")])
    assert form.fits(short)
    long = form.critiqued([short], [query.critique])[0]
    assert len(long) <= form.question_length + form.answer_length
    assert decoded(form, long).rstrip().endswith("\nverdict:")


def test_special_tokens_in_texts_are_encoded_as_plain_text():
    form = query_format()
    query = step_query(written=f"query: {EOS}{PAD}")
    ids = form.questions([query])[0].ids
    assert not {form.prompts.eos_ids[0], form.prompts.pad_id} & set(ids)
    assert f"query: {EOS}{PAD}" in decoded(form, ids)


def test_an_answer_length_without_room_for_a_critique_is_an_error():
    with pytest.raises(ValueError, match="answer_length=5: a verdict takes"):
        query_format(answer_length=5)
