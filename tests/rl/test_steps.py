"""The assignment of tokens to steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from she_jax.cot import CotSchema
from she_jax.rl.steps import step_ids

# A vocabulary by hand; the last token is the end of sequence, which has no bytes.
VOCAB = ["a", "b", "\n", "x\n", "\nq", "\n\n", "s: ", ""]
NEWLINES = np.array([piece.count("\n") for piece in VOCAB])
A, B, NL, X_NL, NL_Q, NL_NL, S, EOS = range(len(VOCAB))


def ids_of(tokens, line_steps, mask=None):
    tokens = np.array([tokens])
    mask = np.ones(tokens.shape, dtype=bool) if mask is None else np.array([mask], dtype=bool)
    return step_ids(tokens, mask, NEWLINES, [line_steps]).tolist()[0]


def test_a_newline_ends_its_line_and_belongs_to_it():
    assert ids_of([A, B, NL, A, NL, B], [4, 5, 6]) == [4, 4, 4, 5, 5, 6]


def test_a_token_belongs_to_the_line_of_its_first_byte():
    """'x newline' ends line 0; 'newline q' begins in line 1; the two newlines skip line 3."""
    assert ids_of([A, X_NL, B, NL_Q, A, NL_NL, B], [0, 1, 2, 3, 4]) == [0, 0, 1, 1, 2, 2, 4]


def test_trap_2_the_end_of_sequence_belongs_to_the_last_step():
    """It has no bytes and belongs to the line it ends, also after a newline."""
    assert ids_of([A, NL, B, EOS], [0, 4]) == [0, 0, 4, 4]
    assert ids_of([A, NL, B, NL, EOS], [0, 4, 4]) == [0, 0, 4, 4, 4]


def test_outside_the_completion_there_is_no_step_and_no_newline_counts():
    got = ids_of([NL, NL, A, NL, B, NL, A], [0, 1], mask=[0, 0, 1, 1, 1, 0, 0])
    assert got == [-1, -1, 0, 0, 1, -1, -1]


def test_lines_outside_every_step_and_lines_after_the_last_step():
    assert ids_of([A, NL, B, NL, A, NL, A], [-1, 2, 3]) == [-1, -1, 2, 2, 3, 3, -1]


def test_rows_do_not_affect_each_other():
    tokens = np.array([[A, NL, B], [NL, NL, B]])
    lines = [[0, 1], [2, 3, 4]]
    got = step_ids(tokens, np.ones((2, 3), dtype=bool), NEWLINES, lines)
    assert got.tolist() == [[0, 0, 1], [2, 3, 4]]


@pytest.mark.parametrize("shift", [1, 5])
def test_more_padding_changes_nothing(shift):
    tokens, lines = [A, NL_Q, B, NL_NL, A, EOS], [0, 1, 2, 3]
    plain = ids_of(tokens, lines)
    padded = ids_of(
        [NL] * shift + tokens + [NL] * shift, lines, [0] * shift + [1] * 6 + [0] * shift
    )
    assert padded == [-1] * shift + plain + [-1] * shift


@given(st.lists(st.sampled_from(["query:", "label:", "\n", " 4", "x", "\n\n", "x\nlabel: ", ""])))
def test_the_steps_of_tokens_agree_with_the_parser(pieces):
    """However the text is split: the step of a token is that of the line of its first byte."""
    text = "".join(pieces)
    chain = CotSchema().parse(text)
    vocab = sorted(set(pieces)) or ["x"]
    tokens = np.array([[vocab.index(piece) for piece in pieces]], dtype=int).reshape(1, -1)
    newlines = np.array([piece.count("\n") for piece in vocab])
    got = step_ids(tokens, np.ones(tokens.shape, dtype=bool), newlines, [chain.line_steps])
    before = 0
    for piece, step in zip(pieces, got[0], strict=True):
        assert step == chain.line_steps[text[:before].count("\n")]
        before += len(piece)
