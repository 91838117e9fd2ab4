"""The data sets that a run can name, and how each is configured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from she_jax.data.dataset import ExampleBuilder
from she_jax.data.readers.custom import Custom, CustomConfig
from she_jax.data.readers.esci import Esci, EsciConfig
from she_jax.data.readers.jsonl import Jsonl, JsonlConfig
from she_jax.data.readers.wands import Wands, WandsConfig
from she_jax.data.shopworld.builder import ShopWorld, ShopWorldConfig, World

SETS = ("shopworld", "esci", "wands", "jsonl", "prepared")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pairs a run reads.

    Attributes:
      name: one of ``SETS``; ``prepared`` is a data set that is on disk already.
      folder: where the TFDS data set is written.
      path: the source: a folder (esci, wands, prepared) or a file (jsonl).
      max_bad_share: largest share of rows that may be unusable.
      world: of ShopWorld.
      chain: the arguments of ``CotSchema.build``, the labels among them.
      evaluation: put every row of a JSONL file into ``test``.
      pairs: a user's class, named in ``name`` as ``package.module:Class``.
      digest: of its source.

    Raises:
      ValueError: for an unknown name, or a missing path.
    """

    name: str
    folder: Path
    path: str = ""
    max_bad_share: float = 0.05
    world: World | None = None
    chain: Mapping[str, Any] = field(default_factory=dict)
    evaluation: bool = False
    pairs: Callable[[], Any] | None = None
    digest: str = ""

    def __post_init__(self):
        if self.pairs is not None:
            return
        if self.name not in SETS:
            raise ValueError(
                f"data.name={self.name!r}: expected one of {SETS}, or package.module:Class"
            )
        if self.name != "shopworld" and not self.path:
            raise ValueError(f"data.name={self.name!r} needs --config.data.path")

    @property
    def shuffled(self) -> bool:
        """Whether the rows come in random order already; a file may be sorted."""
        return self.name == "shopworld"

    def for_chain(self, chain: Mapping[str, Any]) -> "DataConfig":
        """The same pairs for another chain."""
        world = self.world
        if world is not None:
            world = replace(world, label_first=chain["label_first"], checks=chain["checks"])
        return replace(self, world=world, chain=chain)


def make_builder(config: DataConfig) -> ExampleBuilder:
    """The data set of a config, not prepared yet.

    Raises:
      ValueError: if its options do not fit together.
      FileNotFoundError: if its files are missing.
    """
    if config.pairs is not None:
        options = CustomConfig(
            pairs=config.name,
            digest=config.digest,
            chain=dict(config.chain),
            max_bad_share=config.max_bad_share,
        )
        builder = Custom(data_dir=config.folder, config=options)
        builder.pairs = config.pairs
        return builder
    source = {"path": config.path, "max_bad_share": config.max_bad_share}
    if config.name == "esci":
        return Esci(data_dir=config.folder, config=EsciConfig(**source))
    if config.name == "wands":
        return Wands(data_dir=config.folder, config=WandsConfig(**source))
    if config.name == "jsonl":
        options = JsonlConfig(evaluation=config.evaluation, chain=dict(config.chain), **source)
        return Jsonl(data_dir=config.folder, config=options)
    assert config.world is not None
    return ShopWorld(data_dir=config.folder, config=ShopWorldConfig(world=config.world))
