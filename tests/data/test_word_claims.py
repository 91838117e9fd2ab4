"""Word claims: what is said of the words of a query is what a rule can know."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from she_jax.data.languages import ENGLISH, GERMAN, JAPANESE, SPANISH, UNKNOWN, fold
from she_jax.data.word_claims import compare, is_negated, query_terms


def claims(query, title, language, **fields):
    return compare(query, {"title": title, **fields}, language, most=9, most_missing=9)


@pytest.mark.parametrize(
    ("query", "terms"),
    [
        ("a lamp for the desk", ["lamp", "desk"]),
        ("iphone 15 case", ["iphone 15", "case"]),
        ("15 inch laptop", ["15 inch", "laptop"]),
        ('tv 55" black', ["tv", '55"', "black"]),
        ("12 cups", ["12 cups"]),
        ("frame 8.5 x 11", ["frame 8.5 x 11"]),
        ("women's t-shirt red/blue", ["women's", "t-shirt", "red", "blue"]),
        ("sugar free gum", ["sugar free", "gum"]),
        ("lamp without cord", ["lamp", "without cord"]),
        ("headphones with no wire or ear hook at all", ["headphones"]),
        ("赤いメガネ 26cm", ["赤い", "メガネ", "26cm"]),
        ("カフェイン なし コーヒー", ["カフェイン なし", "コーヒー"]),
    ],
)
def test_a_query_is_divided_where_its_parts_can_be_compared(query, terms):
    assert [term.text for term in query_terms(query)] == terms


@pytest.mark.parametrize(
    ("query", "title", "language", "found"),
    [
        ("rote Lampe", "Lampe, rot", GERMAN, ["rote / rot", "Lampe"]),
        ("Stuhl", "Gartenstühle aus Holz", GERMAN, ["Stuhl / Gartenstühle"]),
        ("Stuhl", "Stuhlkissen", GERMAN, []),  # a cushion is no chair
        ("phone", "Headphone", ENGLISH, []),
        ("telefonos", "Teléfono móvil", SPANISH, ["telefonos / Teléfono"]),
        ("lamps", "Lamp", UNKNOWN, []),  # only words as they stand
        ("lamps", "LAMPS", UNKNOWN, ["lamps"]),
        ("iphone 15", "Case 15 for iPhone 14", ENGLISH, []),
        ('15" laptop', "15-inch laptop", ENGLISH, ['15"', "laptop"]),
        ("8 pack", "18 pack", ENGLISH, []),
        ("5 inch", "1.5 inch, 1/5 inch", ENGLISH, []),
        ("cord", "Lamp without any cord", ENGLISH, []),
        ("cord", "Lamp, cord not included", ENGLISH, []),
        ("sugar", "Sugar-free gum", ENGLISH, []),
        ("sugar free", "Sugar-free gum", ENGLISH, ["sugar free"]),
        ("without cord", "Lamp with cord", ENGLISH, []),
        ("without cord", "Lamp without cord", ENGLISH, ["without cord"]),
        ("Kabel", "Lampe ohne Kabel", UNKNOWN, []),  # negations of every language count
        ("メガネ", "ブルーライトカット眼鏡 メガネ", JAPANESE, ["メガネ"]),
        ("スマホケース", "スマホケーブル", JAPANESE, []),
        ("時計", "腕時計", JAPANESE, ["時計"]),
        ("香料", "無香料", JAPANESE, []),
        ("アルコール", "アルコールフリー", JAPANESE, []),
        ("イス", "アイス", JAPANESE, []),
        ("10枚", "110枚", JAPANESE, []),
        ("手机", "手机壳", UNKNOWN, []),
    ],
)
def test_a_term_is_found_where_a_field_has_it(query, title, language, found):
    assert [text for text, _ in claims(query, title, language).found] == found


def test_one_negation_anywhere_silences_a_word():
    assert not claims("cord", "Lamp with cord", ENGLISH, bullets="comes without cord").found


@pytest.mark.parametrize(
    ("query", "title", "missing"),
    [
        ("emerald lamp", "Lamp", ["emerald"]),
        ("knitting lamp", "Lamp, knitted", []),  # another form
        ("samsnug lamp", "Samsung lamp", []),  # misspelt
        ("airpods lamp", "Air Pods lamp", []),  # written apart
        ("phone lamp", "Headphone lamp", []),  # in a compound
        ("three lamp", "3 lamp", []),
        ("lamp 55 inch", "Lamp", []),
        ("red lamp", "Lamp", []),  # too short to tell
        ("emerald lamp without cord", "Lamp", []),
        ("emerald", "Lamp", []),  # nothing at all is found
    ],
)
def test_a_word_is_missing_only_if_no_field_has_it_in_another_form(query, title, missing):
    assert claims(query, title, ENGLISH).missing == missing


@pytest.mark.parametrize("language", [UNKNOWN, JAPANESE])
def test_nothing_is_missing_where_the_forms_of_words_are_not_known(language):
    assert not claims("emerald lamp", "Lamp", language).missing


def test_a_found_word_names_the_first_field_that_has_it():
    found = claims("brass lamp", "Lamp", ENGLISH, brand="Brass & Co", bullets="brass").found
    assert found == [("brass", "brand"), ("lamp", "title")]


def test_the_claims_are_limited():
    limited = compare("a1 b2 c3 emerald", {"title": "a1 b2 c3"}, ENGLISH, most=3, most_missing=1)
    assert (limited.missing, len(limited.found)) == (["emerald"], 2)


@pytest.mark.parametrize("query", ["not red", "bpa free", "sin azúcar", "ohne Kabel", "糖質ゼロ"])
def test_negations_are_seen_in_every_language(query):
    assert is_negated(query)
    assert not is_negated("red lamp")


@given(query=st.text(max_size=30), title=st.text(max_size=40))
def test_what_is_found_stands_in_the_field(query, title):
    for text, _ in claims(query, title, UNKNOWN).found:
        for term in query_terms(query):
            if term.text == text:
                assert all(word in fold(title) or len(word) == 1 for word in term.words)
