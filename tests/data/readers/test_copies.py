"""A user's table written again with further columns: every row stands as it was."""

import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from she_jax.data.readers.copies import copy_table, free_names
from she_jax.data.readers.records import read_records

COLUMNS = {"label": pa.int64(), "confidence": pa.float64(), "chain": pa.string()}
BLANK = {"label": None, "confidence": None, "chain": "no row"}


def copied(path, folder):
    """Copies a table with an answer for each of its records, and returns the copy's bytes."""
    count = len(list(read_records([path], Counter())))
    answers = ({"label": n, "confidence": n / 2, "chain": 'a; "b", c'} for n in range(count))
    names = copy_table(str(path), folder, COLUMNS, answers, BLANK)
    return names, (folder / path.name).read_bytes()


OURS = '"a; ""b"", c"'


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "query,label\nmug, 3 \n",
            f"query,label,she_label,confidence,chain\nmug, 3 ,0,0.0,{OURS}\n",
        ),
        (  # delimiter, quotes, line ends, a blank line, a row without text, no end of the last line
            '"query";"title"\r\n"a ""b""";"two\r\nlines"\r\n\r\n;\r\n"c";"d"',
            '"query";"title";"label";"confidence";"chain"\r\n'
            f'"a ""b""";"two\r\nlines";"0";"0.0";{OURS}\r\n\r\n;;"";"";"no row"\r\n'
            f'"c";"d";"1";"0.5";{OURS}',
        ),
        (  # rows that are no cells stand whole in the first column
            'query,title\na,"open\nb,c,d\ne,f\n',
            "query,title,label,confidence,chain\n"
            f'"a,""open",,0,0.0,{OURS}\n"b,c,d",,1,0.5,{OURS}\ne,f,2,1.0,{OURS}\n',
        ),
        (
            "\ufeffquery\ttitle\nü\tb\n",
            f"\ufeffquery\ttitle\tlabel\tconfidence\tchain\nü\tb\t0\t0.0\t{OURS}\n",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-be", "gzip"])
def test_csv_keeps_its_form(tmp_path, given, expected, encoding):
    text = given if encoding != "utf-16-be" else "\ufeff" + given.removeprefix("\ufeff")
    marked = expected if text == given else "\ufeff" + expected.removeprefix("\ufeff")
    packed = encoding == "gzip"
    path = tmp_path / ("t.csv.gz" if packed else "t.csv")
    data = text.encode("utf-8" if packed else encoding)
    path.write_bytes(gzip.compress(data) if packed else data)
    _, written = copied(path, tmp_path / "out")
    written = gzip.decompress(written) if packed else written
    assert written.decode("utf-8" if packed else encoding) == marked


def test_bytes_that_are_no_utf_8_stay(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"query,title\nm\xe4rz,b\n")
    _, written = copied(path, tmp_path / "out")
    assert written.splitlines()[1] == b"m\xe4rz,b,0,0.0," + OURS.encode()


def test_json_keeps_its_values_and_names_what_is_no_object(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"q": "é", "n": 1.50, "label": {"x": 1e400}}\n\n{}\nbroken\n{"chain": 1}')
    names, written = copied(path, tmp_path / "out")
    assert names == {"label": "she_label", "confidence": "confidence", "chain": "she_chain"}
    lines = written.decode().splitlines()
    assert lines[0].startswith('{"q": "é", "n": 1.50, "label": {"x": 1e400}, "she_label": 0, ')
    rows = list(map(json.loads, lines))
    assert [row["she_label"] for row in rows] == [0, 1, 2, 3]
    assert (rows[2]["row"], rows[3]["chain"]) == ("broken", 1)


@pytest.mark.parametrize(
    "text",
    ['[{"q": "a\\n",\n  "n": 1},\n {"q": "b"}]', '{\n"q": "a\\n",\n"n": 1\n}\n{"q":\r\n "b"}'],
)
def test_json_over_several_lines_becomes_lines(tmp_path, text):
    path = tmp_path / "t.json"
    path.write_text(text)
    rows = list(map(json.loads, copied(path, tmp_path / "out")[1].decode().splitlines()))
    assert [(row["q"], row.get("n"), row["label"]) for row in rows] == [
        ("a\n", 1, 0),
        ("b", None, 1),
    ]


def test_parquet_keeps_its_types_and_what_is_known_of_it(tmp_path):
    schema = pa.schema(
        [("label", pa.float32()), ("c", pa.dictionary(pa.int8(), pa.string())),
         ("l", pa.list_(pa.struct([("x", pa.date32())])))],
        metadata={b"pandas": b"{}"},
    )  # fmt: skip
    table = pa.Table.from_pydict({"label": [1.5, None], "c": ["a", None], "l": [[], None]}, schema)
    for part in ("part-2", "part-10"):
        (tmp_path / part).mkdir()
        pq.write_table(table, tmp_path / part / "t.parquet")
    answers = ({"label": n, "confidence": None, "chain": "x"} for n in range(4))
    pattern = str(tmp_path / "part-*" / "*.parquet")
    assert copy_table(pattern, tmp_path / "out", COLUMNS, answers, BLANK)["label"] == "she_label"
    copy = pq.read_table(tmp_path / "out" / "part-10" / "t.parquet")
    original = pq.read_table(tmp_path / "part-10" / "t.parquet")
    assert copy.select(["label", "c", "l"]).equals(original, check_metadata=True)
    assert copy.column("she_label").to_pylist() == [2, 3]


def test_an_answer_more_or_less_than_records_is_an_error(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("query,title\na,b\nc,d\n")
    for count, message in ((1, "fewer answers"), (3, "more answers")):
        with pytest.raises(ValueError, match=message):
            copy_table(str(path), tmp_path / "out", COLUMNS, iter([BLANK] * count), BLANK)


def test_names_that_are_taken_get_a_prefix():
    taken = {"label", "she_label", "she_chain"}
    assert free_names(["label", "chain", "she_label"], taken) == {
        "label": "she_she_label", "chain": "chain", "she_label": "she_she_she_label",
    }  # fmt: skip
