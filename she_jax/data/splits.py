"""Divides pairs by their query into training, validation and test."""

from collections.abc import Iterable
from dataclasses import dataclass

from she_jax.data.dataset import ExampleConfig
from she_jax.data.intake import query_hash
from she_jax.types import UserError


@dataclass(kw_only=True, eq=False)
class HashSplitConfig(ExampleConfig):
    """Options of a data set without official splits, which is split by ``query_hash``.

    Attributes:
      validation_share, test_share: shares of the queries, each in [0, 1), with a sum below 1.
    """

    validation_share: float = 0.1
    test_share: float = 0.2

    def __post_init__(self):
        if min(self.validation_share, self.test_share) < 0 or not 0 < self.train_share <= 1:
            raise UserError(
                f"validation_share={self.validation_share}, test_share={self.test_share}: expected "
                "two shares from 0 on that leave something for training"
            )
        super().__post_init__()

    @property
    def train_share(self) -> float:
        """The share of the queries that is left for training."""
        return 1 - self.validation_share - self.test_share

    def split_of(self, query: str, bounds: tuple[float, float] | None = None) -> str:
        """The split a query belongs to; ``bounds`` of ``split_bounds`` come before the shares."""
        position = query_hash(query)
        if bounds is not None:
            return ("train", "validation", "test")[sum(position >= bound for bound in bounds)]
        beyond_train = position - self.train_share
        if beyond_train < 0:
            return "train"
        return "validation" if beyond_train < self.validation_share else "test"


def split_bounds(queries: Iterable[str], config: HashSplitConfig) -> tuple[float, float] | None:
    """Where validation and test begin for few queries, so that no split is empty.

    The queries in the order of their hashes are train, validation and test; each split that has a
    share gets at least one, from its neighbor. Reads the queries up to where no split is empty.

    Args:
      queries: of all pairs.
      config: the shares.

    Returns:
      The hashes of the first queries of validation and of test. None if ``config.split_of`` leaves
      no split empty, or there are fewer queries than splits.
    """
    shares = {
        "train": config.train_share,
        "validation": config.validation_share,
        "test": config.test_share,
    }
    hashes: dict[str, set[float]] = {name: set() for name, share in shares.items() if share}
    for query in queries:
        hashes[config.split_of(query)].add(query_hash(query))
        if all(hashes.values()):
            return None
    ordered = sorted(set().union(*hashes.values()))
    if len(ordered) < len(hashes):
        return None
    sizes = {name: max(1, len(part)) for name, part in hashes.items()}
    while sum(sizes.values()) > len(ordered):
        sizes[max(sizes, key=lambda name: sizes[name])] -= 1
    first_test = len(ordered) - sizes.get("test", 0)
    bounds = first_test - sizes.get("validation", 0), first_test
    first, second = (ordered[n] if n < len(ordered) else 1.0 for n in bounds)
    return first, second
