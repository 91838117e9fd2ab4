"""Filters a million prompts: seconds and memory of each part.

    python benchmarks/filtering.py --records=1000000 --dir=runs/records

Makes synthetic shards of ``PromptRecord``s where they are missing (8 rollouts of 70 words each,
skewed pass rates, a few percent of near-duplicates), which is not timed. Then reads them as a run
does, in ``--processes`` processes: signatures, near-duplicates, distinct bigrams of all texts
(which ``write_records`` counts as it writes), surveys, the merge and the selection. Prints a table.
"""

import os
import random
import resource
import string
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from she_jax.filtering.near_duplicates import near_duplicates, signatures
from she_jax.filtering.records import PromptRecord, distinct_n, read_columns, write_records
from she_jax.filtering.select import (
    REASONS,
    FilterConfig,
    merge,
    select,
    survey,
)

FLAGS = flags.FLAGS
STEPS = ("query", "product", "category", "attributes", "label")
KINDS = ("plain", "negation", "alternative", "question", "knowledge")
NEAR = 0.03  # share of near-duplicates
SHARD = 20_000


def define_flags() -> None:
    """Defines the flags, in the main process only: a worker imports this file too."""
    flags.DEFINE_integer("records", 1_000_000, "Prompts.")
    flags.DEFINE_string("dir", "runs/records", "Folder of the shards.")
    flags.DEFINE_integer("dim", 128, "Width of the embeddings.")
    flags.DEFINE_integer("processes", 2, "Processes.")


def config(records: int) -> FilterConfig:
    """A filter that uses all rules and keeps a tenth."""
    return FilterConfig(
        confidence=0.98, low=0.01, high=0.9, min_entropy=0.1, size=records // 10, front=KINDS[1:]
    )


def pair(row: int, words: list[str]) -> list[str]:
    """The 14 words of a pair, which depend on its row only."""
    return random.Random(row).choices(words, k=14)


def make_shard(path: Path, start: int, stop: int, dim: int) -> None:
    """Writes the records of rows ``start`` to ``stop``."""
    letters = random.Random(0)
    words = ["".join(letters.choices(string.ascii_lowercase, k=3 + k % 8)) for k in range(20_000)]
    rng = np.random.default_rng(start)
    count = stop - start
    rates = rng.beta(0.5, 0.35, count)
    right = rng.random((count, 8)) < rates[:, None]
    spread = rng.integers(1, 7, count)[:, None]
    paths = (rng.random((count, 8)) * spread).astype(int)
    near = rng.random(count) < NEAR
    labels = rng.choice([0, 1, 2, 3, 4], p=[0.02, 0.1, 0.15, 0.2, 0.53], size=count)
    kinds = rng.choice(5, p=[0.6, 0.1, 0.1, 0.15, 0.05], size=count)
    confidence = rng.beta(4, 0.7, count)
    centers = np.random.default_rng(0).normal(size=(50, dim))
    embeddings = centers[rng.integers(50, size=count)] + 0.7 * rng.normal(size=(count, dim))
    embeddings = embeddings.astype(np.float16)
    records = []
    for k, row in enumerate(range(start, stop)):
        chance = random.Random(-row - 1)
        near_row = chance.randrange(row) if near[k] and row else None
        text = pair(row if near_row is None else near_row, words)
        bank = chance.choices(words, k=150)
        records.append(
            PromptRecord(
                row=row,
                uid=str(row),
                query=" ".join(text[:4]),
                title=" ".join(text[4:]) + ("" if near_row is None else " xl"),
                label=int(labels[k]) or None,
                kind=KINDS[kinds[k]],
                confidence=float(confidence[k]),
                right=tuple(right[k].tolist()),
                paths=tuple(f"match/unstated/{path}" for path in paths[k]),
                step_rates=(1.0, 1.0, float(rates[k]), 0.5, None),
                texts=tuple(" ".join(chance.choices(bank, k=70)) for _ in range(8)),
                embedding=embeddings[k],
            )
        )
    write_records(path, records, STEPS)


def make_shards(folder: Path, records: int, dim: int, processes: int) -> list[Path]:
    """Makes the shards that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    size = min(SHARD, -(-records // 4))
    starts = range(0, records, size)
    shards = [folder / f"{records}x{dim}-{start:09d}.parquet" for start in starts]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        jobs = [
            pool.submit(make_shard, path, start, min(start + size, records), dim)
            for path, start in zip(shards, starts, strict=True)
            if not path.exists()
        ]
        for k, job in enumerate(jobs, start=1):
            job.result()
            print(f"\rmade {k} of {len(jobs)} shards", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return shards


def sign(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a shard, and the signatures of their texts."""
    table = read_columns(path, ["row", "query", "title"])
    texts = zip(table.column("query").to_pylist(), table.column("title").to_pylist(), strict=True)
    return table.column("row").to_numpy(), signatures(map("\n".join, texts))


def distinct(path: Path) -> float:
    """Mean distinct-2 of a shard, counted from its texts."""
    texts = read_columns(path, ["texts"]).column("texts")
    return float(np.mean([distinct_n(rollouts) for rollouts in texts.to_pylist()]))


def measured(work: Callable[[Path], Any], path: Path) -> tuple[Any, int, float]:
    """The result of a shard, the worker's process id, and its peak memory so far."""
    return work(path), os.getpid(), peak()


def peak() -> float:
    """Peak resident memory of this process, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(argv: list[str]) -> None:
    del argv
    shards = make_shards(Path(FLAGS.dir), FLAGS.records, FLAGS.dim, FLAGS.processes)
    workers: dict[int, float] = {}
    parts: list[tuple[str, float, float, float]] = []
    clock = time.perf_counter()

    def shared(work: Callable[[Path], Any]) -> Iterator[Any]:
        """Yields the results of all shards, in their order, computed by the workers."""
        for result, process, memory in pool.map(partial(measured, work), shards):
            workers[process] = memory
            yield result

    def done(name: str) -> None:
        """Records time and memory of the part that has just ended."""
        nonlocal clock
        now = time.perf_counter()
        parts.append((name, now - clock, peak(), sum(workers.values())))
        clock = now

    # Spawned while this process is small: a child's peak starts at its parent's size.
    with ProcessPoolExecutor(FLAGS.processes, get_context("spawn")) as pool:
        rows, signed, at = np.empty(FLAGS.records, np.int64), np.empty((0, 0)), 0
        for shard_rows, shard in shared(sign):
            if not at:
                signed = np.empty((FLAGS.records, shard.shape[1]), shard.dtype)
            part = slice(at, at + len(shard))
            rows[part], signed[part] = shard_rows, shard
            at += len(shard)
        done("signatures")
        settings = config(FLAGS.records)
        duplicates = rows[near_duplicates(signed, settings.similarity) >= 0]
        del signed
        done("near-duplicates")
        spread = np.mean(list(shared(distinct)))
        done("distinct bigrams")
        surveys = list(shared(survey))
    done("surveys")
    merged = merge(surveys)
    del surveys
    done("merge")
    selection = select(merged, settings, duplicates)
    done("selection")

    counts = np.bincount(selection.reason, minlength=len(REASONS))
    dropped = ", ".join(f"{name} {count}" for name, count in zip(REASONS, counts, strict=True))
    print(f"{FLAGS.records} records in {len(shards)} shards, width {FLAGS.dim}: {dropped}")
    print(f"mean distinct-2 {spread:.3f}, {len(selection.unmet)} quotas not met\n")
    print("| part | seconds | peak GiB, this process | its workers together |\n|---|---|---|---|")
    for name, seconds, main_gib, workers_gib in parts:
        print(f"| {name} | {seconds:.1f} | {main_gib:.2f} | {workers_gib:.2f} |")
    total = sum(seconds for _, seconds, _, _ in parts)
    memory = peak() + sum(workers.values())
    print(f"| **all** | **{total:.1f}** | **at most {memory:.2f} in all** | |")


if __name__ == "__main__":
    define_flags()
    app.run(main)
