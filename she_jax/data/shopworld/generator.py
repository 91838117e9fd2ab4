"""ShopWorld's queries and products: their types, their ground-truth verdicts and their sampling.

A shop with checks also has the attributes ``DETAILS``. There one value may substitute for another
(``likeness``), which a policy has to know, and often one condition decides the label.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from she_jax.data.shopworld.catalogue import (
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
    name: synonyms
    for categories in DEPARTMENTS.values()
    for types in categories.values()
    for name, synonyms in types.items()
}
_ALL_ATTRIBUTES = {name: ATTRIBUTES[name] | DETAILS[name] for name in DEPARTMENTS}
_VALUE_SYNONYMS = {
    department: {v: synonyms for values in attributes.values() for v, synonyms in values.items()}
    for department, attributes in _ALL_ATTRIBUTES.items()
}
_LONGTAIL_MODULUS = 16  # 1 in 16 combinations of type and value is held out from training
_ALIKE_MODULUS = 3  # 1 in 3 pairs of values is alike
_DOUBTFUL_MODULUS = 2  # 1 in 2 pairs of values is doubtful to a fallible teacher


class Condition(NamedTuple):
    """A query's condition: ``op`` is ``is``, ``not`` or ``cheaper`` (than the brand ``value``)."""

    attribute: str
    op: str
    value: str

    @property
    def item(self) -> str:
        """The condition in canonical words."""
        prefixes = {"is": "", "not": "not ", "cheaper": "cheaper than "}
        return prefixes[self.op] + self.value


class Query(NamedTuple):
    """A query: its kind, product type and conditions, and its text."""

    kind: str
    department: str
    type: str
    conditions: tuple[Condition, ...]
    text: str


class Product(NamedTuple):
    """A product: its type, and the canonical values of the attributes it states."""

    type: str
    stated: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Shop:
    """The attributes, values and conditions that occur in a split.

    Attributes:
      checks: number of steps of a chain that check one condition each. It is also the largest
        number of conditions of a query, which is two if ``checks`` is 0.
      longtail: includes the combinations of type and value that are held out from training.
    """

    checks: int
    longtail: bool

    @property
    def detailed(self) -> bool:
        """Whether the shop has checks, and with them ``DETAILS`` and substitutes."""
        return self.checks > 0

    def attributes(self, department: str) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
        """The attributes of a department, without the brand."""
        return (_ALL_ATTRIBUTES if self.detailed else ATTRIBUTES)[department]

    def values(self, type_name: str, attribute: str) -> list[str]:
        """The values of an attribute that occur with a product type."""
        department = CATEGORY[type_name][0]
        is_brand = attribute == "brand"
        values = BRANDS[department] if is_brand else self.attributes(department)[attribute]
        return [v for v in values if self.longtail or not is_longtail(type_name, v)]

    @cache  # noqa: B019  shops are hashable values, and only eight exist
    def fitting(self, type_name: str, condition: Condition, outcome: str) -> tuple[str, ...]:
        """The values with which a product of a type gives a condition this outcome."""
        attribute, known = condition.attribute, self.attributes(CATEGORY[type_name][0])
        values = self.values(type_name, attribute) if attribute in ("brand", *known) else []
        return tuple(v for v in values if self.verdict(condition, v) == outcome)

    def likeness(self, attribute: str, requested: str, offered: str) -> str:
        """same, alike or other; alike only in a shop with substitutes."""
        if self.detailed:
            return likeness(attribute, requested, offered)
        return "same" if requested == offered else "other"

    def verdict(self, condition: Condition, offered: str | None) -> str:
        """met, unstated or conflict, given the value a product states (None if it states none)."""
        if offered is None:
            return "unstated"
        relation = self.likeness(condition.attribute, condition.value, offered)
        return condition_verdict(condition, offered, relation)

    def askable(self, type_name: str, attribute: str, op: str) -> list[Condition]:
        """The conditions on an attribute that every type of the category can meet."""
        conditions = [Condition(attribute, op, v) for v in self.values(type_name, attribute)]
        types = [type_name, *_sibling_types(type_name)]
        return [c for c in conditions if all(self.fitting(t, c, "met") for t in types)]


def category_verdict(requested: str, offered: str) -> str:
    """match for the same product type, near within a category, else mismatch."""
    if requested == offered:
        return "match"
    return "near" if CATEGORY[requested] == CATEGORY[offered] else "mismatch"


def likeness(attribute: str, requested: str, offered: str) -> str:
    """same, alike (a shopper who requests one value accepts the other) or other.

    Which values are alike follows no rule. A policy has to know it, as with ESCI's substitutes.
    """
    if requested == offered:
        return "same"
    if attribute not in SUBSTITUTED:
        return "other"
    pair = sorted((requested, offered))
    return "other" if words_hash("alike", *pair) % _ALIKE_MODULUS else "alike"


def is_doubtful(attribute: str, requested: str, offered: str) -> bool:
    """Whether a fallible teacher may be wrong about the likeness of two values."""
    pair = sorted((requested, offered))
    certain = requested == offered or attribute not in SUBSTITUTED
    return not certain and words_hash("doubtful", *pair) % _DOUBTFUL_MODULUS == 0


def condition_verdict(condition: Condition, offered: str, relation: str) -> str:
    """met or conflict, given the offered value and its likeness to the requested one."""
    if condition.op == "cheaper":
        return "met" if BAND[offered] < BAND[condition.value] else "conflict"
    return "met" if (relation != "other") == (condition.op == "is") else "conflict"


def attributes_verdict(outcomes: list[str]) -> str:
    """The worst of the conditions' outcomes; met without conditions."""
    return next((v for v in ("conflict", "unstated") if v in outcomes), "met")


def label_rule(category: str, attributes: str) -> int:
    """The relevance class that follows from the two verdicts (RAIR's rule)."""
    if category == "mismatch":
        return 1
    if attributes == "conflict":
        return 2
    return 4 if (category, attributes) == ("match", "met") else 3


def words_hash(*words: str) -> int:
    """A 32-bit hash of the words, the same in every process."""
    return int.from_bytes(hashlib.blake2b("|".join(words).encode(), digest_size=4).digest(), "big")


@cache
def is_longtail(type_name: str, value: str) -> bool:
    """Whether a combination of product type and value is held out from training."""
    return words_hash(type_name, value) % _LONGTAIL_MODULUS == 0


def draw_query(rng: random.Random, shop: Shop) -> Query | None:
    """Draws a query; None if the drawn kind and type admit no suitable conditions."""
    kind, type_name = rng.choice(KINDS), rng.choice(_TYPES)
    department = CATEGORY[type_name][0]
    names = list(shop.attributes(department))
    rng.shuffle(names)
    if kind == "brand":
        names.insert(0, "brand")
    draw_conditions = _draw_many_conditions if shop.detailed else _draw_few_conditions
    if (conditions_and_need := draw_conditions(rng, shop, kind, type_name, names)) is None:
        return None
    conditions, need = conditions_and_need
    if shop.longtail and not any(is_longtail(type_name, c.value) for c in conditions):
        return None
    verbalize = _verbalize_many if shop.detailed else _verbalize_few
    text = verbalize(rng, kind, type_name, conditions, need)
    return Query(kind, department, type_name, tuple(conditions), text)


def _draw_few_conditions(
    rng: random.Random, shop: Shop, kind: str, type_name: str, names: list[str]
) -> tuple[list[Condition], str] | None:
    """Draws up to two conditions, the one specific to the kind first, and the need if named."""
    conditions: list[Condition] = []
    need = ""
    if kind == "alternative":
        pricier = [b for b in shop.values(type_name, "brand") if BAND[b] > 0]
        if not pricier:
            return None
        conditions.append(Condition("brand", "cheaper", rng.choice(pricier)))
    if kind == "question":
        need, (attribute, value) = rng.choice(list(NEEDS[CATEGORY[type_name][0]].items()))
        conditions.append(Condition(attribute, "is", value))
        names.remove(attribute)
    if kind == "negation":
        attribute = "material" if "material" in names and rng.random() < 0.7 else "colour"
        values = shop.values(type_name, attribute)
        conditions.append(Condition(attribute, "not", rng.choice(values)))
        names.remove(attribute)
    counts = {"plain": 0, "attribute": rng.randint(1, 2), "brand": rng.randint(1, 2)}
    for attribute in names[: counts.get(kind, rng.random() < 0.3)]:
        if values := shop.values(type_name, attribute):
            conditions.append(Condition(attribute, "is", rng.choice(values)))
    return conditions, need


def _draw_many_conditions(
    rng: random.Random, shop: Shop, kind: str, type_name: str, names: list[str]
) -> tuple[list[Condition], str] | None:
    """As ``_draw_few_conditions``, but ``checks // 2`` to ``checks``, in the order of the text."""
    count = 0 if kind == "plain" else rng.randint(shop.checks // 2, shop.checks)
    conditions: list[Condition] = []
    need = ""
    if kind == "alternative":
        candidates = shop.askable(type_name, "brand", "cheaper")
        if not candidates:
            return None
        conditions.append(rng.choice(candidates))
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
        if candidates := shop.askable(type_name, attribute, "not" if excluded else "is"):
            conditions.append(rng.choice(candidates))
    rejected = len(conditions) < count or (kind == "brand" and conditions[0].attribute != "brand")
    # Label 2 needs, for every type of the category, a condition that it can conflict with.
    rejected |= count > 0 and not all(
        any(shop.fitting(name, c, "conflict") for c in conditions)
        for name in (type_name, *_sibling_types(type_name))
    )
    conditions.sort(key=lambda c: c.op == "not")
    return None if rejected else (conditions, need)


def _sibling_types(type_name: str) -> list[str]:
    """The other types of a type's category."""
    department, category = CATEGORY[type_name]
    return [t for t in DEPARTMENTS[department][category] if t != type_name]


def _name_or_synonym(rng: random.Random, name: str, synonyms: tuple[str, ...]) -> str:
    return name if not synonyms or rng.random() < 0.6 else rng.choice(synonyms)


def _verbalize_value(rng: random.Random, type_name: str, value: str) -> str:
    return _name_or_synonym(rng, value, _VALUE_SYNONYMS[CATEGORY[type_name][0]].get(value, ()))


def _verbalize_few(
    rng: random.Random, kind: str, type_name: str, conditions: list[Condition], need: str
) -> str:
    """Writes the text of a query with up to two conditions."""
    noun = _name_or_synonym(rng, type_name, _SYNONYMS[type_name])
    special, plain = conditions[:1], conditions[1:]
    if kind in ("plain", "attribute", "brand"):
        special, plain = [], conditions
    words = [_verbalize_value(rng, type_name, c.value) for c in plain]
    text = " ".join([*words, noun])
    if kind != "brand" and words and rng.random() < 0.4:
        text = " ".join([noun, *words])
    if kind == "negation":
        value = _verbalize_value(rng, type_name, special[0].value)
        return rng.choice([f"{text} not {value}", f"{text} without {value}", f"non {value} {text}"])
    return _add_brand_or_need(rng, kind, text, need or (special[0].value if special else ""))


def _verbalize_many(
    rng: random.Random, kind: str, type_name: str, conditions: list[Condition], need: str
) -> str:
    """Writes the text of a query with many conditions.

    Required values stand on both sides of the product type, then come the excluded ones. A brand or
    a need is worked in last.
    """
    noun = _name_or_synonym(rng, type_name, _SYNONYMS[type_name])
    special, plain = (conditions[0].value, conditions[1:]) if conditions else ("", [])
    if kind not in ("alternative", "question"):
        plain = conditions
    words = [_verbalize_value(rng, type_name, c.value) for c in plain if c.op == "is"]
    position = rng.randint(0, len(words))
    words.insert(position, noun)
    for condition in plain:
        if condition.op == "not":
            words.append(rng.choice(["not", "without"]))
            words.append(_verbalize_value(rng, type_name, condition.value))
    return _add_brand_or_need(rng, kind, " ".join(words), need or special)


def _add_brand_or_need(rng: random.Random, kind: str, text: str, special: str) -> str:
    """Adds the brand to undercut, or the need, to the text of a query."""
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
    """Draws a product that has the given label for the query."""
    n = len(query.conditions)
    near = rng.random() < {2: 0.3, 3: 0.5 if n else 1.0}.get(label, 0.0)
    if shop.detailed and label > 1:
        type_name = _draw_product_type(rng, query, label, near)
        outcomes = _draw_mostly_met_outcomes(rng, shop, query, type_name, label)
    else:
        outcomes = _draw_outcomes(rng, n, label, near)
        type_name = _draw_product_type(rng, query, label, near)
    return Product(type_name, _draw_attributes(rng, shop, query, type_name, outcomes))


def _draw_outcomes(rng: random.Random, n: int, label: int, near: bool) -> list[str]:
    """Draws outcomes of n conditions that are consistent with the label."""
    allowed: dict[int, tuple[str, ...]] = {4: ("met",), 3: ("met", "unstated")}
    outcomes = [rng.choice(allowed.get(label, ("met", "unstated", "conflict"))) for _ in range(n)]
    required = {2: "conflict", 3: None if near else "unstated"}.get(label)
    if required and required not in outcomes:
        outcomes[rng.randrange(n)] = required
    return outcomes


def _draw_mostly_met_outcomes(
    rng: random.Random, shop: Shop, query: Query, type_name: str, label: int
) -> list[str]:
    """Draws outcomes consistent with a label of 2 to 4, most of them met, so that few decide."""
    weights = {2: (0.55, 0.15, 0.3), 3: (0.75, 0.25, 0.0), 4: (1.0, 0.0, 0.0)}[label]
    outcomes = rng.choices(("met", "unstated", "conflict"), weights, k=len(query.conditions))
    can_conflict = [bool(shop.fitting(type_name, c, "conflict")) for c in query.conditions]
    outcomes = [
        "met" if outcome == "conflict" and not can else outcome
        for outcome, can in zip(outcomes, can_conflict, strict=True)
    ]
    if label == 2 and "conflict" not in outcomes:
        outcomes[rng.choice([i for i, can in enumerate(can_conflict) if can])] = "conflict"
    if label == 3 and type_name == query.type and "unstated" not in outcomes:
        outcomes[rng.randrange(len(outcomes))] = "unstated"
    return outcomes


def _draw_product_type(rng: random.Random, query: Query, label: int, near: bool) -> str:
    if label > 1 and not near:
        return query.type
    department, category = CATEGORY[query.type]
    if near:
        return rng.choice(_sibling_types(query.type))
    same = rng.random() < 0.5
    return rng.choice(
        [t for t, (d, c) in CATEGORY.items() if c != category and (d == department) == same]
    )


def _draw_attributes(
    rng: random.Random, shop: Shop, query: Query, type_name: str, outcomes: list[str]
) -> dict[str, str]:
    """Draws a product's stated attributes, which give each condition its outcome if possible."""
    names = ("brand", *shop.attributes(CATEGORY[type_name][0]))
    requested = {c.attribute for c in query.conditions}
    stated = {}
    for condition, outcome in zip(query.conditions, outcomes, strict=True):
        if fitting := shop.fitting(type_name, condition, outcome):
            stated[condition.attribute] = rng.choice(fitting)
    others = [a for a in names if a not in requested]
    for attribute in rng.sample(others, rng.randint(1, 2)):
        if values := shop.values(type_name, attribute):
            stated[attribute] = rng.choice(values)
    return {a: stated[a] for a in names if a in stated}


def list_product(rng: random.Random, product: Product) -> dict[str, str]:
    """A product's listing by field name: a title, and possibly a brand, a color and bullets."""
    before_noun, after_noun, fields, bullets = [], [], {}, []
    for attribute, value in product.stated.items():
        words = _verbalize_value(rng, product.type, value)
        outside_title = rng.random() < 0.3
        if outside_title and attribute in ("brand", "colour"):
            fields[attribute] = words
        elif outside_title:
            bullets.append(words)
        elif attribute in ("brand", "colour", "material"):
            before_noun.append(words)
        else:
            after_noun.append(words)
    noun = _name_or_synonym(rng, product.type, _SYNONYMS[product.type])
    if bullets:
        fields["bullets"] = ", ".join(bullets)
    return {"title": " ".join([*before_noun, noun, *after_noun]), **fields}
