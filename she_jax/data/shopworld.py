"""ShopWorld: a procedural shop where the truth of every step is known, as CLEVR is to vision.

A query names a product type and conditions on it; a product has a type and states some attributes.
The label follows the rule of the public RAIR set: 1 category error, 2 explicit conflict with what
was asked or excluded, 3 right or near category with something asked left unstated, 4 all met.

Supervision comes from two sources, as in life. A *teacher* writes a chain for every pair and is
systematically wrong (``TeacherErrors``); the cold start imitates it. *Human annotation* gives exact
verdicts and labels, without chains; the verifier reads it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from she_jax.cot import CotSchema
from she_jax.data.catalogue import BANDS
from she_jax.data.dataset import ExampleBuilder, ExampleConfig
from she_jax.data.intake import Row
from she_jax.data.pairs import (
    BAND,
    CATEGORY,
    Condition,
    Product,
    Query,
    Shop,
    attributes_verdict,
    category_verdict,
    condition_verdict,
    draw_product,
    draw_query,
    is_doubtful,
    is_longtail,
    label_rule,
    list_product,
    words_hash,
)
from she_jax.types import Example

SPLITS = ("train", "validation", "test", "test_longtail")
CHECKS = (0, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class TeacherErrors:
    """How often the teacher goes wrong, as probabilities a chance.

    Attributes:
      negation: reads "not leather" as "leather", and reasons on from there.
      unstated: takes an asked attribute that the product leaves unstated for met.
      near: takes a near product type for a match.
      price: takes whatever brand is offered for a budget brand.
      likeness: takes values that are alike for others, or the other way round, where the pair of
        them is doubtful (``pairs.is_doubtful``): a hundred beliefs, each to be put right by itself.
        Without checks nothing is alike.
    """

    negation: float = 0.6
    unstated: float = 0.6
    near: float = 0.6
    price: float = 0.6
    likeness: float = 0.6


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
      checks: give each asked attribute a step of its own (``CotSchema.build``), 0, 2, 4 or 8 of
        them. Then queries ask for half as many to so many attributes, of which there are more
        (``DETAILS``), some values stand in for others, and often one condition decides; without
        checks, queries ask for two attributes at most.
      label_first: the label stands before the reasoning.
      errors: the teacher's error rates.
    """

    seed: int = 0
    pairs: tuple[int, int, int, int] = (40_000, 1_000, 2_048, 1_024)
    class_balance: tuple[float, float, float, float] = (0.25, 0.25, 0.25, 0.25)
    annotated: float = 1.0
    coverage: float = 1.0
    chains: str = "teacher"
    checks: int = 0
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
        if self.checks not in CHECKS:
            raise ValueError(f"checks={self.checks}: expected one of {CHECKS}")
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
    schema = CotSchema.build(label_first=world.label_first, checks=world.checks)
    shop = Shop(checks=world.checks, longtail=split == "test_longtail")
    total = world.pairs[SPLITS.index(split)]
    drawn: dict[int, int] = {1: 0, 2: 0, 3: 0, 4: 0}
    while (done := sum(drawn.values())) < total:
        query = draw_query(rng, shop)
        if query is None or _split(query) != split:
            continue
        for i in range(done, min(done + 4, total)):
            label = _label(rng, world.class_balance, drawn, can_conflict=bool(query.conditions))
            product = draw_product(rng, shop, query, label)
            yield _example(world, shop, schema, rng, query, product, f"{split}-{i:06d}")
            drawn[label] += 1


def _split(query: Query) -> str:
    """The split a query belongs to, by its meaning: every wording of it falls into the same one."""
    if any(c.op == "is" and is_longtail(query.type, c.value) for c in query.conditions):
        return "test_longtail"
    draw = words_hash(query.type, *sorted(c.item for c in query.conditions)) % 20
    return "test" if draw < 2 else "validation" if draw == 2 else "train"


def _label(
    rng: random.Random, balance: tuple[float, ...], drawn: dict[int, int], *, can_conflict: bool
) -> int:
    """Draws a class in proportion to what it lacks; 2 needs something asked to conflict with."""
    share = [w / sum(balance) * (sum(drawn.values()) + 8) for w in balance]
    lacking = [max(share[label - 1] - count, 0.0) for label, count in drawn.items()]
    if not can_conflict:
        lacking[1] = 0.0
    return rng.choices((1, 2, 3, 4), lacking if sum(lacking) else (1, 0, 1, 1))[0]


def _truth(shop: Shop, query: Query, product: Product) -> tuple[dict[str, str], int]:
    outcomes = [shop.verdict(c, product.stated.get(c.attribute)) for c in query.conditions]
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
    shop: Shop,
    schema: CotSchema,
    query: Query,
    product: Product,
    errors: TeacherErrors | None = None,
) -> str:
    """A chain for a pair in one of several phrasings: the truth, or what a fallible teacher says.

    Args:
      errors: the teacher's error rates; None for the gold chain.
    """
    slip = errors or TeacherErrors(negation=0, unstated=0, near=0, price=0, likeness=0)
    conditions = [
        c._replace(op="is") if c.op == "not" and rng.random() < slip.negation else c
        for c in query.conditions
    ]
    category = category_verdict(query.type, product.type)
    if category == "near" and rng.random() < slip.near:
        category = "match"
    checks, outcomes = [], []
    for condition in conditions:
        text, outcome = _check(rng, shop, condition, product, slip)
        checks.append(text)
        outcomes.append(outcome)
    attributes = attributes_verdict(outcomes)
    summary = "; ".join(f"{c} {o}" for c, o in zip(checks, outcomes, strict=True))
    texts = {
        "query": rng.choice(["", "wants ", "asks for "])
        + "; ".join([query.type, *(c.item for c in conditions)]),
        "product": rng.choice(["", "offers ", "this is "])
        + "; ".join([product.type, *product.stated.values()]),
        "category": " / ".join(f"{t} in {CATEGORY[t][1]}" for t in (query.type, product.type)),
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
    rng: random.Random, shop: Shop, condition: Condition, product: Product, slip: TeacherErrors
) -> tuple[str, str]:
    """An asked attribute beside the offered one, and the outcome the writer sees.

    Where there are substitutes, how like the two are is also said: a policy that sees many checks
    of one thing learns to compare from that word, not from the outcomes.
    """
    offered = product.stated.get(condition.attribute)
    if offered is None:
        outcome = "met" if rng.random() < slip.unstated else "unstated"
        return f"{condition.item} / none", outcome
    if condition.op == "cheaper":
        band = 0 if rng.random() < slip.price else BAND[offered]
        outcome = "met" if band < BAND[condition.value] else "conflict"
        asked = f"{condition.item} {BANDS[BAND[condition.value]]}"
        return f"{asked} / {offered} {BANDS[band]}", outcome
    pair = (condition.attribute, condition.value, offered)
    alike = shop.likeness(*pair)
    if shop.detailed and is_doubtful(*pair) and rng.random() < slip.likeness:
        alike = "other" if alike == "alike" else "alike"
    text = f"{condition.item} / {offered}" + (f" {alike}" if shop.detailed else "")
    return text, condition_verdict(condition, offered, alike)


def _example(
    world: World,
    shop: Shop,
    schema: CotSchema,
    rng: random.Random,
    query: Query,
    product: Product,
    uid: str,
) -> Example:
    steps, label = _truth(shop, query, product)
    steps = {name: truth for name, truth in steps.items() if name in schema.names}
    rationale = None
    if world.chains != "none":
        errors = world.errors if world.chains == "teacher" else None
        # With checks a chain has a generator of its own: the pairs are the same with any.
        own = random.Random(f"{world.seed}/{uid}") if shop.detailed else rng
        rationale = write_chain(own, shop, schema, query, product, errors)
    listing = list_product(rng, product)
    annotated = tuple(name for name in steps if rng.random() < world.coverage)
    # By the pair's name, not by a draw: the pairs are the same whatever the share.
    seen = not uid.startswith("train") or words_hash(str(world.seed), uid) < world.annotated * 2**32
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
