"""The page of results: rendered from JSON files that are checked, and as it is committed."""

import json

import pytest

from benchmarks.evidence import tables

TABLE = {
    "schema": 1,
    "title": "Small",
    "commit": "abc1234",
    "date": "2026-01-02",
    "hardware": "2 cores",
    "seeds": [0, 1],
    "command": "python train.py",
    "source": "a run",
    "note": "Limits: two seeds.",
    "columns": ["pairs", "F1", "lead"],
    "rows": [
        {"name": "GRPO", "pairs": 2048, "F1": {"mean": 0.5, "sd": 0.01}, "lead": None},
        {
            "name": "SRPO",
            "pairs": 12,
            "F1": 0.75,
            "lead": {"mean": 0.25, "low": -0.125, "high": 0.5},
        },
        {"name": "a|b", "pairs": "-", "F1": 0.9, "lead": {"mean": -0.1, "values": [-0.2, 0.0]}},
    ],
}


def write(folder, **files):
    (folder / "preface.md").write_text("# Results\n", encoding="utf-8")
    for name, table in files.items():
        (folder / f"{name}.json").write_text(json.dumps(table), encoding="utf-8")
    return folder


def test_a_small_table(tmp_path):
    table = TABLE | {"digits": {"F1": 2}}
    assert tables.render(write(tmp_path, small=table)) == (
        "# Results\n\n## Small\n"
        "Limits: two seeds. *Measured:* `python train.py`; `abc1234`; 2026-01-02; 2 cores;"
        " seeds 0, 1. *Source:* a run.\n\n"
        "|  | pairs | F1 | lead |\n"
        "| --- | --- | --- | --- |\n"
        "| GRPO | 2,048 | 0.50 ± 0.01 |  |\n"
        "| SRPO | 12 | 0.75 | +0.250 [-0.125, +0.500] |\n"
        "| a\\|b | - | 0.90 | -0.100 (-0.200, +0.000) |\n"
    )


def test_order_then_file_name(tmp_path):
    files = {name: TABLE | {"title": name} for name in ("b", "a", "c")}
    files["c"]["order"] = 1
    page = tables.render(write(tmp_path, **files))
    assert [line for line in page.splitlines() if line.startswith("##")] == ["## c", "## a", "## b"]


def test_an_unknown_commit_is_said(tmp_path):
    page = tables.render(write(tmp_path, small=TABLE | {"commit": None, "seeds": [3]}))
    assert "; commit unknown; 2026-01-02; 2 cores; seed 3." in page


def row(**values):
    return {"rows": [{"name": "x", "pairs": 1, "F1": 0.5, "lead": 0.5} | values]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema: expected 1, got 2"),
        ({"schema": True}, "schema: unexpected True"),
        ({"date": None}, "date: unexpected None"),
        ({"author": "x"}, "unknown keys: author"),
        ({"seeds": []}, "seeds: expected a list of integers"),
        ({"seeds": ["0"]}, "seeds: expected a list of integers"),
        ({"columns": ["F1", "F1"]}, "columns: expected distinct names"),
        ({"columns": [["F1"]]}, "columns: expected distinct names"),
        ({"digits": {"recall": 2}}, "digits: expected a column and a count, got 'recall'"),
        (row(recall=1), r"rows\[0\]: expected 'name' and the columns"),
        (row(name=1), r"rows\[0\] 1, 'name': unexpected 1"),
        (row(F1=True), r"rows\[0\] 'x', 'F1': unexpected True"),
        (row(F1=float("nan")), r"rows\[0\] 'x', 'F1': unexpected nan"),
        (row(F1={"mean": 0.5}), r"rows\[0\] 'x', 'F1': unexpected"),
        (row(F1={"mean": 0.5, "sd": "0.1"}), r"rows\[0\] 'x', 'F1': unexpected"),
        (row(F1={"mean": 0.5, "values": []}), r"rows\[0\] 'x', 'F1': unexpected"),
        ({"rows": [{"name": "x"}]}, r"rows\[0\]: expected 'name' and the columns"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"^bad\.json: {message}"):
        tables.render(write(tmp_path, bad=TABLE | change))


def test_missing_keys_and_broken_json_are_refused(tmp_path):
    table = {key: value for key, value in TABLE.items() if key not in ("command", "note")}
    with pytest.raises(ValueError, match=r"^bad\.json: missing keys: command, note"):
        tables.render(write(tmp_path, bad=table))
    (tmp_path / "bad.json").write_text("[1, 2", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^bad\.json: "):
        tables.render(tmp_path)


def test_the_committed_page_is_the_rendered_one():
    page = (tables.DOCS / "results.md").read_text(encoding="utf-8")
    assert page == tables.render(tables.DOCS / "results")
