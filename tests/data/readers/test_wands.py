"""The WANDS reader: small files, and the real query file if present."""

import pytest
from recipes import SHARED_DATA

from she_jax.data.dataset import open_split, prepare
from she_jax.data.readers.wands import Wands, WandsConfig
from she_jax.types import BadRow, Example

PRODUCT_HEADER = (
    "product_id\tproduct_name\tproduct_class\tcategory hierarchy\tproduct_description\t"
    "product_features\trating_count\taverage_rating\treview_count\n"
)


def write(folder, labels="", products=None):
    (folder / "query.csv").write_text(
        'query_id\tquery\tquery_class\n0\tsalon chair\tMassage Chairs\n1\t"36"" vanity"\tVanities\n'
    )
    (folder / "product.csv").write_text(
        PRODUCT_HEADER
        + (
            products
            or "7\tSpa chair\tChairs\tSalon / Chairs\tA chair.\tcolor:red|wheels:4\t1\t4.5\t1\n"
            "8\tVanity\t\t\t\t\t\t\t\n"
        )
    )
    (folder / "label.csv").write_text("id\tquery_id\tproduct_id\tlabel\n" + labels)
    return str(folder)


def read(folder) -> list:
    return list(Wands(data_dir=folder, config=WandsConfig(path=str(folder))).rows())


def test_the_three_files_are_joined(tmp_path):
    write(tmp_path, "10\t0\t7\tExact\n11\t0\t8\tIrrelevant\n12\t1\t8\tPartial\n")
    exact, irrelevant, partial = read(tmp_path)
    assert exact.example == Example(
        uid="10",
        query="salon chair",
        product={
            "title": "Spa chair",
            "class": "Chairs",
            "category": "Salon / Chairs",
            "features": "color:red|wheels:4",
            "description": "A chair.",
        },
        label=4,
        steps={"category": "match", "attributes": "met"},
        annotations=("category", "attributes"),
    )
    assert (irrelevant.example.label, irrelevant.example.steps) == (1, {"category": "mismatch"})
    assert (partial.example.label, partial.example.steps) == (3, {"category": "match"})
    assert partial.example.query == '36" vanity'
    assert exact.split == irrelevant.split
    assert (partial.file, partial.line) == (str(tmp_path / "label.csv"), 4)


def test_rows_that_cannot_be_used_are_set_aside(tmp_path):
    write(tmp_path, "1\t5\t7\tExact\n2\t0\t9\tExact\n3\t0\t7\tGood\n4\t0\n\n5\t0\t7\tExact\n")
    *bad, good = read(tmp_path)
    assert [(row.line, row.reason) for row in bad] == [
        (2, "no such query: '5'"),
        (3, "no such product: '9'"),
        (4, "unknown label: 'Good', expected Exact, Partial, Irrelevant"),
        (5, "wrong number of cells: 2, expected 4"),
    ]
    assert good.example.uid == "5"


def test_a_quote_that_was_not_closed_costs_its_product_alone(tmp_path):
    """The product file is written without quoting: readers of CSV take three products for one."""
    rest = "\tc\tc\td\tf\t1\t1\t1\n"
    titles = ("Spa chair", '"round mirror', "Vanity", '"the classic" fan', 'desk, 24"')
    products = "".join(f"{n}\t{title}{rest}" for n, title in enumerate(titles, start=7))
    write(tmp_path, "".join(f"{n}\t0\t{n}\tExact\n" for n in range(7, 12)), products=products)
    product, *rows = read(tmp_path)
    assert (product.file, product.line) == (str(tmp_path / "product.csv"), 3)
    assert product.reason.startswith("a quote was not closed")
    assert rows.pop(1).reason == "no such product: '8'"
    read_titles = [row.example.product["title"] for row in rows]
    assert read_titles == ["Spa chair", "Vanity", "the classic fan", 'desk, 24"']
    assert {row.example.product["description"] for row in rows} == {"d"}


def test_missing_files_and_columns_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"query\.csv.*product\.csv.*label\.csv"):
        read(tmp_path)
    write(tmp_path)
    (tmp_path / "label.csv").write_text("id,query_id,product,label\n1,0,7,Exact\n")
    with pytest.raises(
        ValueError, match=r"label\.csv: no column \['product_id'\].*found \('id', 'q"
    ):
        read(tmp_path)


def test_prepared_set_has_no_query_in_two_splits(tmp_path):
    write(tmp_path)
    ids = range(60)
    (tmp_path / "query.csv").write_text(
        "query_id\tquery\tquery_class\n" + "".join(f"{i}\tchair {i}\tc\n" for i in ids)
    )
    (tmp_path / "label.csv").write_text(
        "id\tquery_id\tproduct_id\tlabel\n"
        + "".join(f"{i}-{p}\t{i}\t{p}\tExact\n" for i in ids for p in (7, 8))
    )
    dataset = prepare(Wands(data_dir=tmp_path, config=WandsConfig(path=str(tmp_path))))
    assert sum(dataset.splits.values()) == 120
    queries = [{e.query for e in open_split(dataset.path, name)} for name in dataset.splits]
    assert len(queries) == 3
    assert sum(map(len, queries)) == len(set.union(*queries)) == 60


def test_the_real_query_file_is_read(tmp_path):
    folder = SHARED_DATA / "wands"
    if not folder.is_dir():
        pytest.skip(f"the WANDS query file is not at {folder}")
    real = (folder / "query.csv").read_text(encoding="utf-8")
    write(tmp_path, "".join(f"{i}\t{i}\t7\tExact\n" for i in range(488)))
    (tmp_path / "query.csv").write_text(real, encoding="utf-8")
    rows = read(tmp_path)
    queries = [row.example.query for row in rows if not isinstance(row, BadRow)]
    assert len(queries) == 480
    assert '48" sliding single track , barn door for laundry' in queries
