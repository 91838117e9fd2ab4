"""What is known of five languages: stop words, stems, compounds, and the words of a negation.

The language of a query-product pair is decided from its script and its known words, over query and
product together, and never from a title alone. A pair that does not decide it is ``UNKNOWN``.
"""

import functools
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from snowballstemmer.english_stemmer import EnglishStemmer
from snowballstemmer.french_stemmer import FrenchStemmer
from snowballstemmer.german_stemmer import GermanStemmer
from snowballstemmer.spanish_stemmer import SpanishStemmer

_MIN_KNOWN, _MIN_SHARE = 2, 0.03  # known words that decide a language: their number and share
_MARGIN = 1.5  # how many times as many as of the next language
_FIELD_CHARS = 300  # characters of a field that are looked at
_KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa\uff66-\uff9d]")
_ACCENTED = re.compile("[\u00c0-\u024f\u0300-\u036f\u1e00-\u1fff]")
_MARKS = re.compile("[\u0300-\u036f]")  # of Latin letters; those of kana change the sound


@dataclass(frozen=True, kw_only=True, eq=False)
class Language:
    """What a rule knows of a language.

    Attributes:
      name: English name.
      stop_words: words that say nothing by themselves, without accents.
      known_words: frequent words of product texts that tell it from the other languages.
      stemmer: a class of ``snowballstemmer``, or None. It also removes endings that make another
        word (print, printer), so the endings of two forms must be known besides:
      endings: pairs of endings of one word's forms, each pair joined by "|" and sorted.
      agreeing: stems of adjectives that may have any ending of their language.
      plural_only: words whose singular is another word (glasses, glass).
      compounds: whether a word may end in another word that names what it is (Garten-stuhl).
    """

    name: str
    stop_words: frozenset[str] = frozenset()
    known_words: frozenset[str] = frozenset()
    stemmer: Any = None
    endings: frozenset[str] = frozenset()
    agreeing: frozenset[str] = frozenset()
    plural_only: frozenset[str] = frozenset()
    compounds: bool = False


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


ENGLISH = Language(
    name="English",
    stop_words=_set(
        "a an and any are as at be by can do does for from has have i if in into is it its my of on"
        " or our so some that the their them these they this those to up was we what when where"
        " which while who will with you your"
    ),
    known_words=_set(
        "about all also best black blue brown color compatible easy gray green height inch inches"
        " included kids large made men new not only other pack perfect pieces product quality red"
        " set silver size small than type use used weight white width women yellow"
    ),
    stemmer=EnglishStemmer,
    endings=_set("|s |es ies|y"),
    plural_only=_set("arms boxers briefs customs glasses goods shorts"),
)
GERMAN = Language(
    name="German",
    stop_words=_set(
        "aber alle als am an auch auf aus bei beim bis das dem den der des die ein eine einem einen"
        " einer eines er es fur hat ich ihr ihre im in ist mit nach oder sehr sich sie sind so uber"
        " um und unter vom von vor wie wir wird zu zum zur"
    ),
    known_words=_set(
        "blau braun damen farbe gelb geeignet gross grosse grun herren hochwertig hochwertige"
        " holz jahre kinder klein lieferumfang nicht passend rot schwarz stuck weiss"
    ),
    stemmer=GermanStemmer,
    endings=_set("|e |n |en |s |es e|en e|em e|er e|es em|en en|er en|es er|es em|er em|es"),
    agreeing=_set(
        "blau braun breit dunkel eckig gelb grau gross grun hell hoch klein kurz lang rosa rot rund"
        " schmal schwarz weiss"
    ),
    compounds=True,
)
SPANISH = Language(
    name="Spanish",
    stop_words=_set(
        "a al como con cual de del desde donde e el ella en entre es esta este estos la las le les"
        " lo los mas mi muy o para pero por que se si sobre son su sus tu tus un una unas uno unos"
        " y ya"
    ),
    known_words=_set(
        "alta amarillo ano anos azul blanco blanca bolsillos calidad casa facil gran grande hombre"
        " hombres marron mujer mujeres negra negro nino ninos pequeno piezas producto puede roja"
        " rojo tamano todo unidades uso verde"
    ),
    stemmer=SpanishStemmer,
    endings=_set("|s |es"),
    agreeing=_set(
        "alt amarill anch blanc cort deportiv dorad electric larg morad negr pequen platead"
        " redond roj"
    ),
)
FRENCH = Language(
    name="French",
    stop_words=_set(
        "a au aux avec c ce ces cette chez d dans de des du elle en est et il ils j je l la le les"
        " leur leurs m ma mes n notre nous on ou par pour qu que qui s sa se ses son sont sous sur"
        " t un une vos votre vous y"
    ),
    known_words=_set(
        "blanc blanche bleu bois couleur enfant enfants facile femme femmes grand grande gris homme"
        " hommes jaune noir noire peut petit petite produit qualite rouge taille"
        " tres utilisation vert verte"
    ),
    stemmer=FrenchStemmer,
    endings=_set("|s |x"),
    agreeing=_set("bleu brun court dor electr gris grand noir petit rond vert violet"),
)
JAPANESE = Language(
    name="Japanese",
    stop_words=_set(
        "の を に は が と で も へ や から まで など ため ための する した して です ます ある"
        " いる こと もの よう より この その おすすめ お勧め 人気 ランキング"
    ),
)
UNKNOWN = Language(name="unknown")
_SPACED = (ENGLISH, GERMAN, SPANISH, FRENCH)
# Languages that are only known apart from those above, by their stop words.
_OTHERS = (
    _set("che con da dei del della delle di e gli il in la le nel per piu sono un una"),  # Italian
    _set("a ao as com da das de do dos e em mais na nao no o os para por um uma"),  # Portuguese
    _set("aan bij de dit een en het in is met naar niet of om op te uit van voor zijn"),  # Dutch
    _set(
        "af att av den det en er et for i ikke inte med og och om pa som til till"
    ),  # Scandinavian
    _set("a do dla i jest lub na nie od oraz po sie w z ze"),  # Polish
)

# In every pair the stop words and negations of all languages count: a word that is wrongly taken
# for one is not spoken of, which makes nothing false.
STOP_WORDS = frozenset().union(*(language.stop_words for language in (*_SPACED, JAPANESE)))
# Numbers and sizes, which a product may write otherwise ("5", "XL").
WRITTEN_OTHERWISE = _set(
    "one two three four five six seven eight nine ten twelve dozen first second third fourth fifth"
    " small medium large extra double single eins zwei drei vier funf sechs sieben acht neun zehn"
    " doppelt dos tres cuatro cinco seis siete ocho nueve diez doble deux trois quatre cinq sept"
    " huit neuf grande pequeno pequena mediano petit petite grand klein gross grosse"
)

# Before what they exclude.
NEGATIONS = {
    ENGLISH.name: _set("not no non without except never isn doesn don cannot lacks nor neither"),
    GERMAN.name: _set("nicht kein keine keinen keiner keinem keines ohne ausser nie weder statt"),
    SPANISH.name: _set("no sin excepto salvo ni nunca menos"),
    FRENCH.name: _set("non sans sauf pas ne aucun aucune ni hors jamais"),
    "others": _set("bez geen nao nie niet senza sem uden utan zonder"),
}
# Behind what they exclude: "sugar free".
NEGATIONS_BEHIND = {ENGLISH.name: _set("free less"), GERMAN.name: _set("frei los")}
JAPANESE_NEGATIONS = ("無", "非", "不", "未", "ノン")
JAPANESE_NEGATIONS_BEHIND = (
    *("なし", "無し", "ナシ", "ない", "無い", "不要", "不使用", "以外", "ゼロ", "レス", "フリー"),
    *("カット", "抜き", "ぬき", "防止", "対策", "除去", "ではな", "じゃな", "は含", "別売", "は付"),
    *("はつ", "は別"),
)

# Units by the one word that stands for all of them; they follow a number.
_UNITS = {
    "inch": '" ″ ” inch inches zoll pulgada pulgadas pouce pouces インチ',
    "cm": "cm centimeter centimeters centimetre centimetres centimetro centimetros zentimeter",
    "mm": "mm millimeter millimeters millimetre milimetro milimetros millimetres",
    "m": "m meter meters metre metres metro metros",
    "foot": "ft foot feet",
    "ounce": "oz ounce ounces onza onzas",
    "pound": "lb lbs pound pounds libra libras",
    "gram": "g gr gram grams gramm gramme grammes gramo gramos",
    "kg": "kg kilo kilos kilogram kilograms kilogramm kilogramme kilogramos",
    "ml": "ml milliliter milliliters millilitre mililitros",
    "liter": "l lt liter liters litre litres litro litros",
    "watt": "w watt watts vatios",
    "volt": "v volt volts voltios",
    "gb": "gb gigabyte gigabytes",
    "tb": "tb terabyte terabytes",
    "mah": "mah",
    "pack": "pack packs pk",
    "piece": "pc pcs piece pieces pieza piezas stuck teilig pieces unidades",
    "year": "year years ano anos jahr jahre an ans",
}
UNITS = {word: unit for unit, words in _UNITS.items() for word in words.split()}


def language_of(query: str, product: Mapping[str, str]) -> Language:
    """The language of a pair, or ``UNKNOWN``.

    Kana in the query, or in a tenth of the pair's text, is Japanese. Otherwise a language needs
    two known words, 3% of all, and half as many again as every other language; repetitions do not
    count.
    """
    if _KANA.search(query):
        return JAPANESE
    text = " ".join([fold(query), *(fold(value)[:_FIELD_CHARS] for value in product.values())])
    if not text.isascii() and 10 * len(_KANA.findall(text)) > len(text):
        return JAPANESE
    words = set(text.split())
    counts = [0] * len(_VOCABULARIES)
    for word in words & _VOTES.keys():
        for i in _VOTES[word]:
            counts[i] += 1
    best = max(range(len(_SPACED)), key=counts.__getitem__)
    most = counts.pop(best)
    decided = most >= max(_MIN_KNOWN, _MIN_SHARE * len(words), _MARGIN * max(counts))
    return _SPACED[best] if decided else UNKNOWN


_VOCABULARIES = (*(lang.stop_words | lang.known_words for lang in _SPACED), *_OTHERS)
_VOTES = {
    word: tuple(i for i, vocabulary in enumerate(_VOCABULARIES) if word in vocabulary)
    for word in frozenset().union(*_VOCABULARIES)
    if len(word) > 1
}


@functools.lru_cache(maxsize=1 << 11)
def fold(text: str) -> str:
    """A text without case, width, trademark signs, and the accents of Latin letters."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.replace("™", "").replace("℠", ""))
        if _ACCENTED.search(text):
            text = _MARKS.sub("", unicodedata.normalize("NFD", text))
            text = unicodedata.normalize("NFC", text)
    return text.casefold()


@functools.lru_cache(maxsize=1 << 16)
def stem(word: str, language: Language) -> str:
    """What the inflected forms of a word have in common, without accents.

    The word itself in a language without a stemmer. The stemmers keep state, so each call has one
    of its own: pairs may be read by several threads.
    """
    if language.stemmer is None:
        return fold(word)
    return fold(language.stemmer().stemWord(word.casefold()))


def is_inflected(word: str, other: str, language: Language) -> bool:
    """Whether two different folded words are forms of one."""
    if not {word, other}.isdisjoint(language.plural_only):
        return False
    common = next((i for i, (a, b) in enumerate(zip(word, other, strict=False)) if a != b), None)
    common = min(len(word), len(other)) if common is None else common
    inflected = "|".join(sorted((word[common:], other[common:]))) in language.endings
    if not inflected and not language.agreeing:
        return False
    root = stem(word, language)
    return root == stem(other, language) and (inflected or root in language.agreeing)
