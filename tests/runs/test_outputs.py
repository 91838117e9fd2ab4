"""What a user's table gets back: a row for every row, and judgment lists that are read again."""

import csv
import json

import pytest

from she_jax.cot import CotSchema
from she_jax.data.dataset import open_split, prepare
from she_jax.data.sources import DataConfig, make_builder
from she_jax.runs.outputs import grades, open_judged_table, write_outputs
from she_jax.runs.systems import check_run, read_systems
from she_jax.types import UserError

CHAIN = CotSchema.build(labels="0-3").options
SCHEMA = CotSchema.build(**CHAIN)
PRODUCTS = "sku,title\nd 0,Mug zero\nd1,Mug one\n,nothing\nd2,Mug two\nd3,Mug three\n"
JUDGMENTS = """qid,query,sku,label,system,rank
q1,red mug,d1,3,a,1
q1,red mug,d9,1,a,2
q1,red mug,d2,,a,3
q1,red mug,d1,0,b,2
broken
q1,red mug,d2,,b,1
q2,"blue, mug",d3,7,a,1
q2,"blue, mug",d 0,1,b,1
,no id,d1,2,,
"""


def prepared(tmp_path, name="table", path="pairs.csv", columns="docid=sku"):
    """The options of a table, and the pairs that were prepared of it."""
    data = DataConfig(
        name=name,
        folder=tmp_path / "data",
        path=str(tmp_path / path),
        products=str(tmp_path / "products.csv"),
        queries=str(tmp_path / "queries.tsv") if name == "trec" else "",
        columns=columns,
        max_bad_share=1.0,
        chain=CHAIN,
        evaluation=True,
    )
    return data, prepare(make_builder(data))


def table_of(tmp_path, limit=0, **options):
    """A judged table, its options and its pairs; the n-th pair has the label n % 4."""
    data, dataset = prepared(tmp_path, **options)
    examples = open_split(dataset.path, "test")
    rows = range(min(limit or len(examples), len(examples)))
    lines = [line(examples[n].uid, n % 4) for n in rows]
    table = open_judged_table(data, dataset, examples, rows, lines, SCHEMA)
    assert table is not None
    return table, data, examples


def line(uid, label):
    given = {"confidence": 0.5, "expected": 1.5, "review": True, "probabilities": None}
    steps = [{"name": "label", "text": "", "verdict": str(label)}]
    return {"uid": uid, "label": label, **given, "steps": steps, "text": None}


@pytest.fixture
def judgments(tmp_path):
    (tmp_path / "products.csv").write_text(PRODUCTS)
    (tmp_path / "pairs.csv").write_text(JUDGMENTS)
    return tmp_path


def test_every_row_comes_back_in_its_place(judgments):
    table, data, _ = table_of(judgments)
    write_outputs(table, data, judgments)
    with (judgments / "labeled" / "pairs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    texts = JUDGMENTS.splitlines()
    written = (judgments / "labeled" / "pairs.csv").read_text().splitlines()
    assert len(written) == len(texts)
    assert all(out.startswith(text) for out, text in zip(written, texts, strict=True))
    assert [(row["label"], row["she_label"]) for row in rows] == [
        ("3", "0"), ("1", ""), ("", "1"), ("0", "0"), ("", ""), ("", "1"), ("7", "2"),
        ("1", "3"), ("2", "0"),
    ]  # fmt: skip
    errors = [row["error"].partition(":")[0] for row in rows]
    assert errors == [
        "", "no such product", "", "duplicate uid", "wrong number of cells", "duplicate uid",
        "", "", "",
    ]  # fmt: skip
    assert (rows[0]["review"], rows[0]["chain"]) == ("true", "label: 0")


def test_pairs_that_were_not_judged_are_said(judgments):
    table, _, _ = table_of(judgments, limit=1)
    table.write_labeled(judgments / "out")
    with (judgments / "out" / "pairs.csv").open(newline="") as file:
        errors = [row["error"] for row in csv.DictReader(file)]
    assert errors.count("not judged: data.eval_pairs") == 4
    assert errors[0] == ""


@pytest.mark.parametrize(
    ("name", "path", "columns"),
    [
        ("table", "quepid.csv", "docid=docid+sku"),
        ("table", "opensearch.json", "docid=docid+sku"),
        ("trec", "qrels.txt", "docid=docid+sku"),
    ],
)
def test_judgment_lists_are_read_again_to_the_same_labels(judgments, name, path, columns):
    table, data, examples = table_of(judgments)
    write_outputs(table, data, judgments)
    for file in (judgments / "judgments").iterdir():
        file.rename(judgments / file.name)
    _, _, again = table_of(judgments, name=name, path=path, columns=columns)
    expected = {examples[n].uid: n % 4 for n in range(len(examples))}
    if name == "trec":  # a blank in an id, and no qid
        expected.pop("blue, mug / d 0")
        expected.pop("no id / d1")
    assert {again[n].uid: again[n].label for n in range(len(again))} == expected


def test_queries_without_ids_are_numbered(judgments):
    (judgments / "pairs.csv").write_text("query,sku,title\nb,d1,B\na,d1,A\nb,d2,B\n")
    table, data, _ = table_of(judgments)
    write_outputs(table, data, judgments)
    lists = judgments / "judgments"
    assert (lists / "qrels.txt").read_text() == "1 0 d1 0\n2 0 d1 1\n1 0 d2 2\n"
    assert (lists / "queries.tsv").read_text() == "1\tb\n2\ta\n"
    assert json.loads((lists / "opensearch.json").read_text())["judgmentRatings"][0] == {
        "query": "b",
        "ratings": [{"docId": "d1", "rating": "0"}, {"docId": "d2", "rating": "2"}],
    }


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("0-3", {0: 0, 1: 1, 2: 2, 3: 3}),
        ("1-4", {1: 1, 2: 2, 3: 3, 4: 4}),
        ("5-1", {5: 0, 4: 1, 3: 2, 2: 3, 1: 4}),
        ("poor,fair,good", {"poor": 0, "fair": 1, "good": 2}),
    ],
)
def test_a_better_label_has_a_larger_grade_in_every_list(labels, expected):
    assert grades(CotSchema.build(labels=labels).labels) == expected


def test_systems_are_those_of_the_table_or_of_a_run_file(judgments, capsys):
    table, data, _ = table_of(judgments)
    assert not table._judgments.unread()
    expected = {"a": {0: 1, 1: 3, 2: 1}, "b": {0: 2, 1: 1, 3: 1}}
    assert read_systems(table, "") == expected
    renamed = JUDGMENTS.replace("system,rank", "engine,pos")
    (judgments / "pairs.csv").write_text(renamed)
    mapped, *_, examples = table_of(judgments, columns="docid=sku,system=engine,rank=pos")
    assert read_systems(mapped, "") == expected
    assert not {"system", "rank"} & examples[0].product.keys()
    (judgments / "pairs.csv").write_text(JUDGMENTS)
    run = judgments / "run.txt"
    run.write_text("q1 Q0 d1 9 0.5 x\nq1 Q0 d2 1 0.7 x\n\nq1 Q0 d7 2 0.1 x\nq2 Q0 d3 1 2e1 y\n")
    check_run(str(run), data)
    assert read_systems(table, str(run)) == {"x": {0: -0.5, 1: -0.7}, "y": {2: -20}}
    run.write_text("q1 Q0 d1 9 high x\nq1 d1\nq1 Q0 d2 1 0.7 x\n")
    assert read_systems(table, str(run)) == {"x": {1: -0.7}}
    said = capsys.readouterr().out
    assert "2 lines are left out, the first: " in said
    assert "run.txt:1: 'q1 Q0 d1 9 high x'" in said
    (judgments / "pairs.csv").write_text("query,sku,title\nb,d1,B\n")
    with pytest.raises(UserError, match="have no column qid"):
        check_run(str(run), data)


def test_a_table_that_has_changed_is_left_alone(judgments, capsys):
    data, dataset = prepared(judgments)
    examples = open_split(dataset.path, "test")
    for change in (lambda path: path.write_text(f"{JUDGMENTS}\n"), lambda path: path.unlink()):
        change(judgments / "pairs.csv")
        assert open_judged_table(data, dataset, examples, (), (), SCHEMA) is None
        assert "is gone or has changed" in capsys.readouterr().out
