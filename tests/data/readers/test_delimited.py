"""CSV, TSV and qrels: cells as their text, rows with their lines, quotes that were not closed."""

import gzip

import pytest

from she_jax.data.readers.delimited import OPEN_QUOTE, read_delimited, read_header, read_qrels
from she_jax.types import BadRow, UserError


def rows(tmp_path, text, name="t.csv"):
    """Lines with their cells, or with the reason of a bad row."""
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [
        (row.line, row.reason if isinstance(row, BadRow) else list(row.cells.values()))
        for row in read_delimited(path)
    ]


def test_every_cell_is_its_text_and_only_the_empty_one_is_missing(tmp_path):
    cells = ["00042", "12345678901234567890", "10:30", "2019-01-02", "true", "1_000", "NA", "None"]
    header = ",".join("abcdefgh")
    assert rows(tmp_path, f"{header}\n{','.join(cells)}\n") == [(2, cells)]
    (row,) = read_delimited(tmp_path / "t.csv")
    assert row.cells == dict(zip("abcdefgh", cells, strict=True))
    assert rows(tmp_path, "a,b,c\n1,, \n") == [(2, ["1"])]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_delimiters_line_ends_and_encodings(tmp_path, delimiter, end, encoding):
    lines = ["id,title", "7,Größe", "", '8,"two', 'lines"', "9,é"]
    text = end.join(line.replace(",", delimiter) for line in lines)
    read = rows(tmp_path, gzip.compress(text.encode(encoding)), "t.csv.gz")
    assert read == [(2, ["7", "Größe"]), (4, ["8", f"two{end}lines"]), (6, ["9", "é"])]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("a;b,c", "it holds comma and semicolon"),
        ("query", "no comma, semicolon, tab in it"),
        ("a,b,a", r"columns \['a'\] stand twice"),
        ("", "is empty"),
    ],
)
def test_headers_that_say_nothing_are_refused(tmp_path, header, message):
    (tmp_path / "t.csv").write_text(header)
    with pytest.raises(UserError, match=message):
        read_header(tmp_path / "t.csv")


def test_a_quoted_name_may_hold_another_delimiter(tmp_path):
    (tmp_path / "t.csv").write_text('query,"price; net",,id\n')
    assert read_header(tmp_path / "t.csv") == ("query", "price; net", "id")


def test_line_breaks_and_delimiters_in_quoted_cells_are_text(tmp_path):
    text = 'id,title,brand\n1,"a, b\nc, d ""x""\ne",Acme\n2,plain,"B, Inc"\n'
    assert rows(tmp_path, text) == [
        (2, ["1", 'a, b\nc, d "x"\ne', "Acme"]),
        (5, ["2", "plain", "B, Inc"]),
    ]


@pytest.mark.parametrize(
    "rest",
    [
        '3,mug,A\n4,"the classic" fan,B\n',  # rows in between
        '4,"the classic" fan,B\n',  # text behind the quote that closes
        "4,fan,B\n",  # the end of the file
    ],
)
def test_a_quote_that_was_not_closed_costs_its_row_and_no_other(tmp_path, rest):
    read = rows(tmp_path, f'id,title,brand\n1,pan,A\n2,"round mirror,A\n{rest}')
    assert read[:2] == [(2, ["1", "pan", "A"]), (3, OPEN_QUOTE)]
    expected = [line.replace('"', "").split(",") for line in rest.splitlines()]
    assert read[2:] == [(n, cells) for n, cells in enumerate(expected, start=4)]


def test_two_rows_that_share_a_pair_of_quotes_are_seen_by_their_tabs(tmp_path):
    read = rows(tmp_path, 'id\tname\tkind\n1\t"mirror\tA\n2\tposter 24"\tB\n3\tc\td\n')
    assert read == [
        (2, OPEN_QUOTE),
        (3, ["2", 'poster 24"', "B"]),
        (4, ["3", "c", "d"]),
    ]


def test_other_bad_rows(tmp_path):
    read = rows(tmp_path, b"id,title\n1\n2,a,b\n,,\n3,caf\xe9\n4,ok\n")
    assert read == [
        (2, "wrong number of cells: 1, expected 2"),
        (3, "wrong number of cells: 3, expected 2"),
        (5, "not UTF-8: byte 0xe9; save the file as UTF-8 (Excel: CSV UTF-8)"),
        (6, ["4", "ok"]),
    ]


def test_qrels(tmp_path):
    (tmp_path / "q").write_text("101 0 D1 3\n\n101\tQ0\tD2\n102 0 D1 -1\n")
    good, bad, other = read_qrels(tmp_path / "q")
    assert good.cells == {"qid": "101", "docid": "D1", "label": "3"}
    assert (bad.line, bad.reason) == (3, "wrong number of cells: 3, expected 4")
    assert (other.line, other.cells["label"]) == (4, "-1")
