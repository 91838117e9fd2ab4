"""ShopWorld: a procedural shop where the truth of every step is known, as CLEVR is to vision.

A query names a product type and conditions on it; a product has a type and states some attributes.
The label follows the rule of the public RAIR set: 1 category error, 2 explicit conflict with what
was asked or excluded, 3 right or near category with something asked left unstated, 4 all met.

Supervision comes from two sources, as in life. A *teacher* writes a chain for every pair and is
systematically wrong (``TeacherErrors``); the cold start imitates it. *Human annotation* gives exact
verdicts and labels, without chains; the verifier reads it.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from she_jax.cot import CotSchema
from she_jax.data.catalogue import ATTRIBUTES, BANDS, BRANDS, DEPARTMENTS, NEEDS
from she_jax.data.dataset import ExampleBuilder, ExampleConfig, Row
from she_jax.types import Example

KINDS = ("plain", "attribute", "brand", "negation", "alternative", "question")
SPLITS = ("train", "validation", "test", "test_longtail")
MAX_CONDITIONS = 2


@dataclass(frozen=True, kw_only=True)
class TeacherErrors:
    """How often the teacher goes wrong, as probabilities a chance.

    Attributes:
      negation: reads "not leather" as "leather", and reasons on from there.
      unstated: takes an asked attribute that the product leaves unstated for met.
      near: takes a near product type for a match.
      price: takes whatever brand is offered for a budget brand.
    """

    negation: float = 0.6
    unstated: float = 0.6
    near: float = 0.6
    price: float = 0.6


@dataclass(frozen=True, kw_only=True)
class World:
    """A world: a seed, how many pairs each split has, and who says what about them.

    Attributes:
      seed: all that is random follows from it.
      pairs: pairs a split, in the order of ``SPLITS``.
      class_balance: share of the labels 1 to 4.
      annotated: share of the training pairs that humans looked at; of the others neither label nor
        steps are known.
      coverage: of a pair that they looked at, the probability that they annotated a given step (the
        label always).
      chains: who writes the rationale: ``teacher``, ``gold`` or ``none``.
      checks: give each asked attribute a step of its own (``CotSchema.build(checks=2)``).
      label_first: the label stands before the reasoning.
      errors: the teacher's error rates.
    """

    seed: int = 0
    pairs: tuple[int, int, int, int] = (40_000, 1_000, 2_048, 1_024)
    class_balance: tuple[float, float, float, float] = (0.25, 0.25, 0.25, 0.25)
    annotated: float = 1.0
    coverage: float = 1.0
    chains: str = "teacher"
    checks: bool = False
    label_first: bool = False
    errors: TeacherErrors = field(default_factory=TeacherErrors)

    def __post_init__(self):
        if len(self.pairs) != len(SPLITS) or min(self.pairs) < 0:
            raise ValueError(f"pairs={self.pairs}: expected four counts, for {SPLITS}")
        if (
            len(self.class_balance) != 4
            or min(self.class_balance) < 0
            or not sum(self.class_balance)
        ):
            raise ValueError(
                f"class_balance={self.class_balance}: expected four shares, labels 1-4"
            )
        if self.chains not in ("teacher", "gold", "none"):
            raise ValueError(f"chains={self.chains!r}: expected 'teacher', 'gold' or 'none'")
        rates = {"annotated": self.annotated, "coverage": self.coverage, **vars(self.errors)}
        if bad := {name: rate for name, rate in rates.items() if not 0 <= rate <= 1}:
            raise ValueError(f"{bad}: expected probabilities in [0, 1]")


@dataclass(kw_only=True, eq=False)
class ShopWorldConfig(ExampleConfig):
    """The options of the builder: the world."""

    world: World = field(default_factory=World)


class ShopWorld(ExampleBuilder):
    """A procedural shop with exact step truth, a fallible teacher and human annotation."""

    builder_config: ShopWorldConfig

    def rows(self) -> Iterator[Row]:
        """Every pair of every split; see ``generate``."""
        for split in SPLITS:
            for example in generate(self.builder_config.world, split):
                yield Row(split=split, example=example)


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


_CATEGORY = {
    name: (department, category)
    for department, categories in DEPARTMENTS.items()
    for category, types in categories.items()
    for name in types
}
_TYPES = tuple(_CATEGORY)
_SYNONYMS = {
    name: words
    for categories in DEPARTMENTS.values()
    for types in categories.values()
    for name, words in types.items()
}
_BAND = {brand: band for brands in BRANDS.values() for brand, band in brands.items()}
_LONGTAIL_SHARE = 16  # one combination of type and value in so many is kept from training


def generate(world: World, split: str) -> Iterator[Example]:
    """The pairs of a split, the same for the same world.

    No query, however it is worded, is in two splits. ``test_longtail`` asks for combinations of
    product type and attribute value that occur neither in queries nor in products of the others.

    Raises:
      ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {SPLITS}")
    rng = random.Random(f"{world.seed}/{split}")
    schema = CotSchema.build(
        label_first=world.label_first, checks=MAX_CONDITIONS if world.checks else 0
    )
    total = world.pairs[SPLITS.index(split)]
    drawn: dict[int, int] = {1: 0, 2: 0, 3: 0, 4: 0}
    while (done := sum(drawn.values())) < total:
        query = _query(rng, split == "test_longtail")
        if query is None or _split(query) != split:
            continue
        for i in range(done, min(done + 4, total)):
            label = _label(rng, world.class_balance, drawn, can_conflict=bool(query.conditions))
            product = _product(rng, query, label, split == "test_longtail")
            yield _example(world, schema, rng, query, product, f"{split}-{i:06d}")
            drawn[label] += 1


def category_verdict(asked: str, offered: str) -> str:
    """match for the same product type, near within a category, else mismatch."""
    if asked == offered:
        return "match"
    return "near" if _CATEGORY[asked] == _CATEGORY[offered] else "mismatch"


def condition_verdict(condition: Condition, offered: str | None) -> str:
    """met, unstated or conflict, for what a product states of the condition's attribute."""
    if offered is None:
        return "unstated"
    if condition.op == "cheaper":
        return "met" if _BAND[offered] < _BAND[condition.value] else "conflict"
    return "met" if (offered == condition.value) == (condition.op == "is") else "conflict"


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


def _hash(*words: str) -> int:
    return int.from_bytes(hashlib.blake2b("|".join(words).encode(), digest_size=4).digest(), "big")


def _is_longtail(type_name: str, value: str) -> bool:
    return _hash(type_name, value) % _LONGTAIL_SHARE == 0


def _split(query: Query) -> str:
    """The split a query belongs to, by its meaning: every wording of it falls into the same one."""
    if any(c.op == "is" and _is_longtail(query.type, c.value) for c in query.conditions):
        return "test_longtail"
    draw = _hash(query.type, *sorted(c.item for c in query.conditions)) % 20
    return "test" if draw < 2 else "validation" if draw == 2 else "train"


def _values(type_name: str, attribute: str, longtail: bool) -> list[str]:
    department = _CATEGORY[type_name][0]
    values = BRANDS[department] if attribute == "brand" else ATTRIBUTES[department][attribute]
    return [v for v in values if longtail or not _is_longtail(type_name, v)]


def _query(rng: random.Random, longtail: bool) -> Query | None:
    """Draws a query, or None where the type has no value to ask for."""
    kind, type_name = rng.choice(KINDS), rng.choice(_TYPES)
    department = _CATEGORY[type_name][0]
    names = list(ATTRIBUTES[department])
    rng.shuffle(names)
    conditions: list[Condition] = []
    need = ""
    if kind == "brand":
        names.insert(0, "brand")
    if kind == "alternative":
        dearer = [b for b in _values(type_name, "brand", longtail) if _BAND[b] > 0]
        if not dearer:
            return None
        conditions.append(Condition("brand", "cheaper", rng.choice(dearer)))
    if kind == "question":
        need, (attribute, value) = rng.choice(list(NEEDS[department].items()))
        conditions.append(Condition(attribute, "is", value))
        names.remove(attribute)
    if kind == "negation":
        attribute = "material" if "material" in names and rng.random() < 0.7 else "colour"
        values = _values(type_name, attribute, longtail)
        conditions.append(Condition(attribute, "not", rng.choice(values)))
        names.remove(attribute)
    wanted = {"plain": 0, "attribute": rng.randint(1, 2), "brand": rng.randint(1, 2)}
    for attribute in names[: wanted.get(kind, rng.random() < 0.3)]:
        if values := _values(type_name, attribute, longtail):
            conditions.append(Condition(attribute, "is", rng.choice(values)))
    if longtail and not any(_is_longtail(type_name, c.value) for c in conditions):
        return None
    text = _word_query(rng, kind, type_name, conditions, need)
    return Query(kind, department, type_name, tuple(conditions), text)


def _surface(rng: random.Random, name: str, synonyms: tuple[str, ...]) -> str:
    return name if not synonyms or rng.random() < 0.6 else rng.choice(synonyms)


def _value_surface(rng: random.Random, type_name: str, attribute: str, value: str) -> str:
    if attribute == "brand":
        return value
    return _surface(rng, value, ATTRIBUTES[_CATEGORY[type_name][0]][attribute][value])


def _word_query(
    rng: random.Random, kind: str, type_name: str, conditions: list[Condition], need: str
) -> str:
    """Puts a query into words."""
    noun = _surface(rng, type_name, _SYNONYMS[type_name])
    special, plain = conditions[:1], conditions[1:]
    if kind in ("plain", "attribute", "brand"):
        special, plain = [], conditions
    words = [_value_surface(rng, type_name, c.attribute, c.value) for c in plain]
    if kind == "brand":
        text = " ".join([words[0], *([words[1]] if len(words) > 1 else []), noun])
    else:
        text = " ".join([*words, noun])
        if words and rng.random() < 0.4:
            text = " ".join([noun, *words])
    if kind == "negation":
        value = _value_surface(rng, type_name, special[0].attribute, special[0].value)
        return rng.choice([f"{text} not {value}", f"{text} without {value}", f"non {value} {text}"])
    if kind == "alternative":
        brand = special[0].value
        return rng.choice(
            [f"like {brand} {text} but cheaper", f"cheaper alternative to {brand} {text}"]
        )
    if kind == "question":
        return rng.choice([f"{text} for {need}", f"which {text} for {need}", f"{need} {text}"])
    return text


def _label(
    rng: random.Random, balance: tuple[float, ...], drawn: dict[int, int], *, can_conflict: bool
) -> int:
    """Draws a class in proportion to what it lacks; 2 needs something asked to conflict with."""
    share = [w / sum(balance) * (sum(drawn.values()) + 8) for w in balance]
    lacking = [max(share[label - 1] - count, 0.0) for label, count in drawn.items()]
    if not can_conflict:
        lacking[1] = 0.0
    return rng.choices((1, 2, 3, 4), lacking if sum(lacking) else (1, 0, 1, 1))[0]


def _product(rng: random.Random, query: Query, label: int, longtail: bool) -> Product:
    """Draws a product that deserves the label beside the query."""
    n = len(query.conditions)
    near = rng.random() < {2: 0.3, 3: 0.5 if n else 1.0}.get(label, 0.0)
    pool: dict[int, tuple[str, ...]] = {4: ("met",), 3: ("met", "unstated")}
    outcomes = [rng.choice(pool.get(label, ("met", "unstated", "conflict"))) for _ in range(n)]
    forced = {2: "conflict", 3: None if near else "unstated"}.get(label)
    if forced and forced not in outcomes:
        outcomes[rng.randrange(n)] = forced
    type_name = _offered_type(rng, query, label, near)
    return Product(type_name, _stated(rng, query, type_name, outcomes, longtail))


def _offered_type(rng: random.Random, query: Query, label: int, near: bool) -> str:
    if label > 1 and not near:
        return query.type
    department, category = _CATEGORY[query.type]
    if near:
        return rng.choice([t for t in DEPARTMENTS[department][category] if t != query.type])
    same = rng.random() < 0.5
    return rng.choice(
        [t for t, (d, c) in _CATEGORY.items() if c != category and (d == department) == same]
    )


def _stated(
    rng: random.Random, query: Query, type_name: str, outcomes: list[str], longtail: bool
) -> dict[str, str]:
    """The attributes a product states, so that each condition comes out as drawn where it can."""
    department = _CATEGORY[type_name][0]
    asked = {c.attribute for c in query.conditions}
    stated = {}
    for condition, outcome in zip(query.conditions, outcomes, strict=True):
        known = condition.attribute == "brand" or condition.attribute in ATTRIBUTES[department]
        values = _values(type_name, condition.attribute, longtail) if known else []
        fitting = [v for v in values if condition_verdict(condition, v) == outcome]
        if fitting:
            stated[condition.attribute] = rng.choice(fitting)
    others = [a for a in ("brand", *ATTRIBUTES[department]) if a not in asked]
    for attribute in rng.sample(others, rng.randint(1, 2)):
        if values := _values(type_name, attribute, longtail):
            stated[attribute] = rng.choice(values)
    return {a: stated[a] for a in ("brand", *ATTRIBUTES[department]) if a in stated}


def _fields(rng: random.Random, product: Product) -> dict[str, str]:
    """A product's listing: a title, and perhaps a brand, a colour and bullet points beside it."""
    before, after, listing, bullets = [], [], {}, []
    for attribute, value in product.stated.items():
        words = _value_surface(rng, product.type, attribute, value)
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


def _truth(query: Query, product: Product) -> tuple[dict[str, str], int]:
    outcomes = [condition_verdict(c, product.stated.get(c.attribute)) for c in query.conditions]
    category, attributes = category_verdict(query.type, product.type), attributes_verdict(outcomes)
    steps = {
        "query": "; ".join([query.type, *(c.item for c in query.conditions)]),
        "product": "; ".join([product.type, *product.stated.values()]),
        "category": category,
        "attributes": attributes,
    }
    return steps | _numbered(outcomes), label_rule(category, attributes)


def _numbered(outcomes: list[str]) -> dict[str, str]:
    return {f"check_{i + 1}": outcome for i, outcome in enumerate(outcomes)}


def write_chain(
    rng: random.Random,
    schema: CotSchema,
    query: Query,
    product: Product,
    errors: TeacherErrors | None = None,
) -> str:
    """A chain for a pair in one of several phrasings: the truth, or what a fallible teacher says.

    Args:
      errors: the teacher's error rates; None for the gold chain.
    """
    slip = errors or TeacherErrors(negation=0, unstated=0, near=0, price=0)
    conditions = [
        c._replace(op="is") if c.op == "not" and rng.random() < slip.negation else c
        for c in query.conditions
    ]
    category = category_verdict(query.type, product.type)
    if category == "near" and rng.random() < slip.near:
        category = "match"
    checks, outcomes = [], []
    for condition in conditions:
        text, outcome = _check(rng, condition, product, slip)
        checks.append(text)
        outcomes.append(outcome)
    attributes = attributes_verdict(outcomes)
    summary = "; ".join(f"{c} {o}" for c, o in zip(checks, outcomes, strict=True))
    texts = {
        "query": rng.choice(["", "wants ", "asks for "])
        + "; ".join([query.type, *(c.item for c in conditions)]),
        "product": rng.choice(["", "offers ", "this is "])
        + "; ".join([product.type, *product.stated.values()]),
        "category": " / ".join(f"{t} in {_CATEGORY[t][1]}" for t in (query.type, product.type)),
        "attributes": summary or "nothing asked",
    }
    verdicts = {
        "category": category,
        "attributes": attributes,
        "label": str(label_rule(category, attributes)),
    }
    if "check_1" in schema.names:
        texts |= {f"check_{i + 1}": text for i, text in enumerate(checks)}
        verdicts |= _numbered(outcomes)
        del texts["attributes"]
    return schema.write(texts, verdicts)


def _check(
    rng: random.Random, condition: Condition, product: Product, slip: TeacherErrors
) -> tuple[str, str]:
    """An asked attribute beside the offered one, and the outcome the writer sees."""
    offered = product.stated.get(condition.attribute)
    outcome = condition_verdict(condition, offered)
    if offered is None:
        outcome = "met" if rng.random() < slip.unstated else outcome
        return f"{condition.item} / none", outcome
    if condition.op == "cheaper":
        band = 0 if rng.random() < slip.price else _BAND[offered]
        outcome = "met" if band < _BAND[condition.value] else "conflict"
        asked = f"{condition.item} {BANDS[_BAND[condition.value]]}"
        return f"{asked} / {offered} {BANDS[band]}", outcome
    return f"{condition.item} / {offered}", outcome


def _example(
    world: World,
    schema: CotSchema,
    rng: random.Random,
    query: Query,
    product: Product,
    uid: str,
) -> Example:
    steps, label = _truth(query, product)
    steps = {name: truth for name, truth in steps.items() if name in schema.names}
    rationale = None
    if world.chains != "none":
        errors = world.errors if world.chains == "teacher" else None
        rationale = write_chain(rng, schema, query, product, errors)
    listing = _fields(rng, product)
    annotated = tuple(name for name in steps if rng.random() < world.coverage)
    # By the pair's name, not by a draw: the pairs are the same whatever the share.
    seen = not uid.startswith("train") or _hash(str(world.seed), uid) < world.annotated * 2**32
    return Example(
        uid=uid,
        query=query.text,
        product=listing,
        label=label if seen else None,
        steps=steps,
        kind=query.kind,
        annotations=annotated if seen else (),
        rationale=rationale,
    )
