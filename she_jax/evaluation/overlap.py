"""How the words of a query overlap with the texts of a product: about 30 numbers for each pair.

Words are compared without case, accents and common endings, in any script: where a script is
written without spaces, pairs of neighboring characters are the words.
"""

import functools
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

_FIELDS = 4  # besides the title
_COMMON = 0.1  # share of the products that fill a common field
_K1, _B = 1.2, 0.75  # of BM25 (Robertson and Zaragoza 2009), the usual values
_ACCENTS = re.compile("[\u0300-\u036f]")
# Scripts written without spaces between words: Thai to Tibetan, Burmese, Khmer, kana, Han.
_UNSPACED = re.compile(
    "([\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]+)"
)
# Endings of Germanic and Romance nouns and adjectives, after three letters: not a stem of any
# language, but shoes meet a shoe, rojas rojo and Lampen a Lampe, and the camera x100s stays.
_ENDING = re.compile(r"(?<=[^\W\d]{3})(i?es|[aou]s|(?<!s)s|en|[aeiouy])$")
_NUMBER = re.compile(r"\d+")


class _Letters(dict[int, str]):
    """A table for ``str.translate`` that keeps letters, marks and digits, and blanks the rest."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        self[code] = char if unicodedata.category(char)[0] in "LMN" else " "
        return self[code]


_LETTERS = _Letters()


@dataclass(frozen=True)
class _Text:
    """A text as compared: letters and digits with single blanks, words in order, as a set."""

    letters: str
    words: tuple[str, ...]
    vocabulary: frozenset[str]

    def phrase(self) -> str:
        return f" {' '.join(self.words)} "


_NOTHING = _Text("", (), frozenset())


class Overlap:
    """Overlap features of pairs; how rare a word is comes from the training split's products."""

    def __init__(self, products: Iterable[Mapping[str, str]]):
        """Counts words and fields.

        Args:
          products: those of the training pairs; repeated ones count once.
        """
        distinct = {tuple(sorted(product.items())): product for product in products}.values()
        self._n = len(distinct)
        self._containing: Counter[str] = Counter()
        n_words = 0
        for product in distinct:
            whole = _join(_read(text) for text in product.values())
            self._containing.update(whole.vocabulary)
            n_words += len(whole.words)
        self._mean_words = n_words / max(self._n, 1)
        filled = Counter(name for product in distinct for name, text in product.items() if text)
        filled.pop("title", None)
        common = sorted(filled, key=lambda name: (-filled[name], name))[:_FIELDS]
        self._fields = [name for name in common if filled[name] >= _COMMON * self._n]

    def features(
        self, queries: Sequence[str], products: Sequence[Mapping[str, str]]
    ) -> Float[np.ndarray, "N F"]:
        """The features of each pair; F depends on the training split's fields and is at most 35."""
        rows = np.empty((len(queries), len(self.named_features("", {}))))
        for row, query, product in zip(rows, queries, products, strict=True):
            row[:] = list(self.named_features(query, product).values())
        return rows

    def named_features(self, query: str, product: Mapping[str, str]) -> dict[str, float]:
        """The features of a pair by name, in a fixed order."""
        wanted, fields = _read(query), {name: _read(product[name]) for name in sorted(product)}
        title, whole = fields.get("title", _NOTHING), _join(fields.values())
        # Sorted, because the order of a set differs between processes, and with it the last digits.
        rarity = {word: self._idf(word) for word in sorted(wanted.vocabulary)}
        missing = [rarity[word] for word in wanted.vocabulary - whole.vocabulary]
        values = {
            "query_words": math.log1p(len(wanted.words)),
            "title_words": math.log1p(len(title.words)),
            "product_words": math.log1p(len(whole.words)),
            "filled_fields": sum(map(bool, product.values())),
            "mean_rarity": sum(rarity.values()) / max(len(rarity), 1),
            "rarest_missing": max(missing, default=0.0),
            **_title_features(wanted, title),
            **_number_features(wanted, title, whole),
        }
        for place, text in (("title", title), ("product", whole)):
            values |= {f"{name}_{place}": x for name, x in _shares(wanted, text, rarity).items()}
            values[f"bm25_{place}"] = self._bm25(rarity, text)
        for name in self._fields:
            field = fields.get(name, _NOTHING)
            values[f"share_in_field_{name}"] = _share(wanted.vocabulary, field.vocabulary)
        return values

    def _idf(self, word: str) -> float:
        containing = self._containing[word]
        return math.log1p((self._n - containing + 0.5) / (containing + 0.5))

    def _bm25(self, rarity: Mapping[str, float], text: _Text) -> float:
        length = _K1 * (1 - _B + _B * len(text.words) / max(self._mean_words, 1))
        counts = {word: text.words.count(word) for word in rarity}
        return sum(rarity[word] * (_K1 + 1) * n / (n + length) for word, n in counts.items())


def _shares(wanted: _Text, text: _Text, rarity: Mapping[str, float]) -> dict[str, float]:
    """How much of the query stands in a text: in words, rare words, phrases, trigrams."""
    both = [word for word in rarity if word in text.vocabulary]
    share = _share(wanted.vocabulary, text.vocabulary)
    trigrams = _trigrams(wanted.letters)
    padded = f" {text.letters} "
    return {
        "share_in": share,
        "all_in": share == 1,
        "none_in": share == 0,
        "rare_share_in": sum(rarity[word] for word in both) / (sum(rarity.values()) or 1),
        "phrase_in": wanted.phrase() in text.phrase(),
        "trigrams_in": sum(trigram in padded for trigram in trigrams) / max(len(trigrams), 1),
    }


def _title_features(wanted: _Text, title: _Text) -> dict[str, float]:
    both = wanted.vocabulary & title.vocabulary
    either = wanted.vocabulary | title.vocabulary
    query_trigrams, title_trigrams = _trigrams(wanted.letters), _trigrams(title.letters)
    places = [i for i, word in enumerate(title.words) if word in both]
    return {
        "title_share": len(both) / max(len(title.vocabulary), 1),
        "jaccard": len(both) / max(len(either), 1),
        "trigram_jaccard": len(query_trigrams & title_trigrams)
        / max(len(query_trigrams | title_trigrams), 1),
        "first_word": bool(wanted.words) and wanted.words[0] in title.vocabulary,
        "last_word": bool(wanted.words) and wanted.words[-1] in title.vocabulary,
        "begins_title": bool(title.words) and title.words[0] in wanted.vocabulary,
        "ends_title": bool(title.words) and title.words[-1] in wanted.vocabulary,
        "first_place": places[0] / len(title.words) if places else 1.0,
    }


def _number_features(wanted: _Text, title: _Text, whole: _Text) -> dict[str, float]:
    numbers = sorted(set(_NUMBER.findall(wanted.letters)))
    in_title, in_whole = (
        sum(bool(re.search(rf"(?<!\d){number}(?!\d)", text.letters)) for number in numbers)
        for text in (title, whole)
    )
    return {
        "numbers": len(numbers),
        "numbers_in_title": in_title / max(len(numbers), 1),
        "numbers_missing": len(numbers) - in_whole,
    }


def _share(wanted: Collection[str], present: Collection[str]) -> float:
    """Share of the wanted words that are present; 0 if nothing is wanted."""
    return sum(word in present for word in wanted) / max(len(wanted), 1)


def _trigrams(letters: str) -> set[str]:
    padded = f" {letters} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


def _read(text: str) -> _Text:
    if not text.isascii():
        text = _ACCENTS.sub("", unicodedata.normalize("NFKD", text))
        text = unicodedata.normalize("NFC", text)
    runs = text.casefold().translate(_LETTERS).split()
    words = tuple(itertools.chain.from_iterable(map(_words, runs)))
    return _Text(" ".join(runs), words, frozenset(words))


def _join(texts: Iterable[_Text]) -> _Text:
    texts = list(texts)
    return _Text(
        " ".join(text.letters for text in texts),
        tuple(itertools.chain.from_iterable(text.words for text in texts)),
        frozenset().union(*(text.vocabulary for text in texts)),
    )


@functools.lru_cache(maxsize=2**16)
def _words(run: str) -> tuple[str, ...]:
    """The words of a run of letters: its stem, and for unspaced scripts all pairs of neighbors."""
    if run.isascii():
        return (_ENDING.sub("", run),)
    words: list[str] = []
    for i, part in enumerate(_UNSPACED.split(run)):
        if i % 2 and len(part) > 1:
            words += [part[j : j + 2] for j in range(len(part) - 1)]
        elif part:
            words.append(_ENDING.sub("", part))
    return tuple(words)
