"""Draws pairs, writes their chains by rule, and prints them to be read against the products.

    python -m benchmarks.written_chains --esci=FOLDER --locale=us
    python -m benchmarks.written_chains --jsonl=PAIRS.jsonl --pairs=60

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
from she_jax.data.readers.jsonl import Jsonl, JsonlConfig
from she_jax.types import Example

FLAGS = flags.FLAGS
flags.DEFINE_string("esci", "", "Folder with ESCI's two parquet files.")
flags.DEFINE_string("locale", "us", "Locale of ESCI: us, es or jp.")
flags.DEFINE_string("jsonl", "", "A JSONL file of labeled pairs, instead of ESCI.")
flags.DEFINE_integer("pairs", 200, "Pairs that are drawn.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of the draw and the phrasings.")
flags.DEFINE_integer("chars", 600, "Characters of a field that are printed.", lower_bound=0)


def read() -> list[Example]:
    """All labeled pairs of the file that the flags name, in its order."""
    if FLAGS.esci:
        config = EsciConfig(path=FLAGS.esci, locales=(FLAGS.locale,))
        rows = Esci(data_dir="unused", config=config).rows()
    else:
        rows = Jsonl(data_dir="unused", config=JsonlConfig(path=FLAGS.jsonl)).rows()
    return [row.example for row in rows if isinstance(row, Row) and row.example.label]


def main(argv: list[str]) -> None:
    del argv
    if bool(FLAGS.esci) == bool(FLAGS.jsonl):
        raise app.UsageError("give --esci=FOLDER or --jsonl=FILE")
    examples, rng = read(), np.random.default_rng(FLAGS.seed)
    drawn = rng.permutation(len(examples))[: FLAGS.pairs].tolist()
    schema, start = CotSchema(), time.process_time()
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
