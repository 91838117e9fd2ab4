"""Languages: which one a pair is in, and which words are forms of one."""

import pytest

from she_jax.data.languages import (
    ENGLISH,
    FRENCH,
    GERMAN,
    JAPANESE,
    SPANISH,
    UNKNOWN,
    fold,
    is_inflected,
    language_of,
)


@pytest.mark.parametrize(
    ("query", "title", "language"),
    [
        ("lamp for the desk", "Lamp with a cord", ENGLISH),
        ("rote Lampe", "Lampe für das Wohnzimmer, mit Schalter", GERMAN),
        ("lámpara de mesa", "Lámpara para el dormitorio con pantalla", SPANISH),
        ("lampe de bureau", "Lampe pour la chambre avec interrupteur", FRENCH),
        ("スマホ ケース", "Case for iPhone with a strap", JAPANESE),
        ("iphone 15", "iPhone 15", UNKNOWN),  # a title alone decides nothing
        ("rote Lampe", "Lampe, rot", UNKNOWN),
        ("lampada da tavolo", "Lampada per il soggiorno, con paralume di vetro", UNKNOWN),
        ("lamp", "The The The The", UNKNOWN),  # a repeated word is no second sign
        ("手机壳", "红色手机壳", UNKNOWN),
        ("настольная лампа", "Лампа для стола", UNKNOWN),
        ("", "", UNKNOWN),
    ],
)
def test_the_language_is_that_of_query_and_product_together(query, title, language):
    assert language_of(query, {"title": title}) is language


@pytest.mark.parametrize(
    ("language", "word", "other", "related"),
    [
        (ENGLISH, "lamps", "lamp", True),
        (ENGLISH, "batteries", "battery", True),
        (ENGLISH, "printer", "print", False),  # though snowball gives some such pairs one stem
        (ENGLISH, "memory", "memorial", False),
        (ENGLISH, "glasses", "glass", False),
        (GERMAN, "rote", "rot", True),
        (GERMAN, "roter", "rotes", True),
        (GERMAN, "stuhle", "stuhl", True),
        (GERMAN, "drucker", "druck", False),
        (SPANISH, "blancas", "blanco", True),
        (SPANISH, "relojes", "reloj", True),
        (SPANISH, "plata", "plato", False),
        (FRENCH, "noire", "noirs", True),
        (FRENCH, "porte", "port", False),
        (UNKNOWN, "lamps", "lamp", False),
    ],
)
def test_forms_of_a_word_are_told_from_other_words_of_its_stem(language, word, other, related):
    assert is_inflected(word, other, language) is related
    assert is_inflected(other, word, language) is related


def test_folding_keeps_the_sounds_of_kana():
    assert fold("Teléfono™ ＬＥＤ") == "telefono led"
    assert fold("ガラス") != fold("カラス")
