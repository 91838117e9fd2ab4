"""ShopWorld: a procedural data set with ground truth for every step, as CLEVR is for vision.

A query names a product type and conditions on its attributes. A product has a type and states some
attributes. The label follows the rule of the public RAIR set: 1 category error, 2 explicit conflict
with a condition, 3 near category or a condition on an unstated attribute, 4 all met.

Supervision comes from two sources. A *teacher* writes a chain for every pair and makes systematic
errors (``TeacherErrors``). The cold start imitates it. *Human annotation* gives exact verdicts and
labels, without chains. The verifier reads it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from she_jax.cot import CotSchema
from she_jax.data.dataset import ExampleBuilder, ExampleConfig
from she_jax.data.intake import Row
from she_jax.data.shopworld.catalogue import BANDS
from she_jax.data.shopworld.generator import (
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
    """The teacher's error rates: probabilities in [0, 1], each per opportunity for the error.

    Attributes:
      negation: reads "not leather" as "leather" and continues from there.
      unstated: counts a condition as met although the product leaves its attribute unstated.
      near: counts a near product type as a match.
      price: counts any offered brand as a budget brand.
      likeness: confuses alike values with unlike ones if the pair is doubtful
        (``pairs.is_doubtful``). These are about a hundred separate beliefs, each corrected
        individually. No effect without checks, where no values are alike.
    """

    negation: float = 0.6
    unstated: float = 0.6
    near: float = 0.6
    price: float = 0.6
    likeness: float = 0.6


@dataclass(frozen=True, kw_only=True)
class World:
    """Configuration of a world: its seed, its size and the supervision of its pairs.

    Attributes:
      seed: determines everything random.
      pairs: number of pairs in each split, in the order of ``SPLITS``.
      class_balance: shares of the labels 1 to 4.
      annotated: share of the training pairs that are annotated; neither label nor steps of the
        others are known.
      coverage: probability that a step of an annotated pair is annotated; its label always is.
      chains: source of the rationales: ``teacher``, ``gold`` or ``none``.
      checks: number of steps that check one condition each (``CotSchema.build``): 0, 2, 4 or 8.
        With checks, a query has ``checks // 2`` to ``checks`` conditions on a larger set of
        attributes (``DETAILS``), some values are substitutes for others, and often one condition
        decides the label. Without checks, a query has at most two conditions.
      label_first: the chain gives the label before the reasoning.
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
        if [isinstance(n, int) and n >= 0 for n in self.pairs] != [True] * len(SPLITS):
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
    """Options of the ``ShopWorld`` builder: the world."""

    world: World = field(default_factory=World)


class ShopWorld(ExampleBuilder):
    """A procedural shop with ground truth of every step, a fallible teacher and annotations."""

    builder_config: ShopWorldConfig

    def rows(self) -> Iterator[Row]:
        """Yields every pair of every split; see ``generate``."""
        for split in SPLITS:
            for example in generate(self.builder_config.world, split):
                yield Row(split=split, example=example)


def generate(world: World, split: str) -> Iterator[Example]:
    """Yields the pairs of a split, deterministically for a given world.

    No query, in any wording, is in two splits. The queries of ``test_longtail`` combine product
    types and attribute values that occur together in no query or product of the other splits.

    Raises:
      ValueError: if the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {SPLITS}")
    rng = random.Random(f"{world.seed}/{split}")
    schema = CotSchema.build(label_first=world.label_first, checks=world.checks)
    shop = Shop(checks=world.checks, longtail=split == "test_longtail")
    total = world.pairs[SPLITS.index(split)]
    counts: dict[int, int] = {1: 0, 2: 0, 3: 0, 4: 0}
    while (start := sum(counts.values())) < total:
        query = draw_query(rng, shop)
        if query is None or _split_of(query) != split:
            continue
        for i in range(start, min(start + 4, total)):
            can_conflict = bool(query.conditions)
            label = _draw_label(rng, world.class_balance, counts, can_conflict=can_conflict)
            product = draw_product(rng, shop, query, label)
            yield _make_example(world, shop, schema, rng, query, product, f"{split}-{i:06d}")
            counts[label] += 1


def _split_of(query: Query) -> str:
    """The split of a query, by its meaning: all wordings of a query fall into the same split."""
    if any(c.op == "is" and is_longtail(query.type, c.value) for c in query.conditions):
        return "test_longtail"
    bucket = words_hash(query.type, *sorted(c.item for c in query.conditions)) % 20
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


def _draw_label(
    rng: random.Random, balance: tuple[float, ...], counts: dict[int, int], *, can_conflict: bool
) -> int:
    """Draws a label in proportion to its shortfall; 2 needs a condition to conflict with."""
    targets = [w / sum(balance) * (sum(counts.values()) + 8) for w in balance]
    shortfalls = [max(targets[label - 1] - count, 0.0) for label, count in counts.items()]
    if not can_conflict:
        shortfalls[1] = 0.0
    return rng.choices((1, 2, 3, 4), shortfalls if sum(shortfalls) else (1, 0, 1, 1))[0]


def _ground_truth(shop: Shop, query: Query, product: Product) -> tuple[dict[str, str], int]:
    outcomes = [shop.verdict(c, product.stated.get(c.attribute)) for c in query.conditions]
    category, attributes = category_verdict(query.type, product.type), attributes_verdict(outcomes)
    steps = {
        "query": "; ".join([query.type, *(c.item for c in query.conditions)]),
        "product": "; ".join([product.type, *product.stated.values()]),
        "category": category,
        "attributes": attributes,
    }
    return steps | _check_verdicts(outcomes), label_rule(category, attributes)


def _check_verdicts(outcomes: list[str]) -> dict[str, str]:
    return {f"check_{i + 1}": outcome for i, outcome in enumerate(outcomes)}


def write_chain(
    rng: random.Random,
    shop: Shop,
    schema: CotSchema,
    query: Query,
    product: Product,
    errors: TeacherErrors | None = None,
) -> str:
    """Writes a chain for a pair, gold or with a teacher's errors, in one of several phrasings.

    Args:
      rng: source of the phrasing and the errors.
      errors: the teacher's error rates; None for the gold chain.
    """
    rates = errors or TeacherErrors(negation=0, unstated=0, near=0, price=0, likeness=0)
    conditions = [
        c._replace(op="is") if c.op == "not" and rng.random() < rates.negation else c
        for c in query.conditions
    ]
    category = category_verdict(query.type, product.type)
    if category == "near" and rng.random() < rates.near:
        category = "match"
    checks, outcomes = [], []
    for condition in conditions:
        text, outcome = _write_check(rng, shop, condition, product, rates)
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
        verdicts |= _check_verdicts(outcomes)
        del texts["attributes"]
    return schema.write(texts, verdicts)


def _write_check(
    rng: random.Random, shop: Shop, condition: Condition, product: Product, rates: TeacherErrors
) -> tuple[str, str]:
    """The text of a check (requested / offered value) and the outcome the writer concludes.

    With substitutes, the text also gives the likeness of the two values. A policy that sees many
    checks of a pair of values learns the comparison from that word, not from the outcomes.
    """
    offered = product.stated.get(condition.attribute)
    if offered is None:
        outcome = "met" if rng.random() < rates.unstated else "unstated"
        return f"{condition.item} / none", outcome
    if condition.op == "cheaper":
        band = 0 if rng.random() < rates.price else BAND[offered]
        outcome = "met" if band < BAND[condition.value] else "conflict"
        requested = f"{condition.item} {BANDS[BAND[condition.value]]}"
        return f"{requested} / {offered} {BANDS[band]}", outcome
    pair = (condition.attribute, condition.value, offered)
    likeness = shop.likeness(*pair)
    if shop.detailed and is_doubtful(*pair) and rng.random() < rates.likeness:
        likeness = "other" if likeness == "alike" else "alike"
    text = f"{condition.item} / {offered}" + (f" {likeness}" if shop.detailed else "")
    return text, condition_verdict(condition, offered, likeness)


def _make_example(
    world: World,
    shop: Shop,
    schema: CotSchema,
    rng: random.Random,
    query: Query,
    product: Product,
    uid: str,
) -> Example:
    steps, label = _ground_truth(shop, query, product)
    steps = {name: truth for name, truth in steps.items() if name in schema.names}
    rationale = None
    if world.chains != "none":
        errors = world.errors if world.chains == "teacher" else None
        # With checks a chain has its own generator, so that the pairs do not depend on ``chains``.
        chain_rng = random.Random(f"{world.seed}/{uid}") if shop.detailed else rng
        rationale = write_chain(chain_rng, shop, schema, query, product, errors)
    listing = list_product(rng, product)
    annotations = tuple(name for name in steps if rng.random() < world.coverage)
    # Decided by a hash of the uid, not a draw, so that the pairs do not depend on ``annotated``.
    uid_hash = words_hash(str(world.seed), uid)
    is_annotated = not uid.startswith("train") or uid_hash < world.annotated * 2**32
    return Example(
        uid=uid,
        query=query.text,
        product=listing,
        label=label if is_annotated else None,
        steps=steps,
        kind=query.kind,
        annotations=annotations if is_annotated else (),
        rationale=rationale,
    )
