"""What a rule can know of the words of a query: which a product's fields contain, which none does.

A claim is about words, not about what they mean: ``found`` is quoted from a field, and ``missing``
is said only of a word that no field has in another form. Where that is uncertain, nothing is said.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from she_jax.data.languages import (
    JAPANESE,
    JAPANESE_NEGATIONS,
    JAPANESE_NEGATIONS_BEHIND,
    NEGATIONS,
    NEGATIONS_BEHIND,
    STOP_WORDS,
    UNITS,
    WRITTEN_OTHERWISE,
    Language,
    fold,
    is_inflected,
    stem,
)
from she_jax.data.unspaced import CJK, HAN, HIRAGANA, KATAKANA, unspaced_hits

_TOKEN = re.compile(
    r"\d+(?:[.,/]\d+)*"  # numbers, also 15.6 and 1/2
    rf"|[{KATAKANA}]+|[{HIRAGANA}{HAN}]+"
    # Words of other letters; the marks are vowels in scripts from Devanagari to Khmer.
    rf"|(?:[^\W\d_{CJK}]|[\u0300-\u036f\u0900-\u109f\u1780-\u17ff])+"
    r'|(?<=\d)["″”]'
)
_LETTERS = re.compile(r"[^\W\d_]+")
_CLAUSE = re.compile(r"[.;!?。！？](?:\s|$)")
_IS_CJK = re.compile(f"[{CJK}]")
_JOINED = re.compile(r"[^\s,;:|/+()\[\]]*")  # between the parts of "t-shirt" and "15.6-inch"
_ALL_NEGATIONS = frozenset().union(*NEGATIONS.values())
_ALL_BEHIND = frozenset().union(*NEGATIONS_BEHIND.values())
_SCOPE = 4  # the longest negated phrase that is looked up as a whole, in words
_MAX_CHARS = 30  # longer terms are not compared
_MIN_MISSING, _MIN_COMPOUND = 4, 4  # letters
_START = 3  # letters that the forms of a word have in common


@dataclass(frozen=True, kw_only=True)
class Term:
    """A word of a query, or several that are compared as one.

    Attributes:
      text: as the query writes it.
      words: its words without case and accents.
    """

    text: str
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class WordClaims:
    """What is known of the words of a query.

    Attributes:
      found: terms that a field contains, with the field's name. A term that the field has in
        another form stands before it: ``lamps / lamp``.
      missing: terms that no field contains in any form.
    """

    found: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def is_negated(query: str) -> bool:
    """Whether a query contains a negation of any of the languages."""
    is_cjk = bool(_IS_CJK.search(query))
    return not (_ALL_NEGATIONS | _ALL_BEHIND).isdisjoint(_LETTERS.findall(fold(query))) or (
        is_cjk and any(mark in query for mark in JAPANESE_NEGATIONS + JAPANESE_NEGATIONS_BEHIND)
    )


@functools.lru_cache(maxsize=1 << 12)
def query_terms(query: str) -> tuple[Term, ...]:
    """The terms of a query, in order, each once, without stop words.

    Parts that are written together stay together ("t-shirt"), as does a number with its unit or the
    word before it ("15 inch", "iphone 15"). What follows a negation is a single term with it, or is
    left out if it is long.
    """
    tokens = [m for m in _TOKEN.finditer(query) if fold(m.group())]  # not an accent alone
    groups = _join_written_together(tokens, query)
    words = [
        tuple(fold(m.group()) for m in group if m.group() != "s") or ("s",) for group in groups
    ]
    stop = next((i for i, w in enumerate(words) if w[0] in _ALL_NEGATIONS), len(groups))
    spans = _attach_numbers(words[:stop])
    if stop + 1 < len(groups) <= stop + _SCOPE:
        spans.append((stop, len(groups)))
    terms = {}
    for first, end in spans:
        text = query[groups[first][0].start() : groups[end - 1][-1].end()]
        parts = tuple(itertools.chain(*words[first:end]))
        if len(text) <= _MAX_CHARS:
            terms.setdefault(parts, Term(text=text, words=parts))
    return tuple(terms.values())


def compare(
    query: str, product: Mapping[str, str], language: Language, *, most: int, most_missing: int
) -> WordClaims:
    """Compares the words of a query with a product's fields, as far as their language is known.

    In an unknown language a word is found only where it stands as it is, and none is missing; nor
    is one in Japanese, which has several scripts for a word, or if nothing at all is found.

    Args:
      query: the shopper's query.
      product: text by field name.
      language: of the pair, see ``language_of``.
      most: terms that may be claimed, found and missing.
      most_missing: terms among them that may be missing.
    """
    terms = query_terms(query)
    fields = _Fields(product if terms else {}, language)
    claims, unmatched = WordClaims(), []
    for term in terms:
        if len(claims.found) == most and not most_missing:
            break
        if match := fields.find(term):
            claims.found.append(match)
        else:
            unmatched.append(term)
    if most_missing and claims.found and language.stemmer is not None and not is_negated(query):
        missing = (term.text for term in unmatched if fields.lack(term))
        claims.missing.extend(itertools.islice(missing, most_missing))
    del claims.found[most - len(claims.missing) :]
    return claims


def _join_written_together(tokens: Sequence[re.Match], query: str) -> list[list[re.Match]]:
    """Groups of tokens without a space, comma or slash between them."""
    groups: list[list[re.Match]] = []
    for token in tokens:
        previous = groups[-1][-1] if groups else None
        if previous and _belongs(previous, token, query):
            groups[-1].append(token)
        else:
            groups.append([token])
    return groups


def _belongs(previous: re.Match, token: re.Match, query: str) -> bool:
    gap = query[previous.end() : token.start()]
    if _IS_CJK.match(token.group()):  # joined to a number, or if it negates what is before
        if token.group().startswith(JAPANESE_NEGATIONS_BEHIND):
            return not gap.strip()
        return not gap and (previous.group()[-1].isdigit() or len(previous.group()) == 1)
    return not _IS_CJK.match(previous.group()) and bool(_JOINED.fullmatch(gap))


def _attach_numbers(groups: Sequence[tuple[str, ...]]) -> list[tuple[int, int]]:
    """The spans of terms: a lone number or letter needs the word beside it."""
    spans: list[tuple[int, int]] = []
    i = 0
    while i < len(groups):
        group, following = groups[i], groups[i + 1 : i + 2]
        weak = _is_weak(group)
        if following and group[-1][0].isdigit() and following[0][0] in UNITS:
            spans.append((i, i + 2))
            i += 1
        elif spans and (weak or group[0] in _ALL_BEHIND):
            spans[-1] = (spans[-1][0], i + 1)
        elif weak and following:
            spans.append((i, i + 2))
            i += 1
        elif not weak and not STOP_WORDS.issuperset(group):
            spans.append((i, i + 1))
        i += 1
    return spans


def _is_weak(group: tuple[str, ...]) -> bool:
    """Whether it says nothing without the word beside it: a lone number, letter or character."""
    word, *others = group
    return not others and (word[0].isdigit() or (len(word) == 1 and word not in STOP_WORDS))


class _Fields:
    """The texts of a product's fields, to look up the terms of a query."""

    def __init__(self, product: Mapping[str, str], language: Language):
        self._language, self._product = language, product
        self._texts = {name: fold(value) for name, value in product.items()}
        self._words: set[str] = set()  # only if asked for

    def find(self, term: Term) -> tuple[str, str] | None:
        """A term as it is found and the first field that has it, unless a field negates it."""
        first = None
        for name, text in self._texts.items():
            if term.words[0][:_START] not in text:
                continue
            for start, end in self._hits(text, term):
                if _negated_before(text, start):
                    return None
                if first is None and not _negated_behind(text, end):
                    first = self._quote(term, name, text[start:end]), name
        return first

    def _hits(self, text: str, term: Term) -> Iterator[tuple[int, int]]:
        if _IS_CJK.search(term.text):
            return unspaced_hits(text, fold(term.text), heads=self._language is JAPANESE)
        return _hits(text, term, self._language)

    def _quote(self, term: Term, name: str, found: str) -> str:
        """A term, and the form that a field has if it is another."""
        word, *others = term.words
        if others or found == word:
            return term.text
        words = _TOKEN.findall(self._product[name])
        return f"{term.text} / {next((w for w in words if fold(w) == found), found)}"

    def lack(self, term: Term) -> bool:
        """Whether no field has a term in any form: inflected, in a compound, or misspelt."""
        word = term.words[0]
        if len(term.words) > 1 or len(word) < _MIN_MISSING or not word.isalpha():
            return False
        if word in WRITTEN_OTHERWISE:
            return False
        root = stem(word, self._language)
        for text in self._texts.values():
            if root in text or any(_word_starts(text, word[:_START])):
                return False
        self._words = self._words or {
            other for text in self._texts.values() for other in _LETTERS.findall(text)
        }
        letters = _less(word)
        for other in self._words:
            if len(other) > 3 and other in word:  # a part of a compound
                return False
            # Words that differ in one letter agree in their first or in their last two.
            near = other[:2] == word[:2] or other[-2:] == word[-2:]
            if near and not letters.isdisjoint(_less(other)):
                return False
        return True


def _hits(text: str, term: Term, language: Language) -> Iterator[tuple[int, int]]:
    """Yields where a folded text has the words of a term in sequence, inflected or not."""
    word, *others = term.words
    inflects = language.stemmer is not None and word.isalpha() and len(word) >= _START
    for start in _word_starts(text, word[:_START] if inflects else word):
        token = _TOKEN.match(text, start)
        if token and _same(word, token.group(), language):
            end = token.end()
            for other in others:
                token = _TOKEN.search(text, end, end + 30)
                if (
                    not token
                    or token.start() > end + 3
                    or not _same(other, token.group(), language)
                ):
                    break
                end = token.end()
            else:
                yield start, end
    root = stem(word, language) if language.compounds and not others else ""
    if len(root) >= _MIN_COMPOUND:
        for compound in re.finditer(rf"[^\W\d_]{{{_START},}}{re.escape(root)}[^\W\d_]*", text):
            inner = compound.group()[-len(word) - 2 :]
            starts = (inner[i:] for i in range(len(inner)))
            if any(_same(word, part, language) for part in starts if part.startswith(root)):
                yield compound.span()


def _word_starts(text: str, start: str) -> Iterator[int]:
    """Yields where a folded text has a word, or a number, that starts in a given way."""
    at = text.find(start)
    while at >= 0:
        before = text[at - 1 : at] if at else " "
        if start[0].isdigit():
            inside = before.isdigit() or (before in ".,/" and text[at - 2 : at - 1].isdigit())
        else:
            inside = before.isalpha() and not _IS_CJK.match(before)
        if not inside:
            yield at
        at = text.find(start, at + 1)


def _same(word: str, other: str, language: Language) -> bool:
    """Whether two folded words are forms of one, or two names of a unit."""
    if word == other or (word in UNITS and UNITS[word] == UNITS.get(other)):
        return True
    return (
        language.stemmer is not None
        and word[:_START] == other[:_START]
        and len(word) >= _START
        and other.isalpha()
        and is_inflected(word, other, language)
    )


def _negated_before(text: str, start: int) -> bool:
    window = text[max(0, start - 40) : start]
    if window.endswith(JAPANESE_NEGATIONS):
        return True
    words = _LETTERS.findall(window)[-3:]
    if _ALL_NEGATIONS.isdisjoint(words):
        return False
    return not _ALL_NEGATIONS.isdisjoint(_LETTERS.findall(_CLAUSE.split(window)[-1])[-3:])


def _negated_behind(text: str, end: int) -> bool:
    clause = _CLAUSE.split(text[end : end + 30])[0]
    words = _LETTERS.findall(clause)[:2]
    return (
        clause.lstrip().startswith(JAPANESE_NEGATIONS_BEHIND)
        or not _ALL_NEGATIONS.isdisjoint(words)
        or not _ALL_BEHIND.isdisjoint(words[:1])
    )


def _less(word: str) -> set[str]:
    """A word and what is left of it without one of its letters."""
    return {word, *(word[:i] + word[i + 1 :] for i in range(len(word)))}
