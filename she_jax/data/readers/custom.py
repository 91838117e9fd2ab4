"""A user's own pairs: a class with one method, ``examples(split)``."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from she_jax.cot import CotSchema, LabelSet
from she_jax.data.dataset import ExampleBuilder, ExampleConfig
from she_jax.data.intake import Row
from she_jax.types import BadRow, Example, UserError

SPLITS = ("train", "validation", "test", "test_longtail")


@dataclass(kw_only=True, eq=False)
class CustomConfig(ExampleConfig):
    """Which class.

    Attributes:
      pairs: ``package.module:Class``.
      digest: SHA-256 of its source file: another version is another data set.
      chain: the arguments of ``CotSchema.build`` for the run's chain, with its labels.
    """

    pairs: str
    digest: str
    chain: dict[str, Any] = field(default_factory=dict)

    @property
    def label_set(self) -> LabelSet:
        return CotSchema.build(**self.chain).labels

    @property
    def needs_title(self) -> bool:
        return CotSchema.build(**self.chain).label_index >= 0


class Custom(ExampleBuilder):
    """Pairs from a user's class, whose ``examples(split)`` yields ``she_jax.Example`` records.

    It is asked for each of ``SPLITS``, and yields nothing for a split that it does not have.
    """

    builder_config: CustomConfig
    pairs: Callable[[], Any]

    def rows(self) -> Iterator[Row | BadRow]:
        split, line, name = "none yet", 0, self.builder_config.pairs
        try:
            source = self.pairs()
            for split in SPLITS:
                line = 0
                for line, example in enumerate(source.examples(split), start=1):
                    file = f"{name} ({split})"
                    if isinstance(example, Example):
                        yield Row(split=split, example=example, file=file, line=line)
                    else:
                        reason = f"not an Example: {type(example).__name__}"
                        yield BadRow(file=file, line=line, reason=reason)
        except Exception as error:
            raise UserError(
                f"data.name={name} raised {type(error).__name__}: {error} (split {split}, after "
                f"example {line})"
            ) from error
