"""The intake of rows: clean texts, rejected rows with their reason, and the hash of a query."""

import dataclasses
import io
import json
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes import EXAMPLE, good_rows

from she_jax.data.intake import Intake, Row, normalize_text, query_hash, strip_markup
from she_jax.types import BadRow

TEXT = st.text(st.characters(exclude_categories=()), max_size=40)


def admit(rows: Iterable, max_bad_share: float = 0.05) -> tuple[list[Row], Intake, list[dict]]:
    """The accepted rows, the intake with its counts, and the lines of the file of bad rows."""
    intake, written = Intake(), io.StringIO()
    good = list(intake.admit(rows, written, max_chars=2_000, max_bad_share=max_bad_share))
    return good, intake, [json.loads(line) for line in written.getvalue().splitlines()]


@given(TEXT)
def test_normalize_text_is_idempotent_and_returns_storable_text(text):
    clean = normalize_text(text)
    assert normalize_text(clean) == clean
    assert clean == " ".join(clean.split())
    assert clean.encode().decode() == clean  # no lone surrogates
    assert not set(clean) & set("\0\t\n\r\ufeff\u200b\u200e\u200f\u202a\u202e\u2066\u2069\u061c")


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("  red\tmug\r\n", "red mug"),
        ("a\0b", "a b"),
        ("\ufeff\u202eabc\u202c\u2066d\u2069", "abcd"),
        ("x\ud800y", "x y"),
        ("Ｎintendo　スイッチ ふちなし", "Ｎintendo スイッチ ふちなし"),
        ("can\u0303a niño", "caña niño"),
        ("👩‍👩‍👧 ok", "👩‍👩‍👧 ok"),
    ],
)
def test_normalize_text_cleans_and_keeps_three_languages(dirty, clean):
    assert normalize_text(dirty) == clean


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (
            "<p>10&nbsp;cm</p><br/>A &amp; B<script>var x = '<b>';</script><!-- no --> 5 < 6 <3",
            "10 cm A & B 5 < 6 <3",
        ),
        ("Crayons&copybooks, drink&notebook set", "Crayons&copybooks, drink&notebook set"),
        ("&copybooks; &copy; &#233;t&#xE9 AT&T; &lt;b&gt;", "&copybooks; © été AT&T; <b>"),
    ],
)
def test_markup_goes_and_entities_are_read_where_they_are_some(text, clean):
    assert normalize_text(strip_markup(text)) == clean
    (row,) = good_rows(1, product={"title": text})
    for markup, title in ((True, clean), (False, normalize_text(text))):
        options = {"max_chars": 2_000, "max_bad_share": 0.0, "markup": markup}
        (kept,) = Intake().admit([row], io.StringIO(), **options)
        assert kept.example.product["title"] == title


def test_bad_rows_are_set_aside_with_file_line_and_reason():
    good = good_rows(4)
    defects = [
        ("empty query", {"query": " \u200b "}),
        ("missing title", {"product": {"brand": "x"}}),
        ("missing title", {"product": {"title": "\0"}}),
        ("unknown label: '7', expected 1, 2, 3, 4", {"label": 7}),
        ("empty uid", {"uid": "\n"}),
        ("duplicate uid: '0'", {"uid": "0"}),
    ]
    bad = [
        Row(split="train", example=dataclasses.replace(EXAMPLE, **({"uid": f"b{i}"} | change)))
        for i, (_, change) in enumerate(defects)
    ]
    kept, intake, written = admit(
        [*good, BadRow(file="g", line=9, reason="not JSON: x"), *bad], max_bad_share=0.9
    )
    assert kept == list(good)
    assert [row["reason"] for row in written] == ["not JSON: x", *(reason for reason, _ in defects)]
    assert written[0] == {"file": "g", "line": 9, "reason": "not JSON: x", "record": 4}
    assert intake.bad["missing title"] == 2
    assert intake.bad["duplicate uid"] == intake.bad["not JSON"] == 1


def test_a_row_rejected_for_another_reason_does_not_claim_its_uid():
    bad = Row(split="train", example=dataclasses.replace(EXAMPLE, uid="0", query=""))
    kept, intake, _ = admit([bad, *good_rows(1)], max_bad_share=0.5)
    assert len(kept) == 1
    assert dict(intake.bad) == {"empty query": 1}


def test_long_fields_are_cut_and_counted():
    product = {"title": "x" * 100_000, "brand": "y" * 2_000}
    kept, intake, _ = admit(good_rows(1, product=product))
    assert kept[0].example.product == {"title": "x" * 2_000, "brand": "y" * 2_000}
    assert intake.cut == 1


def test_a_rationale_keeps_its_lines():
    kept, _, _ = admit(good_rows(1, rationale="query: a\tb\r\nlabel: 4"))
    assert kept[0].example.rationale == "query: a b\nlabel: 4"


def test_a_stream_of_bad_rows_is_aborted_early():
    read = []

    def stream():
        for i in range(100_000):
            read.append(i)
            yield BadRow(file="f", line=i, reason="not JSON")

    with pytest.raises(ValueError, match="1000 of 1000 rows"):
        admit(stream())
    assert len(read) == 1_000


def test_query_hash_ignores_case_and_white_space_and_is_uniform():
    assert query_hash("Red  mug\n") == query_hash("red mug") != query_hash("red mugs")
    hashes = [query_hash(f"query {i}") for i in range(2_000)]
    assert all(0 <= value < 1 for value in hashes)
    assert 0.45 < sum(hashes) / len(hashes) < 0.55
