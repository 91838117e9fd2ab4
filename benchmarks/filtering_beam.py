"""The filter as an Apache Beam pipeline over the shards, compared with the plain functions.

    pip install apache-beam
    python benchmarks/filtering.py --records=20000 --dir=runs/records       # makes the shards
    python benchmarks/filtering_beam.py --dir=runs/records --out=runs/kept  # plus Beam's own flags

Any number of workers compute signatures and surveys of the shards and write the kept records; one
worker searches near-duplicates and selects, from numbers of all shards. Then the plain functions do
the same in this process, and the two selections must be equal.
"""

import sys
import time
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from absl import flags
from apache_beam.options.pipeline_options import PipelineOptions
from filtering import config, sign

from she_jax.filtering.near_duplicates import near_duplicates
from she_jax.filtering.select import (
    FilterConfig,
    Survey,
    merge,
    select,
    survey,
)

FLAGS = flags.FLAGS
flags.DEFINE_string("dir", "runs/records", "Folder of the shards.")
flags.DEFINE_string("out", "runs/kept", "Folder of the kept records.")

Signed = tuple[np.ndarray, np.ndarray]  # rows, signatures
Chosen = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows, reasons, clusters


def repeats(signed: list[Signed], similarity: float) -> np.ndarray:
    """The rows of near-duplicates, from the signatures of all shards."""
    row, signatures = (np.concatenate(parts) for parts in zip(*signed, strict=True))
    order = np.argsort(row)
    return row[order][near_duplicates(signatures[order], similarity) >= 0]


def chosen(merged: Survey, duplicates: np.ndarray, settings: FilterConfig) -> Chosen:
    """What becomes of each row, without the survey's embeddings, which no writer needs."""
    selection = select(merged, settings, duplicates)
    return merged.row, selection.reason, selection.cluster


def write_kept(path: str, result: Chosen, out: str) -> int:
    """Writes the kept records of a shard, and returns their number."""
    row, reason, _ = result
    table = pq.read_table(path)
    kept = table.filter(pc.is_in(table.column("row"), value_set=pa.array(row[reason == 0])))
    pq.write_table(kept, Path(out) / Path(path).name, compression="zstd")
    return len(kept)


def write_selection(result: Chosen, out: str) -> None:
    """Writes what became of every row."""
    np.save(Path(out) / "selection.npy", np.stack(result))


def run(shards: list[str], out: str, settings: FilterConfig, beam_flags: list[str]) -> None:
    """Filters shards into ``out`` with the runner that Beam's flags name."""
    with beam.Pipeline(options=PipelineOptions(beam_flags)) as pipeline:
        paths = pipeline | beam.Create(shards) | beam.Reshuffle()
        duplicates = (
            paths
            | "sign" >> beam.Map(lambda path: sign(Path(path)))
            | "gather" >> beam.combiners.ToList()
            | "near-duplicates" >> beam.Map(repeats, settings.similarity)
        )
        result = (
            paths
            | "survey" >> beam.Map(lambda path: survey(Path(path)))
            | "merge" >> beam.CombineGlobally(lambda parts: merge(list(parts))).without_defaults()
            | "select" >> beam.Map(chosen, beam.pvalue.AsSingleton(duplicates), settings)
        )
        counts = paths | "write" >> beam.Map(write_kept, beam.pvalue.AsSingleton(result), out)
        _ = result | "selection" >> beam.Map(write_selection, out)
        total = counts | "count" >> beam.CombineGlobally(sum)
        _ = total | "say" >> beam.Map(lambda count: print(f"the pipeline kept {count} records"))


def main() -> None:
    beam_flags = FLAGS(sys.argv, known_only=True)[1:]
    shards = sorted(str(path) for path in Path(FLAGS.dir).glob("*.parquet"))
    records = sum(pq.read_metadata(path).num_rows for path in shards)
    settings = config(records)
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    clock = time.perf_counter()
    run(shards, str(out), settings, beam_flags)
    middle = time.perf_counter()
    duplicates = repeats([sign(Path(path)) for path in shards], settings.similarity)
    expected = chosen(merge([survey(Path(path)) for path in shards]), duplicates, settings)
    end = time.perf_counter()
    if not np.array_equal(np.load(out / "selection.npy"), np.stack(expected)):
        raise AssertionError("Beam's selection is not that of the plain functions")
    row, reason, _ = expected
    tables = [pq.read_table(out / Path(path).name, columns=["row"]) for path in shards]
    kept = np.sort(pa.concat_tables(tables).column("row").to_numpy())
    if not np.array_equal(kept, row[reason == 0]):
        raise AssertionError("Beam wrote other rows than it kept")
    print(f"{records} records in {len(shards)} shards: the same reason and cluster for each,")
    print(f"{len(kept)} kept and written")
    print(f"Beam {middle - clock:.1f} s, writing included; plain, one process {end - middle:.1f} s")


if __name__ == "__main__":
    main()
