"""Overlap features: by hand, in several scripts, and independent of the order of what is read."""

import numpy as np
import pytest

from she_jax.evaluation.overlap import Overlap

SHOP = [
    {"title": "Red running shoes 42", "brand": "Acme", "color": "red"},
    {"title": "Blue running socks", "brand": "Acme"},
    {"title": "Garden lamp", "brand": "Lux", "color": "black", "material": "steel"},
    {"title": "Garden chair", "brand": "Lux", "color": ""},
]


def features(query, title, **fields):
    return Overlap(SHOP).named_features(query, {"title": title, **fields})


def test_features_of_a_pair_by_hand():
    values = features("red shoe size 42", "Red Running Shoes", brand="Acme", color="42 red")
    expected = {
        "share_in_title": 2 / 4,  # red, shoe
        "share_in_product": 3 / 4,  # and 42
        "title_share": 2 / 3,
        "jaccard": 2 / 5,
        "first_word": True,
        "last_word": False,
        "begins_title": True,
        "ends_title": True,
        "first_place": 0,
        "phrase_in_title": False,
        "all_in_product": False,
        "none_in_title": False,
        "numbers": 1,
        "numbers_in_title": 0,
        "numbers_missing": 0,
        "filled_fields": 3,
        "share_in_field_color": 2 / 4,
        "share_in_field_brand": 0,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    # "size" is in none of the 4 products, "garden" in 2 of them.
    assert values["rarest_missing"] == pytest.approx(np.log(1 + 4.5 / 0.5))
    assert features("garden", "x")["mean_rarity"] == pytest.approx(np.log(1 + 2.5 / 2.5))


def test_bm25_of_a_word_by_hand():
    """One of 4 products has the word; 4.5 words a product; the word stands twice among 3."""
    idf, length = np.log(1 + 3.5 / 1.5), 1.2 * (0.25 + 0.75 * 3 / 4.25)
    shop = Overlap(
        [{"title": "a b c d"}, {"title": "e f g h"}, {"title": "i j k l m"}, {"t": "n o p q"}]
    )
    value = shop.named_features("m", {"title": "m m x"})["bm25_title"]
    assert value == pytest.approx(idf * 2 * 2.2 / (2 + length))


@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("RUNNING SHOE", "running shoes"),
        ("batteries", "Battery pack"),
        ("glass", "two glasses"),
        ("zapatos rojos niña", "Zapato Roja para Nina"),
        ("Lampen weiß", "weisse Lampe"),
        ("スマートフォン", "最新スマートフォンケース"),
        ("ﾃﾚﾋﾞ", "液晶テレビ"),
        ("手机", "苹果手机壳"),
        ("โทรศัพท์", "เคสโทรศัพท์มือถือ"),
        ("गिटार", "लकड़ी का गिटार"),
        ("чехлы", "Чехлы для телефона"),
    ],
)
def test_words_meet_in_every_script_whatever_their_case_accents_and_endings(query, title):
    values = features(query, title)
    assert values["share_in_title"] == 1
    assert features(query, "qqq www")["share_in_product"] == 0


@pytest.mark.parametrize(("query", "title"), [("x100s", "x100"), ("iphone 15", "iphone 150")])
def test_models_and_numbers_meet_only_as_they_are(query, title):
    values = features(query, title)
    assert values["share_in_title"] < 1
    assert values["all_in_title"] == 0


def test_numbers_meet_beside_a_unit():
    assert features("usb 128 gb", "stick 128gb")["numbers_in_title"] == 1
    assert features("usb 12 gb", "stick 128gb")["numbers_missing"] == 1


def test_fields_are_those_that_the_training_split_fills_and_none_is_needed():
    shop = Overlap(SHOP)
    names = list(shop.named_features("q", {}))
    assert names[-3:] == [f"share_in_field_{name}" for name in ("brand", "color", "material")]
    table = shop.features(["", "q"], [{}, {"odd": "q", "brand": ""}])
    assert table.shape == (2, len(names))
    assert np.isfinite(table).all()
    assert shop.features([], []).shape == (0, len(names))
    assert np.isfinite(Overlap([]).features(["q"], [{"title": "q"}])).all()


def test_the_order_of_products_and_copies_of_them_change_nothing():
    queries, products = ["red garden shoe", "lamp", "acme"], SHOP[:3]
    backwards = [dict(reversed(product.items())) for product in reversed(SHOP)]
    expected = Overlap(SHOP).features(queries, products)
    twice = Overlap([*backwards, *SHOP])
    np.testing.assert_array_equal(twice.features(queries, products), expected)
