"""The JSONL reader: accepted rows, and rejected rows with their reason."""

import json

import pytest

from she_jax.data.dataset import open_split, prepare
from she_jax.data.readers.jsonl import Jsonl, JsonlConfig
from she_jax.types import BadRow, Example

ROW = {"query": "red mug", "product": {"title": "Mug, red"}, "label": 4}


def read(tmp_path, *lines, **options) -> list:
    """The rows of a file with these lines (bytes, text, or values to write as JSON)."""
    path = tmp_path / "pairs.jsonl"
    raw = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    path.write_bytes(b"\n".join(raw))
    return list(Jsonl(data_dir=tmp_path, config=JsonlConfig(path=str(path), **options)).rows())


def test_all_fields_are_read(tmp_path):
    (row,) = read(
        tmp_path,
        {
            "query": "taza roja",
            "product": {"title": "Mug", "price": 9.5, "new": True, "tags": ["a", 1], "brand": None},
            "label": 3,
            "steps": {"category": "match"},
            "kind": "plain",
            "uid": 17,
            "rationale": "label: 3",
            "split": "validation",
        },
    )
    assert row.split == "validation"
    assert row.line == 1
    assert row.example == Example(
        uid="17",
        query="taza roja",
        product={"title": "Mug", "price": "9.5", "new": "true", "tags": "a, 1", "brand": ""},
        label=3,
        steps={"category": "match"},
        kind="plain",
        annotations=("category",),
        rationale="label: 3",
    )


def test_evaluation_needs_only_query_and_product(tmp_path):
    pair = {"query": "red mug", "product": {"title": "Mug, red"}}
    (row,) = read(tmp_path, pair, evaluation=True)
    assert row.example == Example(uid="line-1", **pair)


def test_training_needs_a_label_or_a_chain(tmp_path):
    pair = {"query": "red mug", "product": {"title": "Mug, red"}}
    chain = "query: mug\nproduct: mug\ncategory: match\nattributes: red => met\nlabel: 4"
    rows = [pair, pair | {"rationale": "label: 4"}, pair | {"rationale": chain}]
    *bad, good = read(tmp_path, *rows)
    needs = "training needs one, or a rationale with the steps query, product, category, attributes"
    assert [row.reason for row in bad] == [f"no label: {needs}, label"] * 2
    assert good.example.rationale == chain
    other = read(tmp_path, pair | {"rationale": chain}, label_first=True)
    assert [type(row) for row in other] == [BadRow]  # the rationale is a chain of another schema


@pytest.mark.parametrize("label", [1, 4, "1", "4", " 2 "])
def test_labels(tmp_path, label):
    (row,) = read(tmp_path, ROW | {"label": label})
    assert row.example.label == int(label)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: "),
        (b'{"query": "a", "query', "not JSON: "),
        (b"[" * 100_000, "not JSON: "),
        (b'{"query": "\xff"}', "not UTF-8: invalid start byte at byte 11"),
        ([1], "not an object: [1]"),
        ("text", 'not an object: "text"'),
        (ROW | {"query": 3}, "wrong query: 3, expected text"),
        (ROW | {"product": "Mug"}, 'wrong product: "Mug", expected an object with a title'),
        ({"query": "a"}, "wrong product: null, expected an object with a title"),
        (
            ROW | {"product": {"title": {"en": "Mug"}}},
            'wrong product field: title: {"en": "Mug"}, expected text or a number',
        ),
        (ROW | {"product": {"title": "a", "b": [["c"]]}}, "wrong product field: b: "),
        (ROW | {"label": 0}, "wrong label: 0, expected 1, 2, 3 or 4"),
        (ROW | {"label": "E"}, 'wrong label: "E", expected 1, 2, 3 or 4'),
        (ROW | {"label": True}, "wrong label: true, expected 1, 2, 3 or 4"),
        (ROW | {"label": 4.0}, "wrong label: 4.0, expected 1, 2, 3 or 4"),
        (ROW | {"steps": {"category": 1}}, "wrong steps: "),
        (ROW | {"steps": ["category"]}, "wrong steps: "),
        (ROW | {"steps": {"colour": "met"}}, "wrong steps: no step 'colour', expected some of"),
        (ROW | {"steps": {"category": "Match"}}, "wrong steps: category 'Match', expected one of"),
        (ROW | {"steps": {"check_7": "good"}}, "wrong steps: check_7 'good', expected one of"),
        (ROW | {"steps": {"label": "4"}}, "wrong steps: 'label' is a key of the row"),
        (ROW | {"kind": 5}, "wrong kind: 5, expected text"),
        (ROW | {"split": "my split"}, "wrong split: 'my split'"),
        (ROW | {"uid": []}, "wrong uid: []"),
    ],
)
def test_rows_that_cannot_be_used_are_set_aside(tmp_path, line, reason):
    good, bad = read(tmp_path, ROW, line)
    assert good.example.query == "red mug"
    assert isinstance(bad, BadRow)
    assert bad.line == 2
    assert bad.file.endswith("pairs.jsonl")
    assert bad.reason.startswith(reason)


def test_empty_query_and_missing_title_are_set_aside_on_the_way_in(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [
        ROW,
        ROW | {"query": " "},
        ROW | {"product": {"brand": "x"}},
        {"product": {}, "label": 1},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    dataset = prepare(
        Jsonl(data_dir=tmp_path, config=JsonlConfig(path=str(path), max_bad_share=0.9))
    )
    assert dataset.bad_rows == {"empty query": 2, "missing title": 1}
    first = json.loads((dataset.path / "bad_rows.jsonl").read_text().splitlines()[0])
    assert first == {"file": str(path), "line": 2, "reason": "empty query"}


def test_byte_order_mark_blank_lines_and_windows_line_ends(tmp_path):
    line = json.dumps(ROW).encode()
    rows = read(tmp_path, b"\xef\xbb\xbf" + line + b"\r", b"\r", b"", line + b"\r")
    assert [row.line for row in rows] == [1, 4]


def test_splits_go_by_query_and_evaluation_takes_all(tmp_path):
    lines = [ROW | {"query": f"q {i // 2}", "uid": i} for i in range(400)]
    rows = read(tmp_path, *lines)
    by_query = {}
    for row in rows:
        by_query.setdefault(row.example.query, set()).add(row.split)
    assert all(len(splits) == 1 for splits in by_query.values())
    assert {row.split for row in rows} == {"train", "validation", "test"}
    assert {row.split for row in read(tmp_path, *lines, evaluation=True)} == {"test"}


def test_three_languages_and_escapes_come_back_whole(tmp_path):
    path = tmp_path / "pairs.jsonl"
    queries = ["ふちなしメガネ", "gafas para niño", "rimless glasses", "x \\ud800"]
    text = "".join(f'{{"query": "{q}", "product": {{"title": "{q}"}}}}\n' for q in queries)
    path.write_text(text, encoding="utf-8")
    dataset = prepare(Jsonl(data_dir=tmp_path, config=JsonlConfig(path=str(path), evaluation=True)))
    stored = [e.query for e in open_split(dataset.path, "test")]
    assert stored == [*queries[:3], "x"]  # a lone surrogate is no text
