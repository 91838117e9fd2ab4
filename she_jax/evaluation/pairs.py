"""What a look at labeled pairs tells before anything is trained on them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from she_jax.cot import LabelSet
from she_jax.data.intake import normalize_text
from she_jax.data.languages import language_of
from she_jax.evaluation.agreement import confusions, quadratic_kappa
from she_jax.generate.prompts import PromptFormat
from she_jax.types import Example

TELLING = 0.95  # a field alone gives the label of more held-out rows than that
_MOST_VALUES = 0.5  # values of a field per row, above which it only names the row


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well the raters of the same pairs agree.

    Attributes:
      pairs: how many pairs have two raters at least.
      same: share of the pairs of raters that gave the same label.
      kappa: their Cohen's kappa with quadratic weights, over the whole label set.
    """

    pairs: int
    same: float
    kappa: float


def rater_agreement(examples: Sequence[Example], labels: LabelSet) -> Agreement | None:
    """The agreement between raters, each two raters of a pair once; None without such pairs."""
    rated = [example.raters for example in examples if len(example.raters) > 1]
    given = [(labels.index(a), labels.index(b)) for r in rated for a, b in combinations(r, 2)]
    if not given:
        return None
    # In both orders, since no rater is the first.
    first, second = np.array([*given, *((b, a) for a, b in given)]).T
    matrix = confusions(first, second, len(labels.values)).sum(0)
    same = float(np.mean(first == second))
    return Agreement(pairs=len(rated), same=same, kappa=float(quadratic_kappa(matrix)))


def common_fields(examples: Sequence[Example]) -> list[str]:
    """The product fields that at least half of some pairs have."""
    counts = Counter(field for example in examples for field in example.product)
    return sorted(field for field, count in counts.items() if 2 * count >= len(examples))


def contradictions(examples: Sequence[Example]) -> list[tuple[Example, Example]]:
    """Pairs that occur twice, the same query with the same product, with different labels."""
    seen: dict[tuple[str, str], Example] = {}
    found = []
    for example in examples:
        if example.label is None:
            continue
        product = "\n".join(f"{name}: {text}" for name, text in sorted(example.product.items()))
        key = normalize_text(example.query).casefold(), product
        earlier = seen.setdefault(key, example)
        if earlier.label != example.label:
            found.append((earlier, example))
    return found


def languages(examples: Sequence[Example]) -> Counter[str]:
    """How many pairs are in which language, by script and known words."""
    return Counter(language_of(example.query, example.product).name for example in examples)


def telling_fields(
    train: Sequence[Example], held_out: Sequence[Example]
) -> list[tuple[str, float, float]]:
    """Fields that give the label away: a judge would learn them in place of relevance.

    Args:
      train: a field's value is taken for the label that it has most often here.
      held_out: labeled pairs of other queries.

    Returns:
      Field, share of the held-out pairs whose label it gives, and that of the commonest label; for
      the fields with a share above ``TELLING``.
    """
    fields = sorted({name for example in train for name in example.product})
    common = Counter(str(example.label) for example in train).most_common(1)
    if not held_out or not common:
        return []
    majority = float(np.mean([str(example.label) == common[0][0] for example in held_out]))
    found = []
    for field in ("kind", *fields):
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for example in train:
            counts[_value(example, field)][str(example.label)] += 1
        if len(counts) > _MOST_VALUES * len(train):
            continue
        best = {value: labels.most_common(1)[0][0] for value, labels in counts.items()}
        guesses = [best.get(_value(example, field), common[0][0]) for example in held_out]
        share = float(np.mean([g == str(e.label) for g, e in zip(guesses, held_out, strict=True)]))
        if share > max(TELLING, majority):
            found.append((field, share, majority))
    return found


def spelled_share(prompts: PromptFormat, texts: Sequence[str]) -> float:
    """The share of tokens that are a part of a character, which the tokenizer does not know."""
    ids = [index for row in prompts.encode(texts) for index in row]
    return float(np.mean([not _is_text(prompts.token_bytes[index]) for index in ids]))


def distinct_queries(queries: Iterable[str]) -> int:
    """How many queries there are, whatever their blanks and case."""
    return len({normalize_text(query).casefold() for query in queries})


def _value(example: Example, field: str) -> str:
    return example.kind if field == "kind" else example.product.get(field, "")


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True
