"""Which options go with which data set."""

from pathlib import Path

import pytest

from she_jax.data.sources import DataConfig, make_builder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "amazon"}, "data.name='amazon': expected one of"),
        ({"name": "table"}, "needs --config.data.path"),
        (
            {"name": "shopworld", "path": "x.csv"},
            "data.path='x.csv': data.name='shopworld' does not",
        ),
        ({"name": "my:Pairs", "pairs": object, "path": "x"}, "data.path='x'"),
        (
            {"name": "esci", "path": "x", "products": "y"},
            "data.products='y': .*table | jsonl | trec",
        ),
        (
            {"name": "wands", "path": "x", "locales": ("us",)},
            "data.locales=.*it is for data.name=esci",
        ),
        ({"name": "trec", "path": "x", "products": "y"}, "needs --config.data.queries"),
        ({"name": "esci", "path": "x", "chain": {"labels": "0-3"}}, "data.labels='0,1,2,3'"),
        ({"name": "shopworld", "chain": {"labels": "esci"}}, "expected none, or 1-4"),
    ],
)
def test_options_that_nobody_reads_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(folder=Path(), **options)


def test_the_options_reach_the_readers(tmp_path):
    for name in ("query.csv", "product.csv", "label.csv", "pairs.csv"):
        (tmp_path / name).touch()
    shares = {"validation_share": 0.25, "test_share": 0.5, "markup": False}
    for name, path in (("wands", tmp_path), ("table", tmp_path / "pairs.csv")):
        config = DataConfig(name=name, folder=tmp_path, path=str(path), **shares)
        options = make_builder(config).builder_config.options()
        assert {key: options[key] for key in shares} == shares
