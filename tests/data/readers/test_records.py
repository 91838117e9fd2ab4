"""Rows of JSON and Parquet: as their text, nested fields, parts of a table, files that are none."""

import gzip
import json
from collections import Counter
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from she_jax.data.readers.records import column_names, read_records
from she_jax.data.readers.table_files import table_parts
from she_jax.types import BadRow, UserError


def cells(path, left_out=None) -> list[dict]:
    """The cells of every row of the table at a path; no row is bad."""
    return [record.cells for record in read_records(table_parts(str(path)), left_out or Counter())]


def places(path) -> list[tuple]:
    """The lines of the rows, with the reason of a bad one."""
    records = read_records([path], Counter())
    return [(r.line, r.reason if isinstance(r, BadRow) else "") for r in records]


def test_numbers_in_json_stand_as_in_the_file_and_nan_is_missing(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 0.10, "b": 1E5, "c": 00042}\n{"a": NaN, "b": true, "c": "NaN", "d": ""}')
    bad, good = read_records([path], Counter())
    assert bad.reason.startswith("not JSON: ")  # JSON has no leading zeros
    assert good.cells == {"b": "true", "c": "NaN"}
    path.write_text('{"a": 0.10, "b": 1E5, "c": 12345678901234567890, "d": null}')
    assert cells(path) == [{"a": "0.10", "b": "1E5", "c": "12345678901234567890"}]


def test_nested_fields(tmp_path):
    row = {
        "product": {"title": "Mug", "tags": ["a", 1, None], "details": {"Color": "Red", "x": {}}},
        "steps": {"category": "match"},
        "images": [{"thumb": "x"}],
        "deep": {"a": {"b": {"c": 1}}, "d": 2},
    }
    (tmp_path / "t.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    left_out = Counter({"": 0})
    (first, *_) = cells(tmp_path / "t.jsonl", left_out)
    assert first == {
        "product.title": "Mug",
        "product.tags": "a, 1",
        "product.details.Color": "Red",
        "steps.category": "match",
        "deep.d": "2",
    }
    assert +left_out == {"product.details.x": 3, "images": 3, "deep.a": 3}


def test_arrays_and_objects_over_several_lines_are_rows(tmp_path):
    path, values = tmp_path / "t.json", [{"a": "1"}, {"a": "2", "b": ["x", "y"]}]
    expected = [{"a": "1"}, {"a": "2", "b": "x, y"}]
    for indent, lines in ((None, [1, 1]), (1, [2, 5])):
        path.write_text(json.dumps(values, indent=indent))
        assert cells(path) == expected
        assert places(path) == [(line, "") for line in lines]
    path.write_text("\n".join(json.dumps(value, indent=2) for value in values))
    assert cells(path) == expected
    path.write_text('[{"a": 1},\n{"a": 2},\n{"a": 3')
    *_, (line, reason) = places(path)
    assert (line, reason.endswith("the rest of the file cannot be read")) == (3, True)


def test_a_judgment_list_of_opensearch_is_read(tmp_path):
    ratings = [{"docId": "0042", "rating": "0.5"}, {"docId": "B", "rating": 1}]
    judged = {"judgmentRatings": [{"query": "mug", "ratings": ratings}]}
    (tmp_path / "t.json").write_text(json.dumps(judged))
    assert cells(tmp_path / "t.json") == [
        {"query": "mug", "docid": "0042", "label": "0.5"},
        {"query": "mug", "docid": "B", "label": "1"},
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: "),
        (b"[" * 100_000, "not JSON: "),
        (b'{"query": "\xff"}', "not UTF-8: byte 0xff"),
        (b'["a"]', 'not an object: ["a'),
        (b'"text"', 'not an object: "text"'),
    ],
)
def test_lines_that_are_no_rows(tmp_path, line, reason):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}')
    (_, (number, found), (last, _)) = places(path)
    assert (number, last) == (3, 4)
    assert found.startswith(reason[:20])


def test_parquet_cells_are_text(tmp_path):
    table = pa.table(
        {
            "gap": pa.array([4.0, None, float("nan"), 123456789012.0]),
            "price": pa.array([19.99, 4.0, None, 0.5], pa.float32()),
            "half": pa.array([1.5, 2.0, None, None], pa.float16()),
            "category": pa.array(["a", None, "b", "a"]).dictionary_encode(),
            "view": pa.array(["00042", "NA", "", "x"], pa.string_view()),
            "large": pa.array(["x", "y", "z", "w"], pa.large_string()),
            "money": pa.array([Decimal("4.00"), None, None, None]),
            "new": [True, False, None, True],
            "details": [{"color": "red", "sizes": [1, 2]}] * 4,
            "images": [[{"url": "x"}]] * 4,
            "bytes": [b"\xff\xfe"] * 4,
        }
    )
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=3)
    left_out = Counter({"": 0})
    first, second, third, fourth = cells(tmp_path / "t.parquet", left_out)
    same = {"details.color": "red", "details.sizes": "1, 2"}
    assert first == same | {
        "gap": "4",
        "price": "19.99",
        "half": "1.5",
        "category": "a",
        "view": "00042",
        "large": "x",
        "money": "4.00",
        "new": "true",
    }
    assert second == same | {"price": "4", "half": "2", "view": "NA", "large": "y", "new": "false"}
    assert third == same | {"category": "b", "large": "z"}
    assert (fourth["gap"], fourth["price"]) == ("123456789012", "0.5")
    assert +left_out == {"images": 4, "bytes": 4}
    names = column_names([tmp_path / "t.parquet"])
    assert {"details.color", "details.sizes", "gap"} < set(names)
    packed = tmp_path / "t.parquet.gz"
    packed.write_bytes(gzip.compress((tmp_path / "t.parquet").read_bytes()))
    assert cells(packed)[0] == first


def test_parts_are_read_in_the_order_of_their_numbers_with_the_columns_of_their_folders(tmp_path):
    for n in (10, 2, 1):
        folder = tmp_path / f"locale=0{n}"
        folder.mkdir()
        pq.write_table(pa.table({"n": [f"{n}"]}), folder / f"part-{n}.parquet")
    (tmp_path / "_SUCCESS.csv").touch()
    expected = [{"n": str(n), "locale": f"0{n}"} for n in (1, 2, 10)]
    assert cells(tmp_path) == cells(tmp_path / "*" / "*.parquet") == expected
    assert set(column_names(table_parts(str(tmp_path)))) == {"n", "locale"}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"docid": ["0123"]}, "'docid' is number in the first and text in the second"),
        ({"sku": [1]}, r"different columns: \['docid', 'sku'\]"),
    ],
)
def test_parts_that_differ_are_refused_with_both(tmp_path, other, message):
    pq.write_table(pa.table({"docid": [123]}), tmp_path / "1.parquet")
    pq.write_table(pa.table(other), tmp_path / "2.parquet")
    with pytest.raises(UserError, match=rf"1\.parquet and .*2\.parquet.*{message}"):
        column_names(table_parts(str(tmp_path)))


def test_integers_doubles_and_nulls_of_one_column_are_one_kind(tmp_path):
    for n, values in enumerate(([1, 2], [1.0, None], [None, None])):
        pq.write_table(pa.table({"a": values, "b": ["x", "y"]}), tmp_path / f"{n}.parquet")
    parts = table_parts(str(tmp_path))
    assert column_names(parts) == ("a", "b")
    read = [record.cells.get("a") for record in read_records(parts, Counter())]
    assert read == ["1", "2", "1", None, None, None]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        (
            "t.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid x",
            "Git LFS pointer.*lfs pull",
        ),
        ("t.parquet", b"version https://git-lfs.github.com/spec/v1\noid x", "Git LFS pointer"),
        ("t.csv", b"PK\x03\x04...", "a workbook or a zip archive.*save the sheet as CSV"),
        ("t.csv", b"<!DOCTYPE html><html>", "a web page"),
        ("t.csv", "query,b".encode("utf-16-le"), "save it as UTF-8"),
        ("t.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 999, mtime=0)[:-20], "cut short"),
        ("t.parquet", b"PAR1", "cannot be read as Parquet.*cut short"),
        ("t.xml", b"<a/>", r"a name that ends in \.csv, \.tsv"),
        ("t.json", b"", "is empty"),
    ],
)
def test_files_that_are_no_table_are_named(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=message):
        cells(tmp_path / name)


def test_a_folder_without_a_table_is_named(tmp_path):
    with pytest.raises(UserError, match="no table"):
        table_parts(str(tmp_path))
    for name in ("a.csv", "b.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"several kinds \(delimited, parquet\)"):
        table_parts(str(tmp_path))
