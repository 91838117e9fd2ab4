"""What a policy wrote that is no chain."""

import pytest

from she_jax.cot import CotSchema
from she_jax.evaluation.unread import Unread

SCHEMA = CotSchema()
GOOD = "query: a\nproduct: b\ncategory: match\nattributes: met\nlabel: 3"


@pytest.mark.parametrize(
    ("texts", "share", "words"),
    [
        ([GOOD], 0.0, []),
        (
            [GOOD, "label: 2", "a [b]\x1b[31m\nc" + "d" * 300, GOOD],
            0.5,
            ["2 of 4 completions", "and 3 have a label; 1 ran out of tokens", '"label: 2"'],
        ),
        (
            ["a [b]\x1b[31m\nc" + "d" * 300, "label: 2"],
            1.0,
            ["none of 2", "and 1 have a label; 1 ran out", '"a [b]\\x1b[31m\\ncddd', "characters)"],
        ),
        (
            ["d" * 301, "e" * 301],
            1.0,
            [
                "none of 2 completions can be read as a whole chain, and 0 have a label, which is "
                "why all metrics are 0; 2 ran out of tokens (model.completion_length=24)"
            ],
        ),
    ],
)
def test_the_sentence_counts_and_shows_what_cannot_be_read(texts, share, words):
    unread = Unread(24)
    for text in texts:
        unread.add(SCHEMA.parse(text), text, len(text) > 300)
    assert unread.share == share
    for word in words:
        assert word in unread.sentence()
    assert len(unread.sentence().splitlines()) == 1
