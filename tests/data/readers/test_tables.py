"""A user's tables: judgments with their products, columns, raters, rationales, splits."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import SHARED_DATA

from she_jax.data.dataset import open_split, prepare
from she_jax.data.readers.columns import columns_there
from she_jax.data.readers.judgments import TableConfig
from she_jax.data.readers.tables import Tables
from she_jax.types import BadRow, Example, UserError

ROW = {"query": "red mug", "product": {"title": "Mug, red"}, "label": 4}
CHAIN = "query: mug\nproduct: mug\ncategory: match\nattributes: red => met\nlabel: 4"


def builder(tmp_path, text, name="pairs.csv", **options) -> Tables:
    """The reader of a file with this text, or with these rows of JSON."""
    path = tmp_path / name
    if not isinstance(text, str):
        path, text = tmp_path / "pairs.jsonl", "\n".join(map(json.dumps, text))
    path.write_text(text, encoding="utf-8")
    labels = options.pop("labels", "1-4")
    chain = {"labels": labels} | options.pop("chain", {})
    return Tables(
        data_dir=tmp_path / "data", config=TableConfig(path=str(path), chain=chain, **options)
    )


def read(tmp_path, text, **options) -> list:
    return list(builder(tmp_path, text, **options).rows())


def reasons(rows) -> list[tuple[int, str]]:
    return [(row.line, row.reason) for row in rows if isinstance(row, BadRow)]


def test_a_row_of_json_with_all_fields(tmp_path):
    fields = {"price": 9.5, "new": True, "tags": ["a", 1], "brand": None}
    more = {
        "product": {"title": "Mug"} | fields,
        "label": 3.0,
        "steps": {"category": "match"},
        "kind": "plain",
        "uid": 17,
        "rationale": "label: 3",
        "split": "validation",
        "comment": "for the raters",
    }
    (row,) = read(tmp_path, [ROW | more])
    assert (row.split, row.line) == ("validation", 1)
    assert row.example == Example(
        uid="17",
        query="red mug",
        product={"title": "Mug", "price": "9.5", "new": "true", "tags": "a, 1"},
        label=3,
        steps={"category": "match"},
        kind="plain",
        annotations=("category",),
        rationale="label: 3",
    )


def test_products_in_a_table_of_their_own(tmp_path):
    """All their columns are fields; of the judgments only those that are named."""
    (tmp_path / "products.tsv").write_text(
        "docid\ttitle\tsupplier\tsize\n007\tMug\tNA\t\n7\tPan\tAcme\t3\n7\tPot\tOther\t4\n\tLid\tB\t1\n"
    )
    judgments = "query,docid,rating,explanation,grade_a,grade_b\n" + (
        "mug,7,3,because,3,1\nmug,007,,it is,1,0\nmug,0007,2,no,,\nmug,,1,,,\n"
    )
    reader = builder(
        tmp_path,
        judgments,
        products=str(tmp_path / "products.tsv"),
        columns="brand=supplier, raters=grade_a+grade_b",
        labels="0-3",
    )
    orphan, first, second, *bad = reader.rows()
    assert reasons([orphan]) == [(5, "product without docid")]
    assert first.example.product == {"title": "Pan", "brand": "Acme", "size": "3"}
    assert second.example.product == {"title": "Mug", "brand": "NA"}
    assert (first.example.label, first.example.raters) == (3, (3, 1))
    assert (second.example.label, second.example.raters) == (0, (1, 0))  # the lower median
    assert (first.example.uid, second.example.uid) == ("mug / 7", "mug / 007")
    assert reasons(bad) == [(4, "no such product: '0007'"), (5, "empty docid")]
    assert reader.notes == [
        f"{tmp_path / 'pairs.csv'}: columns that are not read: explanation (a field of the "
        "product is named with --config.data.columns=FIELD=COLUMN, raters with "
        "raters=COLUMN+COLUMN)",
        f"{tmp_path / 'products.tsv'}: 1 rows repeat a docid; the first counts",
    ]


def test_one_table_with_named_columns(tmp_path):
    text = "q;sku;name;colour;stars;note\nmug;00123;Red mug;NA;4;x\n"
    columns = "query=q,docid=sku,title=name,color=colour,label=stars"
    (row,) = read(tmp_path, text, columns=columns)
    assert row.example == Example(
        uid="mug / 00123", query="mug", product={"title": "Red mug", "color": "NA"}, label=4
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            "label=ratng",
            r"no column 'ratng' for label; the nearest is 'rating'; it has query, docid",
        ),
        ("title=name", r"products\.csv has no column 'name' for title"),
        ("docid=sku", r"no column 'sku' for docid"),
        ("label", "'label': expected field=column"),
        ("label=rating,label=docid", "expected field=column for each field once"),
    ],
)
def test_columns_that_are_not_there_are_named(tmp_path, columns, message):
    (tmp_path / "products.csv").write_text("docid,title\n1,Mug\n")
    with pytest.raises(UserError, match=message):
        read(
            tmp_path,
            "query,docid,rating\nmug,1,4\n",
            products=str(tmp_path / "products.csv"),
            columns=columns,
        )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("", "no column query, docid, label, only q, sku, stars; .*products.csv has no column "
         r"docid, title, only sku, name. .*query=COLUMN,docid=COLUMN\+COLUMN,label=COLUMN,title=C"),
        ("label=stars", "no column query, docid, .*columns=label=stars,query=COLUMN,docid=COLUMN"),
        ("query=q,docid=sku,title=name,labell=stars", "no column label"),
        ("stars=label,query=q,docid=sku", "is label=stars meant?"),
    ],
)  # fmt: skip
def test_all_columns_that_are_needed_are_named_at_once(tmp_path, columns, message):
    products = tmp_path / "products.csv"
    products.write_text("sku,name\n1,Mug\n")
    with pytest.raises(UserError, match=message):
        read(tmp_path, "q,sku,stars\nmug,1,4\n", products=str(products), columns=columns)


def test_columns_of_another_table_are_taken_where_they_are_there():
    text = "query=q,docid=a+sku,label=stars,raters=x+y,title=name"
    assert columns_there(text, ["q", "sku", "x"], ["sku", "name"]) == "query=q,docid=sku,title=name"
    assert columns_there(text, ["query", "title", "q"]) == "query=q"
    assert columns_there(text, ["query", "product.name"]) == "title=name"


def test_the_docid_may_have_another_name_in_each_table(tmp_path):
    (tmp_path / "products.jsonl").write_text('{"id": 1, "title": "Mug", "details": {"a": "b"}}')
    options = {"products": str(tmp_path / "products.jsonl"), "columns": "docid=doc+id"}
    (row,) = read(tmp_path, "query,doc,label\nmug,1,4\n", **options)
    assert row.example.product == {"title": "Mug", "details.a": "b"}


def test_qrels_with_queries_and_documents(tmp_path):
    (tmp_path / "docs.jsonl").write_text('{"docid": "D1", "title": "Mug"}')
    (tmp_path / "queries.tsv").write_text("101\tred mug\n102\n")
    (tmp_path / "named.csv").write_text("query,qid\nred mug,101\n")
    for queries, bad_queries in (("queries.tsv", 1), ("named.csv", 0)):
        rows = read(
            tmp_path,
            "101 0 D1 3\n101 0 D2 0\n103 0 D1 1\n101 0 D1 9\n",
            name="qrels",
            qrels=True,
            labels="0-3",
            queries=str(tmp_path / queries),
            products=str(tmp_path / "docs.jsonl"),
        )
        good, *bad = rows[bad_queries:]
        assert len(reasons(rows[:bad_queries])) == bad_queries
        assert (good.example.query, good.example.label) == ("red mug", 3)
        assert reasons(bad) == [
            (2, "no such product: 'D2'"),
            (3, "no such query: '103'"),
            (4, "unknown label: '9', expected 0, 1, 2, 3"),
        ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label": 0}, "unknown label: '0', expected 1, 2, 3, 4"),
        ({"label": 2.5}, "unknown label: '2.5'"),
        ({"label": True}, "unknown label: 'true'"),
        ({"raters": [4, 5]}, "unknown label: '5'"),
        ({"label": float("nan")}, "no label: training needs one, or a rationale with the steps"),
        ({"steps": ["category"]}, "wrong steps: 'category', expected names with texts"),
        ({"steps": {"colour": "met"}}, "wrong steps: no step 'colour', expected some of"),
        ({"steps": {"category": "Match"}}, "wrong steps: category 'Match', expected one of"),
        ({"steps": {"check_7": "good"}}, "wrong steps: check_7 'good', expected one of"),
        ({"steps": {"label": "4"}}, "wrong steps: 'label' is a key of the row"),
        ({"split": "my split"}, "wrong split: 'my split'"),
    ],
)
def test_rows_that_cannot_be_used_are_set_aside(tmp_path, changes, reason):
    good, bad = read(tmp_path, [ROW | {"raters": "4"}, ROW | changes])
    assert (good.example.query, good.example.raters) == ("red mug", (4,))
    assert (bad.file, bad.line) == (str(tmp_path / "pairs.jsonl"), 2)
    assert bad.reason.startswith(reason)


def test_rationales_are_counted(tmp_path):
    rows = [
        ROW | {"rationale": CHAIN},
        ROW | {"rationale": "It is\nred."},
        ROW | {"rationale": CHAIN, "label": 2},
        {k: v for k, v in ROW.items() if k != "label"} | {"rationale": CHAIN},
    ]
    reader = builder(tmp_path, rows)
    labels = [row.example.label for row in reader.rows()]
    assert labels == [4, 4, 2, None]
    path = tmp_path / "pairs.jsonl"
    assert reader.notes == [
        f"{path}: 1 of 4 rationales are no chain of the steps query, product, category, "
        f"attributes, label, such as {path}:2: 'It is red.'",
        f"{path}: 1 of 4 rationales end in another label than their pair's",
    ]
    other = builder(tmp_path, rows[3:], chain={"label_first": True})
    assert reasons(other.rows())[0][1].startswith("no label: training needs one")


def test_an_evaluation_without_labels_says_so_and_which_columns_it_saw(tmp_path):
    reader = builder(tmp_path, "query,title,relevance\nmug,Mug,2\nmug,Mug,3\n", evaluation=True)
    rows = list(reader.rows())
    assert [(row.split, row.example.uid) for row in rows] == [
        ("test", "line-2"),
        ("test", "line-3"),
    ]
    assert "no row has a label, so nothing is measured; is it one of relevance?" in reader.notes[1]


def test_rows_of_an_array_on_one_line_have_uids_of_their_own(tmp_path):
    rows = read(tmp_path, json.dumps([ROW, ROW, ROW]), name="pairs.json")
    assert [row.example.uid for row in rows] == ["line-1", "line-1-2", "line-1-3"]


@pytest.mark.parametrize("queries", [3, 5, 40, 400])
def test_no_split_is_empty_and_none_shares_a_query(tmp_path, queries):
    lines = [f"query {n // 2},Mug,{n},{1 + n % 4}" for n in range(2 * queries)]
    rows = read(tmp_path, "\n".join(["query,title,docid,label", *lines]))
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row.split, set()).add(row.example.query)
    assert splits.keys() == {"train", "validation", "test"}
    assert sum(map(len, splits.values())) == queries
    if queries == 400:
        assert {len(splits["validation"]) > 20, len(splits["test"]) > 50} == {True}


def test_a_column_split_comes_before_the_shares(tmp_path):
    lines = [f"q{n},Mug,4,{('Train', 'test', '')[n % 3]}" for n in range(60)]
    rows = read(tmp_path, "\n".join(["query,title,label,split", *lines]), test_share=0.0)
    splits = Counter((row.line % 3, row.split) for row in rows)
    assert splits[2, "train"] == splits[0, "test"] == 20
    assert {split for rest, split in splits if rest == 1} == {"train", "validation"}


def test_raters_and_clean_texts_come_back_from_disk(tmp_path):
    row = {"query": "ふちなしメガネ", "label": None, "raters": ["0.5", "1", "0"]}
    product = {"title": "<b>Crayons&copybooks</b> &amp; 12&quot;", "copy": "x\ud800 y"}
    dataset = prepare(
        builder(tmp_path, [row | {"product": product}], evaluation=True, labels="0,0.5,1")
    )
    (example,) = open_split(dataset.path, "test")
    assert (example.label, example.raters) == (0.5, (0.5, 1, 0))
    assert example.product == {"title": 'Crayons&copybooks & 12"', "copy": "x y"}
    assert (dataset.labels, dataset.notes) == ("0,0.5,1", [])


def test_chorus_is_read_with_its_raters(tmp_path):
    folder = SHARED_DATA / "chorus_excerpt"
    if not folder.is_dir():
        pytest.skip(f"the Chorus excerpt is not at {folder}")
    config = TableConfig(
        path=str(folder / "judgments.csv"),
        products=str(folder / "products.csv"),
        columns="label=rating,docid=docid,title=title,brand=supplier,raters=rater_1+rater_2+rater_3",
        chain={"labels": "0-3"},
    )
    rows = list(Tables(data_dir=tmp_path, config=config).rows())
    assert reasons(rows) == []
    assert Counter(row.example.label for row in rows) == {0: 1_054, 1: 177, 2: 37, 3: 575}
    assert sum(len(row.example.raters) == 3 for row in rows) == 1_556
    assert len({row.example.uid for row in rows}) == 1_843
    assert set(rows[0].example.product) >= {"title", "brand", "price_cents", "attributes"}


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
LABEL = st.sampled_from(["0", "3", "2.0", "", "x", "NA", "1e0", "0.5"])
PAIRS = st.lists(st.tuples(TEXT, TEXT, LABEL), min_size=1, max_size=6)
FORMS = ("csv", "semicolon", "tsv", "jsonl", "array", "parquet", "qrels")


def write_pairs(tmp_path, form: str, pairs, damage: bytes, place: int) -> dict:
    """Writes pairs in a form, with some bytes in the middle; the options that read them."""
    columns = [dict(zip(("query", "title", "label"), pair, strict=True)) for pair in pairs]
    suffix = {"semicolon": "csv", "array": "json"}.get(form, form)
    path = tmp_path / f"pairs.{suffix}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(columns), path)
        raw = path.read_bytes()
    elif form in ("jsonl", "array"):
        rows = [json.dumps(row) for row in columns]
        raw = ("\n".join(rows) if form == "jsonl" else f"[{','.join(rows)}]").encode()
    elif form == "qrels":
        raw = "\n".join(f"{query} 0 D {label}" for query, _, label in pairs).encode()
    else:
        delimiter = {"csv": ",", "semicolon": ";", "tsv": "\t"}[form]
        cells = [("query", "title", "label"), *pairs]
        quoted = [[f'"{c.replace(chr(34), chr(34) * 2)}"' for c in row] for row in cells]
        raw = "\n".join(delimiter.join(row) for row in quoted).encode()
    place %= len(raw) + 1
    path.write_bytes(raw[:place] + damage + raw[place:])
    options = {"path": str(path), "chain": {"labels": "0-3"}, "max_bad_share": 1.0}
    if form == "qrels":
        (tmp_path / "queries.tsv").write_text("a\tred mug\n")
        (tmp_path / "docs.csv").write_text("docid,title\nD,Mug\n")
        files = {"queries": str(tmp_path / "queries.tsv"), "products": str(tmp_path / "docs.csv")}
        options |= files | {"qrels": True}
    return options


def check_any_table(tmp_path, form, pairs, damage, place):
    """No traceback; every row is used or set aside with its place; undamaged ones all come."""
    options = write_pairs(tmp_path, form, pairs, damage, place)
    try:
        rows = list(Tables(data_dir=tmp_path, config=TableConfig(**options)).rows())
    except UserError:
        assert damage or form == "qrels"
        return
    assert all(row.file and row.line >= 1 for row in rows)
    if not damage and form != "qrels":
        blank = sum(not any(map(str.strip, pair)) for pair in pairs)
        skipped = blank if form in ("csv", "semicolon", "tsv") else 0
        assert len(rows) == len(pairs) - skipped


FUZZ = given(
    st.sampled_from(FORMS),
    PAIRS,
    st.one_of(
        st.just(b""), st.sampled_from([b'"', b"\n", b"\0", b"\xff", b",", b"{"]), st.binary()
    ),
    st.integers(0, 2_000),
)


@FUZZ
@settings(max_examples=200)
def test_any_table_is_read_or_refused_in_words(tmp_path_factory, form, pairs, damage, place):
    check_any_table(tmp_path_factory.mktemp("t"), form, pairs, damage, place)


@pytest.mark.slow
@FUZZ
@settings(max_examples=10_000)
def test_ten_thousand_tables(tmp_path_factory, form, pairs, damage, place):
    check_any_table(tmp_path_factory.mktemp("t"), form, pairs, damage, place)
