"""The ESCI reader: small parquet files, and the real excerpt if present."""

import html
import re
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recipes import SHARED_DATA

from she_jax.data.dataset import open_split, prepare
from she_jax.data.intake import normalize_text
from she_jax.data.readers.esci import Esci, EsciConfig
from she_jax.types import BadRow, Example

EXAMPLES = "shopping_queries_dataset_examples.parquet"
PRODUCTS = "shopping_queries_dataset_products.parquet"
EXCERPT = SHARED_DATA / "esci_excerpt"


def pair(i: int, **changes) -> dict:
    """A row of the examples file."""
    return {
        "example_id": i,
        "query": f"query {i}",
        "query_id": i,
        "product_id": "B1",
        "product_locale": "us",
        "esci_label": "E",
        "small_version": 1,
        "large_version": 1,
        "split": "train",
    } | changes


def product(product_id: str, locale: str = "us", **changes) -> dict:
    """A row of the products file."""
    return {
        "product_id": product_id,
        "product_title": f"Title {product_id} {locale}",
        "product_description": None,
        "product_bullet_point": None,
        "product_brand": "Acme",
        "product_color": None,
        "product_locale": locale,
    } | changes


def write(folder, pairs, products, row_group_size=2):
    for name, rows in ((EXAMPLES, pairs), (PRODUCTS, products)):
        pq.write_table(pa.Table.from_pylist(rows), folder / name, row_group_size=row_group_size)


def read(folder, **options) -> list:
    return list(Esci(data_dir=folder, config=EsciConfig(path=str(folder), **options)).rows())


def test_pairs_are_joined_on_product_and_locale(tmp_path):
    pairs = [
        pair(0, query="silla", product_locale="es", split="test"),
        pair(1, product_id="B2", esci_label="S"),
        pair(2, esci_label="C"),
        pair(3, esci_label="I"),
    ]
    write(tmp_path, pairs, [product("B2"), product("B1", "es"), product("B1")])
    rows = {row.example.uid: row for row in read(tmp_path, validation_share=0.0)}
    assert rows["0"].example == Example(
        uid="0",
        query="silla",
        product={
            "title": "Title B1 es",
            "brand": "Acme",
            "colour": "",
            "bullets": "",
            "description": "",
        },
        label=4,
        steps={"category": "match", "attributes": "met"},
        kind="es",
        annotations=("category", "attributes"),
    )
    assert (rows["0"].split, rows["0"].line) == ("test", 1)
    assert [rows[i].example.product["title"] for i in "123"] == [
        "Title B2 us",
        "Title B1 us",
        "Title B1 us",
    ]
    assert [rows[i].example.label for i in "123"] == [3, 2, 1]
    assert [rows[i].example.steps for i in "123"] == [
        {"category": "match"},
        {"category": "mismatch"},
        {"category": "mismatch"},
    ]


def test_join_agrees_with_a_plain_lookup_across_batches(tmp_path, monkeypatch):
    """More products than a batch, in another order than the pairs, and products without a pair."""
    monkeypatch.setattr("she_jax.data.readers.esci._BATCH", 7)
    products = [product(f"B{i}", "us" if i % 3 else "jp") for i in range(100)]
    pairs = [
        pair(i, product_id=(p := products[(i * 37) % 50])["product_id"])
        | {"product_locale": p["product_locale"]}
        for i in range(160)
    ]
    write(tmp_path, pairs, products, row_group_size=33)
    rows = read(tmp_path)
    titles = {row.example.uid: row.example.product["title"] for row in rows}
    assert titles == {
        str(p["example_id"]): f"Title {p['product_id']} {p['product_locale']}" for p in pairs
    }
    assert len(rows) == 160


def test_rows_that_cannot_be_used_are_set_aside(tmp_path):
    pairs = [
        pair(0, product_id="nope"),
        pair(1, esci_label="X"),
        pair(2, esci_label=None),
        pair(3, split="dev"),
        pair(4, product_id=None),
        pair(5),
    ]
    write(tmp_path, pairs, [product("B1"), product(None)])
    *_, good = rows = sorted(read(tmp_path), key=lambda row: row.line)
    assert [(row.line, row.reason) for row in rows if isinstance(row, BadRow)] == [
        (1, "no such product"),
        (2, "unknown label: 'X', expected E, S, C or I"),
        (3, "unknown label: None, expected E, S, C or I"),
        (4, "unknown split: 'dev', expected train or test"),
        (5, "no such product"),
    ]
    assert good.example.uid == "5"
    dataset = prepare(
        Esci(data_dir=tmp_path, config=EsciConfig(path=str(tmp_path), max_bad_share=0.9))
    )
    assert dataset.bad_rows == {"unknown label": 2, "unknown split": 1, "no such product": 2}


def test_empty_query_and_missing_title_are_bad_and_a_missing_id_too(tmp_path):
    pairs = [pair(0, query=None), pair(1, product_id="B2"), pair(2) | {"example_id": None}, pair(3)]
    write(tmp_path, pairs, [product("B1"), product("B2", product_title=None)])
    config = EsciConfig(path=str(tmp_path), max_bad_share=0.9)
    dataset = prepare(Esci(data_dir=tmp_path, config=config))
    assert dataset.bad_rows == {"empty query": 1, "missing title": 1, "empty uid": 1}


@pytest.mark.parametrize("rewritten", ["category", "view", "double"])
def test_a_file_rewritten_with_other_types_is_read_alike(tmp_path, rewritten):
    pairs = [pair(i, esci_label="ESCI"[i % 4], small_version=i % 2) for i in range(8)]
    write(tmp_path, pairs, [product("B1")])
    expected = read(tmp_path, subset="small", locales=("us",))
    for name in (EXAMPLES, PRODUCTS):
        table = pq.read_table(tmp_path / name)
        for n, field in enumerate(table.schema):
            column = table.column(n)
            if rewritten == "category" and field.type == pa.string():
                column = column.dictionary_encode()
            elif rewritten == "view" and field.type == pa.string():
                column = column.cast(pa.string_view())
            elif rewritten == "double" and field.type == pa.int64():
                column = column.cast(pa.float64())
            table = table.set_column(n, field.name, column)
        pq.write_table(table, tmp_path / name)
    assert read(tmp_path, subset="small", locales=("us",)) == expected
    assert len(expected) == 4


def test_the_letters_become_part_of_the_set_that_is_asked_for(tmp_path):
    write(
        tmp_path, [pair(i, esci_label=letter) for i, letter in enumerate("ESCI")], [product("B1")]
    )
    config = EsciConfig(path=str(tmp_path), labels="esci", validation_share=0.0)
    dataset = prepare(Esci(data_dir=tmp_path, config=config))
    assert {e.label for e in open_split(dataset.path, "train")} == set("ESCI")


def test_locales_subsets_and_splits(tmp_path):
    pairs = [
        pair(
            i,
            query=f"query {i // 2}",
            product_locale=("us", "jp", "es")[i % 3],
            small_version=i % 2,
            split="test" if i >= 300 else "train",
        )
        for i in range(360)
    ]
    write(tmp_path, pairs, [product("B1", locale) for locale in ("us", "jp", "es")])
    rows = read(tmp_path, validation_share=0.25)
    splits = Counter(row.split for row in rows)
    assert splits["test"] == 60
    assert 40 < splits["validation"] < 110
    by_query = {}
    for row in rows:
        by_query.setdefault(row.example.query, set()).add(row.split)
    assert all(len(names) == 1 for names in by_query.values())
    assert {row.example.kind for row in read(tmp_path, locales=("jp", "es"))} == {"jp", "es"}
    small = read(tmp_path, subset="small")
    assert sorted(int(row.example.uid) for row in small) == list(range(1, 360, 2))
    assert {row.line for row in small} == set(range(2, 361, 2))


def test_wrong_options_list_the_possible_values(tmp_path):
    write(tmp_path, [pair(0)], [product("B1")])
    with pytest.raises(ValueError, match=r"no rows of locale \['fr'\], only of \['us'\]"):
        read(tmp_path, locales=("fr",))
    with pytest.raises(ValueError, match="subset 'tiny': expected one of"):
        read(tmp_path, subset="tiny")
    with pytest.raises(ValueError, match=r"validation_share=1\.5"):
        read(tmp_path, validation_share=1.5)


def test_missing_files_and_wrong_columns_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{EXAMPLES}.*{PRODUCTS}"):
        read(tmp_path)
    wrong = pair(0, esci_label=4)
    del wrong["query_id"]
    write(tmp_path, [wrong], [product("B1")])
    with pytest.raises(ValueError, match=re.escape(EXAMPLES)) as caught:
        read(tmp_path)
    assert "wrong columns query_id (missing), esci_label (int64)" in str(caught.value)
    assert "query_id (integer)" in str(caught.value)
    assert "found example_id (int64), query (string)" in str(caught.value)
    other = {k: v for k, v in product("B1").items() if k != "product_title"}
    write(tmp_path, [pair(0)], [other])
    with pytest.raises(ValueError, match=f"{PRODUCTS}: wrong columns product_title"):
        read(tmp_path)


@pytest.mark.parametrize("name", [EXAMPLES, PRODUCTS])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_truncated_parquet_names_the_file(tmp_path, name, share):
    products = [product(f"B{i}") for i in range(50)]
    write(tmp_path, [pair(i, product_id=f"B{i}") for i in range(50)], products)
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(ValueError, match=f"{name} cannot be read as parquet .*cut short"):
        prepare(Esci(data_dir=tmp_path, config=EsciConfig(path=str(tmp_path))))
    assert not list(tmp_path.rglob("made.json"))


def test_damage_in_the_middle_names_the_file(tmp_path):
    products = [product(f"B{i}", product_description=f"{i} " * 500) for i in range(400)]
    pairs = [pair(i, product_id=f"B{i}") for i in range(400)]
    write(tmp_path, pairs, products, row_group_size=100)
    raw = bytearray((tmp_path / PRODUCTS).read_bytes())
    where = len(raw) // 2
    raw[where : where + len(raw) // 8] = b"\xff" * (len(raw) // 8)
    (tmp_path / PRODUCTS).write_bytes(raw)
    with pytest.raises(ValueError, match=f"{PRODUCTS} cannot be read as parquet"):
        read(tmp_path)


@pytest.fixture(scope="module")
def excerpt(tmp_path_factory):
    """The excerpt, prepared, and its raw rows by example id."""
    if not EXCERPT.is_dir():
        pytest.skip(f"the ESCI excerpt is not at {EXCERPT}")
    folder = tmp_path_factory.mktemp("excerpt")
    dataset = prepare(Esci(data_dir=folder, config=EsciConfig(path=str(EXCERPT))))
    pairs = pq.read_table(EXCERPT / EXAMPLES).to_pylist()
    return dataset, {str(row["example_id"]): row for row in pairs}


def test_excerpt_has_its_counts(excerpt):
    dataset, raw = excerpt
    examples = {name: list(open_split(dataset.path, name)) for name in dataset.splits}
    assert dataset.bad_rows == {}
    assert len(examples["test"]) == 744
    assert len(examples["train"]) + len(examples["validation"]) == 2_123
    assert 120 < len(examples["validation"]) < 300
    everything = [e for split in examples.values() for e in split]
    assert Counter(e.label for e in everything) == {4: 1_750, 3: 702, 2: 87, 1: 328}
    assert Counter(e.kind for e in everything) == {"us": 2_169, "jp": 399, "es": 299}
    assert {e.uid for e in everything} == set(raw)
    queries = [{e.query.casefold() for e in examples[name]} for name in ("train", "validation")]
    assert not queries[0] & queries[1]


def test_excerpt_rows_come_back_identical_in_three_languages(excerpt):
    dataset, raw = excerpt
    products = {
        (row["product_id"], row["product_locale"]): row
        for row in pq.read_table(EXCERPT / PRODUCTS).to_pylist()
    }
    japanese = 0
    for name in dataset.splits:
        for example in open_split(dataset.path, name):
            row = raw[example.uid]
            source = products[row["product_id"], row["product_locale"]]
            assert example.query == normalize_text(row["query"])
            assert example.product["title"] == normalize_text(_entities(source["product_title"]))
            assert example.product.get("brand", "") == normalize_text(
                _entities(source["product_brand"] or "")
            )
            assert example.product.get("colour", "") == normalize_text(
                _entities(source["product_color"] or "")
            )
            kana = re.findall("[\u3040-\u30ff\u4e00-\u9fff]", source["product_title"])
            assert re.findall("[\u3040-\u30ff\u4e00-\u9fff]", example.product["title"]) == kana
            japanese += bool(kana)
    assert japanese > 350


def _entities(text: str) -> str:
    """Entities read where they end in a semicolon or are numbers."""
    return re.sub(r"&(\w+;|#\d+;?)", lambda match: html.unescape(match[0]), text)
