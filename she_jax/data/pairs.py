"""ShopWorld's queries and products: what they are, what is true of them, how they are drawn.

A shop whose chains have checks also sells and asks for ``DETAILS``; there one value may stand in
for another (``likeness``), which has to be known, and a label often hangs on one condition.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from she_jax.data.catalogue import (
    ATTRIBUTES,
    BRANDS,
    DEPARTMENTS,
    DETAILS,
    NEEDS,
    SUBSTITUTED,
)

KINDS = ("plain", "attribute", "brand", "negation", "alternative", "question")

CATEGORY = {
    name: (department, category)
    for department, categories in DEPARTMENTS.items()
    for category, types in categories.items()
    for name in types
}
BAND = {brand: band for brands in BRANDS.values() for brand, band in brands.items()}
_TYPES = tuple(CATEGORY)
_SYNONYMS = {
    name: words
    for categories in DEPARTMENTS.values()
    for types in categories.values()
    for name, words in types.items()
}
_WITH_DETAILS = {name: ATTRIBUTES[name] | DETAILS[name] for name in DEPARTMENTS}
_VALUE_SYNONYMS = {
    department: {value: words for values in named.values() for value, words in values.items()}
    for department, named in _WITH_DETAILS.items()
}
_LONGTAIL_SHARE = 16  # one combination of type and value in so many is kept from training
_ALIKE_SHARE = 3  # one pair of values in so many is alike
_DOUBTFUL_SHARE = 2  # a fallible teacher doubts one pair in so many


class Condition(NamedTuple):
    """One thing asked: ``op`` is ``is``, ``not`` or ``cheaper`` (than the brand ``value``)."""

    attribute: str
    op: str
    value: str

    @property
    def item(self) -> str:
        """The condition in canonical words."""
        words = {"is": "", "not": "not ", "cheaper": "cheaper than "}
        return words[self.op] + self.value


class Query(NamedTuple):
    """A query: what it means, and the words it was put in."""

    kind: str
    department: str
    type: str
    conditions: tuple[Condition, ...]
    text: str


class Product(NamedTuple):
    """A product: its type, and the attributes it states by canonical value."""

    type: str
    stated: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Shop:
    """What can be asked for and stated in a split.

    Attributes:
      checks: steps that a chain has for single conditions; a query has up to so many conditions,
        and up to two where it is 0.
      longtail: combinations of type and value that are kept from training are there too.
    """

    checks: int
    longtail: bool

    @property
    def detailed(self) -> bool:
        """Whether it knows ``DETAILS`` and substitutes, and labels often hang on one condition."""
        return self.checks > 0

    def attributes(self, department: str) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
        """The attributes of a department, beside the brand."""
        return (_WITH_DETAILS if self.detailed else ATTRIBUTES)[department]

    def values(self, type_name: str, attribute: str) -> list[str]:
        """The values of an attribute that there are for a product type."""
        department = CATEGORY[type_name][0]
        brand = attribute == "brand"
        values = BRANDS[department] if brand else self.attributes(department)[attribute]
        return [v for v in values if self.longtail or not is_longtail(type_name, v)]

    @cache  # noqa: B019  a shop is a value, and there are eight of them
    def fitting(self, type_name: str, condition: Condition, outcome: str) -> tuple[str, ...]:
        """The values that products of a type can state to give a condition this outcome."""
        attribute, known = condition.attribute, self.attributes(CATEGORY[type_name][0])
        values = self.values(type_name, attribute) if attribute in ("brand", *known) else []
        return tuple(v for v in values if self.verdict(condition, v) == outcome)

    def likeness(self, attribute: str, asked: str, offered: str) -> str:
        """same, alike or other; ``likeness`` where it knows substitutes."""
        if self.detailed:
            return likeness(attribute, asked, offered)
        return "same" if asked == offered else "other"

    def verdict(self, condition: Condition, offered: str | None) -> str:
        """met, unstated or conflict, for what a product states of the condition's attribute."""
        if offered is None:
            return "unstated"
        alike = self.likeness(condition.attribute, condition.value, offered)
        return condition_verdict(condition, offered, alike)

    def askable(self, type_name: str, attribute: str, op: str) -> list[Condition]:
        """The conditions on an attribute that each type of the category can meet."""
        conditions = [Condition(attribute, op, v) for v in self.values(type_name, attribute)]
        kin = [type_name, *_kin(type_name)]
        return [c for c in conditions if all(self.fitting(t, c, "met") for t in kin)]


def category_verdict(asked: str, offered: str) -> str:
    """match for the same product type, near within a category, else mismatch."""
    if asked == offered:
        return "match"
    return "near" if CATEGORY[asked] == CATEGORY[offered] else "mismatch"


def likeness(attribute: str, asked: str, offered: str) -> str:
    """same; alike, where shoppers who ask for one value are content with the other; or other.

    Which values are alike follows from no rule: it is knowledge, as that ESCI's substitutes take.
    """
    if asked == offered:
        return "same"
    if attribute not in SUBSTITUTED:
        return "other"
    pair = sorted((asked, offered))
    return "other" if words_hash("alike", *pair) % _ALIKE_SHARE else "alike"


def is_doubtful(attribute: str, asked: str, offered: str) -> bool:
    """Whether a fallible teacher may be wrong about the likeness of two values."""
    pair = sorted((asked, offered))
    known = asked == offered or attribute not in SUBSTITUTED
    return not known and words_hash("doubtful", *pair) % _DOUBTFUL_SHARE == 0


def condition_verdict(condition: Condition, offered: str, alike: str) -> str:
    """met or conflict, for what a product states and how like it is to what was asked."""
    if condition.op == "cheaper":
        return "met" if BAND[offered] < BAND[condition.value] else "conflict"
    return "met" if (alike != "other") == (condition.op == "is") else "conflict"


def attributes_verdict(outcomes: list[str]) -> str:
    """The worst of the conditions' verdicts; met where nothing was asked."""
    return next((v for v in ("conflict", "unstated") if v in outcomes), "met")


def label_rule(category: str, attributes: str) -> int:
    """The relevance class that follows from the two verdicts (RAIR's rule)."""
    if category == "mismatch":
        return 1
    if attributes == "conflict":
        return 2
    return 4 if (category, attributes) == ("match", "met") else 3


def words_hash(*words: str) -> int:
    """32 bits that depend on the words alone."""
    return int.from_bytes(hashlib.blake2b("|".join(words).encode(), digest_size=4).digest(), "big")


@cache
def is_longtail(type_name: str, value: str) -> bool:
    """Whether a combination of product type and value is kept from training."""
    return words_hash(type_name, value) % _LONGTAIL_SHARE == 0


def draw_query(rng: random.Random, shop: Shop) -> Query | None:
    """Draws a query, or None where the type has no value to ask for."""
    kind, type_name = rng.choice(KINDS), rng.choice(_TYPES)
    department = CATEGORY[type_name][0]
    names = list(shop.attributes(department))
    rng.shuffle(names)
    if kind == "brand":
        names.insert(0, "brand")
    draw = _many_conditions if shop.detailed else _few_conditions
    if (drawn := draw(rng, shop, kind, type_name, names)) is None:
        return None
    conditions, need = drawn
    if shop.longtail and not any(is_longtail(type_name, c.value) for c in conditions):
        return None
    word = _word_many if shop.detailed else _word_few
    text = word(rng, kind, type_name, conditions, need)
    return Query(kind, department, type_name, tuple(conditions), text)


def _few_conditions(
    rng: random.Random, shop: Shop, kind: str, type_name: str, names: list[str]
) -> tuple[list[Condition], str] | None:
    """Up to two conditions, what is special about the kind first, and the need if one is named."""
    conditions: list[Condition] = []
    need = ""
    if kind == "alternative":
        dearer = [b for b in shop.values(type_name, "brand") if BAND[b] > 0]
        if not dearer:
            return None
        conditions.append(Condition("brand", "cheaper", rng.choice(dearer)))
    if kind == "question":
        need, (attribute, value) = rng.choice(list(NEEDS[CATEGORY[type_name][0]].items()))
        conditions.append(Condition(attribute, "is", value))
        names.remove(attribute)
    if kind == "negation":
        attribute = "material" if "material" in names and rng.random() < 0.7 else "colour"
        values = shop.values(type_name, attribute)
        conditions.append(Condition(attribute, "not", rng.choice(values)))
        names.remove(attribute)
    wanted = {"plain": 0, "attribute": rng.randint(1, 2), "brand": rng.randint(1, 2)}
    for attribute in names[: wanted.get(kind, rng.random() < 0.3)]:
        if values := shop.values(type_name, attribute):
            conditions.append(Condition(attribute, "is", rng.choice(values)))
    return conditions, need


def _many_conditions(
    rng: random.Random, shop: Shop, kind: str, type_name: str, names: list[str]
) -> tuple[list[Condition], str] | None:
    """As ``_few_conditions``, but half of ``checks`` to all, in the order of the query's words."""
    count = 0 if kind == "plain" else rng.randint(shop.checks // 2, shop.checks)
    conditions: list[Condition] = []
    need = ""
    if kind == "alternative":
        choice = shop.askable(type_name, "brand", "cheaper")
        if not choice:
            return None
        conditions.append(rng.choice(choice))
    if kind == "question":
        need, (attribute, value) = rng.choice(list(NEEDS[CATEGORY[type_name][0]].items()))
        condition = Condition(attribute, "is", value)
        if condition not in shop.askable(type_name, attribute, "is"):
            return None
        conditions.append(condition)
        names.remove(attribute)
    for attribute in names:
        if len(conditions) == count:
            break
        excluded = kind == "negation" and (not conditions or rng.random() < 1 / 3)
        if choice := shop.askable(type_name, attribute, "not" if excluded else "is"):
            conditions.append(rng.choice(choice))
    lacking = len(conditions) < count or (kind == "brand" and conditions[0].attribute != "brand")
    # Class 2 needs a condition that a product of the category can conflict with.
    lacking |= count > 0 and not all(
        any(shop.fitting(name, c, "conflict") for c in conditions)
        for name in (type_name, *_kin(type_name))
    )
    conditions.sort(key=lambda c: c.op == "not")
    return None if lacking else (conditions, need)


def _kin(type_name: str) -> list[str]:
    """The other types of a type's category."""
    department, category = CATEGORY[type_name]
    return [t for t in DEPARTMENTS[department][category] if t != type_name]


def _surface(rng: random.Random, name: str, synonyms: tuple[str, ...]) -> str:
    return name if not synonyms or rng.random() < 0.6 else rng.choice(synonyms)


def _value_surface(rng: random.Random, type_name: str, value: str) -> str:
    return _surface(rng, value, _VALUE_SYNONYMS[CATEGORY[type_name][0]].get(value, ()))


def _word_few(
    rng: random.Random, kind: str, type_name: str, conditions: list[Condition], need: str
) -> str:
    """Puts a query with up to two conditions into words."""
    noun = _surface(rng, type_name, _SYNONYMS[type_name])
    special, plain = conditions[:1], conditions[1:]
    if kind in ("plain", "attribute", "brand"):
        special, plain = [], conditions
    words = [_value_surface(rng, type_name, c.value) for c in plain]
    text = " ".join([*words, noun])
    if kind != "brand" and words and rng.random() < 0.4:
        text = " ".join([noun, *words])
    if kind == "negation":
        value = _value_surface(rng, type_name, special[0].value)
        return rng.choice([f"{text} not {value}", f"{text} without {value}", f"non {value} {text}"])
    return _frame(rng, kind, text, need or (special[0].value if special else ""))


def _word_many(
    rng: random.Random, kind: str, type_name: str, conditions: list[Condition], need: str
) -> str:
    """Puts a query into words: values on both sides of the noun, what is excluded at the end."""
    noun = _surface(rng, type_name, _SYNONYMS[type_name])
    special, plain = (conditions[0].value, conditions[1:]) if conditions else ("", [])
    if kind not in ("alternative", "question"):
        plain = conditions
    words = [_value_surface(rng, type_name, c.value) for c in plain if c.op == "is"]
    cut = rng.randint(0, len(words))
    words.insert(cut, noun)
    for condition in plain:
        if condition.op == "not":
            words.append(rng.choice(["not", "without"]))
            words.append(_value_surface(rng, type_name, condition.value))
    return _frame(rng, kind, " ".join(words), need or special)


def _frame(rng: random.Random, kind: str, text: str, special: str) -> str:
    """Puts the dearer brand or the need beside the rest of a query."""
    if kind == "alternative":
        return rng.choice(
            [f"like {special} {text} but cheaper", f"cheaper alternative to {special} {text}"]
        )
    if kind == "question":
        return rng.choice(
            [f"{text} for {special}", f"which {text} for {special}", f"{special} {text}"]
        )
    return text


def draw_product(rng: random.Random, shop: Shop, query: Query, label: int) -> Product:
    """Draws a product that deserves the label beside the query."""
    n = len(query.conditions)
    near = rng.random() < {2: 0.3, 3: 0.5 if n else 1.0}.get(label, 0.0)
    if shop.detailed and label > 1:
        type_name = _offered_type(rng, query, label, near)
        outcomes = _decided_by_few(rng, shop, query, type_name, label)
    else:
        outcomes = _free_outcomes(rng, n, label, near)
        type_name = _offered_type(rng, query, label, near)
    return Product(type_name, _stated(rng, shop, query, type_name, outcomes))


def _free_outcomes(rng: random.Random, n: int, label: int, near: bool) -> list[str]:
    """Any outcomes of n conditions that go with the label."""
    pool: dict[int, tuple[str, ...]] = {4: ("met",), 3: ("met", "unstated")}
    outcomes = [rng.choice(pool.get(label, ("met", "unstated", "conflict"))) for _ in range(n)]
    forced = {2: "conflict", 3: None if near else "unstated"}.get(label)
    if forced and forced not in outcomes:
        outcomes[rng.randrange(n)] = forced
    return outcomes


def _decided_by_few(
    rng: random.Random, shop: Shop, query: Query, type_name: str, label: int
) -> list[str]:
    """Outcomes that go with the label as 2 to 4, most of them met: one suffices to decide."""
    weights = {2: (0.55, 0.15, 0.3), 3: (0.75, 0.25, 0.0), 4: (1.0, 0.0, 0.0)}[label]
    outcomes = rng.choices(("met", "unstated", "conflict"), weights, k=len(query.conditions))
    able = [bool(shop.fitting(type_name, c, "conflict")) for c in query.conditions]
    outcomes = [
        "met" if own == "conflict" and not can else own
        for own, can in zip(outcomes, able, strict=True)
    ]
    if label == 2 and "conflict" not in outcomes:
        outcomes[rng.choice([i for i, can in enumerate(able) if can])] = "conflict"
    if label == 3 and type_name == query.type and "unstated" not in outcomes:
        outcomes[rng.randrange(len(outcomes))] = "unstated"
    return outcomes


def _offered_type(rng: random.Random, query: Query, label: int, near: bool) -> str:
    if label > 1 and not near:
        return query.type
    department, category = CATEGORY[query.type]
    if near:
        return rng.choice(_kin(query.type))
    same = rng.random() < 0.5
    return rng.choice(
        [t for t, (d, c) in CATEGORY.items() if c != category and (d == department) == same]
    )


def _stated(
    rng: random.Random, shop: Shop, query: Query, type_name: str, outcomes: list[str]
) -> dict[str, str]:
    """The attributes a product states, so that each condition comes out as drawn where it can."""
    names = ("brand", *shop.attributes(CATEGORY[type_name][0]))
    asked = {c.attribute for c in query.conditions}
    stated = {}
    for condition, outcome in zip(query.conditions, outcomes, strict=True):
        if fitting := shop.fitting(type_name, condition, outcome):
            stated[condition.attribute] = rng.choice(fitting)
    others = [a for a in names if a not in asked]
    for attribute in rng.sample(others, rng.randint(1, 2)):
        if values := shop.values(type_name, attribute):
            stated[attribute] = rng.choice(values)
    return {a: stated[a] for a in names if a in stated}


def list_product(rng: random.Random, product: Product) -> dict[str, str]:
    """A product's listing: a title, and perhaps a brand, a colour and bullet points beside it."""
    before, after, listing, bullets = [], [], {}, []
    for attribute, value in product.stated.items():
        words = _value_surface(rng, product.type, value)
        aside = rng.random() < 0.3
        if aside and attribute in ("brand", "colour"):
            listing[attribute] = words
        elif aside:
            bullets.append(words)
        else:
            (before if attribute in ("brand", "colour", "material") else after).append(words)
    noun = _surface(rng, product.type, _SYNONYMS[product.type])
    if bullets:
        listing["bullets"] = ", ".join(bullets)
    return {"title": " ".join([*before, noun, *after]), **listing}
