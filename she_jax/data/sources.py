"""The data sets that a run can name, and how each is configured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from she_jax.cot import LabelSet
from she_jax.data.dataset import ExampleBuilder
from she_jax.data.readers.custom import Custom, CustomConfig
from she_jax.data.readers.esci import Esci, EsciConfig
from she_jax.data.readers.judgments import TableConfig
from she_jax.data.readers.tables import Tables
from she_jax.data.readers.wands import Wands, WandsConfig
from she_jax.data.shopworld.builder import ShopWorld, ShopWorldConfig, World

TABLES = ("table", "jsonl", "trec")  # the pairs of users; jsonl is an older name of table
SETS = ("shopworld", "esci", "wands", *TABLES, "prepared")
_OPTIONS = {  # which sets read an option that most do not
    "path": ("esci", "wands", *TABLES, "prepared"),
    "products": TABLES,
    "queries": TABLES,
    "columns": TABLES,
    "locales": ("esci",),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pairs a run reads.

    Attributes:
      name: one of ``SETS``; ``prepared`` is a data set that is on disk already.
      folder: where the TFDS data set is written.
      path: the source: a folder (esci, wands, prepared) or a user's table.
      products: a user's table of products.
      queries: a user's table of queries.
      columns: what the columns of a user's tables are; see ``readers.columns.find_columns``.
      locales: of ESCI; empty for all.
      subset: of ESCI: ``all``, ``small`` or ``large``.
      validation_share, test_share: shares of the queries, where the set does not say.
      markup: read HTML in the fields of products.
      max_bad_share: largest share of rows that may be unusable.
      world: of ShopWorld.
      chain: the arguments of ``CotSchema.build``, the labels among them.
      evaluation: put every row of a table into ``test``.
      pairs: a user's class, named in ``name`` as ``package.module:Class``.
      digest: of its source.

    Raises:
      ValueError: for an unknown name, a missing path, or an option that the set does not read.
    """

    name: str
    folder: Path
    path: str = ""
    products: str = ""
    queries: str = ""
    columns: str = ""
    locales: tuple[str, ...] = ()
    subset: str = "all"
    validation_share: float = 0.1
    test_share: float = 0.2
    markup: bool = True
    max_bad_share: float = 0.05
    world: World | None = None
    chain: Mapping[str, Any] = field(default_factory=dict)
    evaluation: bool = False
    pairs: Callable[[], Any] | None = None
    digest: str = ""

    def __post_init__(self):
        if self.pairs is None and self.name not in SETS:
            raise ValueError(
                f"data.name={self.name!r}: expected one of {SETS}, or package.module:Class"
            )
        for option, sets in _OPTIONS.items():
            if (value := getattr(self, option)) and self.name not in sets:
                raise ValueError(
                    f"data.{option}={value!r}: data.name={self.name!r} does not read it; it is for "
                    f"data.name={' | '.join(sets)}"
                )
        if self.name in _OPTIONS["path"] and not self.path:
            raise ValueError(f"data.name={self.name!r} needs --config.data.path")
        if self.name == "trec" and not (self.products and self.queries):
            raise ValueError(
                "data.name='trec' needs --config.data.queries and --config.data.products, tables "
                "that the qids and docids of the judgments find"
            )
        known = {"esci": ("1-4", "esci"), "wands": ("1-4", "esci"), "shopworld": ("1-4",)}
        if self.labels not in (sets := known.get(self.name, (self.labels,))):
            raise ValueError(
                f"data.labels={self.labels!r}: data.name={self.name!r} has its labels; expected "
                f"none, or {' or '.join(sets)}"
            )

    @property
    def labels(self) -> str:
        """The label set, as ``LabelSet.parse`` takes it."""
        return LabelSet.parse(self.chain.get("labels", "1-4")).text

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
    folder, chain = config.folder, dict(config.chain)
    common = {"max_bad_share": config.max_bad_share, "markup": config.markup}
    if config.pairs is not None:
        options = CustomConfig(pairs=config.name, digest=config.digest, chain=chain, **common)
        builder = Custom(data_dir=folder, config=options)
        builder.pairs = config.pairs
        return builder
    if config.name in TABLES:
        return Tables(data_dir=folder, config=table_config(config))
    if config.name == "shopworld":
        assert config.world is not None
        return ShopWorld(data_dir=folder, config=ShopWorldConfig(world=config.world))
    source = common | {
        "path": config.path,
        "labels": config.labels,
        "validation_share": config.validation_share,
    }
    if config.name == "wands":
        options = WandsConfig(test_share=config.test_share, **source)
        return Wands(data_dir=folder, config=options)
    options = EsciConfig(locales=config.locales, subset=config.subset, **source)
    return Esci(data_dir=folder, config=options)


def table_config(config: DataConfig) -> TableConfig:
    """The options of a user's tables."""
    return TableConfig(
        path=config.path,
        products=config.products,
        queries=config.queries,
        columns=config.columns,
        qrels=config.name == "trec",
        evaluation=config.evaluation,
        chain=dict(config.chain),
        validation_share=config.validation_share,
        test_share=config.test_share,
        max_bad_share=config.max_bad_share,
        markup=config.markup,
    )
