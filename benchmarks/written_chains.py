"""Draws pairs, writes their chains by rule, and prints them to be read against the products.

    python -m benchmarks.written_chains --esci=FOLDER --locale=us
    python -m benchmarks.written_chains --table=PAIRS.csv --labels=0-3 --pairs=60

Each verdict and each word-claim of a chain is a statement that the product's text bears out or
does not. The same seed draws the same pairs. A last line gives the chains a second of this process.
"""

import time

import numpy as np
from absl import app, flags

from she_jax.cot import CotSchema
from she_jax.data.intake import Row
from she_jax.data.rationales import write_chain
from she_jax.data.readers.esci import Esci, EsciConfig
from she_jax.data.readers.judgments import TableConfig
from she_jax.data.readers.tables import Tables
from she_jax.types import Example

FLAGS = flags.FLAGS
flags.DEFINE_string("esci", "", "Folder with ESCI's two parquet files.")
flags.DEFINE_string("locale", "us", "Locale of ESCI: us, es or jp.")
flags.DEFINE_string("table", "", "A table of labeled pairs, instead of ESCI.")
flags.DEFINE_string("products", "", "Its table of products.")
flags.DEFINE_string("columns", "", "field=column,... where its columns have other names.")
flags.DEFINE_string("labels", "1-4", "Its label set.")
flags.DEFINE_integer("pairs", 200, "Pairs that are drawn.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of the draw and the phrasings.")
flags.DEFINE_integer("chars", 600, "Characters of a field that are printed.", lower_bound=0)


def read(schema: CotSchema) -> list[Example]:
    """All labeled pairs of the file that the flags name, in its order."""
    if FLAGS.esci:
        config = EsciConfig(path=FLAGS.esci, locales=(FLAGS.locale,))
        rows = Esci(data_dir="unused", config=config).rows()
    else:
        config = TableConfig(
            path=FLAGS.table,
            products=FLAGS.products,
            columns=FLAGS.columns,
            chain=schema.options,
        )
        rows = Tables(data_dir="unused", config=config).rows()
    read_rows = [row.example for row in rows if isinstance(row, Row)]
    return [example for example in read_rows if example.label is not None]


def main(argv: list[str]) -> None:
    del argv
    if bool(FLAGS.esci) == bool(FLAGS.table):
        raise app.UsageError("give --esci=FOLDER or --table=FILE")
    schema = CotSchema.build(labels=FLAGS.labels)
    examples, rng = read(schema), np.random.default_rng(FLAGS.seed)
    drawn = rng.permutation(len(examples))[: FLAGS.pairs].tolist()
    start = time.process_time()
    chains = [write_chain(examples[i], schema, rng) for i in drawn]
    seconds = time.process_time() - start
    for i, chain in zip(drawn, chains, strict=True):
        example = examples[i]
        print(f"--- {example.uid}: {example.query}")
        for name, value in example.product.items():
            if value:
                print(f"    {name}: {value[: FLAGS.chars]}")
        print(chain)
    print(f"--- {len(chains)} chains, {len(chains) / seconds:.0f} a second of processor time")


if __name__ == "__main__":
    app.run(main)
