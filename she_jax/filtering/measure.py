"""Measures training prompts by rollouts of a policy and selects those worth training on.

The rollouts are kept in blocks of prompts, one file each: a killed run resumes with the block it
was in, and filters with other thresholds reuse them (``filter.records``).
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import jax
import numpy as np
from jaxtyping import Int64

from she_jax.cot import CotSchema
from she_jax.data.dataset import (
    ExampleSource,
    PreparedDataset,
    fingerprint,
    open_split,
    shuffled_rows,
)
from she_jax.filtering.near_duplicates import near_duplicates, signatures
from she_jax.filtering.records import PromptRecord, write_records
from she_jax.filtering.report import write_filter_report
from she_jax.filtering.select import FilterConfig, merge, select, survey
from she_jax.generate.generator import Generator, Sample
from she_jax.generate.language_model import LanguageModel
from she_jax.generate.readout import make_embedding
from she_jax.rewards.verifier import FULL_REWARD, outcome_reward, verify
from she_jax.training.checkpoint import params_digest
from she_jax.training.files import write_json
from she_jax.training.logging import Progress, log
from she_jax.training.stop import StopSignal
from she_jax.types import Example, UserError

BLOCK = 512  # prompts a file; a killed run measures at most this many again
IDENTITY_FILE = "identity.json"  # what the records of a folder are of


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Which prompts are measured, and how.

    Attributes:
      pairs: number of training pairs to measure; 0 for no filter.
      skip: pairs to skip before, which an earlier stage measured.
      rollouts: of each pair, >= 1.
      records: folder of the rollouts; "" for one of the run's own.
      part, parts: measure each ``parts``-th block only, from ``part`` on, where several runs share
        a folder.
      seed: of the rollouts.
      batch_size: rollouts at a time.
      shuffled: the training pairs are in random order already.

    Raises:
      ValueError: if a number is out of its range.
    """

    pairs: int
    skip: int
    rollouts: int
    records: str
    part: int
    parts: int
    seed: int
    batch_size: int
    shuffled: bool

    def __post_init__(self):
        if self.pairs < 0:
            raise ValueError(
                f"filter.pairs={self.pairs}: expected 0 (no filter) or the number of pairs"
            )
        if self.skip < 0:
            raise ValueError(f"filter.skip={self.skip}: expected 0 (begin with the first) or more")
        if self.pairs and self.rollouts < 1:
            raise ValueError(f"filter.rollouts={self.rollouts}: expected at least 1")
        if not 0 <= self.part < self.parts:
            raise ValueError(
                f"filter.part={self.part}: expected 0 to {self.parts - 1}, of filter.parts"
            )


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The rows of the training split that a filter kept, and their pass rates by uid."""

    rows: list[int]
    rates: Mapping[str, float]


def filter_prompts(
    folder: Path,
    lm: LanguageModel,
    params: Any,
    dataset: PreparedDataset,
    measure: MeasureConfig,
    config: FilterConfig,
    stop: StopSignal,
) -> Kept | None:
    """Selects among ``measure.pairs`` training pairs, or reads an earlier selection.

    Args:
      folder: everything is written here.
      lm: model, prompts and devices.
      params: of the policy that is measured.
      dataset: the pairs.
      measure: which pairs are measured.
      config: thresholds and quotas.
      stop: checked between two blocks.

    Returns:
      What was kept; None if other runs still have to measure their parts.

    Raises:
      UserError: if nothing is left, or the records are of other pairs or rollouts.
    """
    path = folder / "kept.json"
    if path.is_file():
        return Kept(**json.loads(path.read_text(encoding="utf-8")))
    source = open_split(dataset.path, "train")
    measured = _measured_rows(measure, len(source))
    count = len(measured)
    records = Path(measure.records or folder / "records")
    identity = {
        "data": fingerprint(dataset),
        "policy": params_digest(params),
        "steps": list(lm.prompts.schema.names),
        "seed": measure.seed,
        "skip": measure.skip,
        "pairs": count,
        "rollouts": measure.rollouts,
        "shuffled": measure.shuffled,
    }
    similarity = _claim(records, identity, config.similarity)
    duplicates = _duplicates(records, source, measured, similarity)
    recorder = Recorder(measure, lm)
    shards = _measure(measure, records, recorder, params, source, measured, duplicates, stop)
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        log(
            f"{len(missing)} of {len(shards)} blocks are missing: they are for the other "
            f"filter.parts. Once they are done, the same command continues with all of {records}"
        )
        return None
    stats = merge([survey(shard) for shard in shards])
    if config.similarity != similarity:
        # A duplicate without rollouts stays one, though what it repeats may now be one itself.
        more = _duplicates(records, source, measured, config.similarity)
        duplicates = np.union1d(duplicates, more)
    selection = select(stats, config, duplicates)
    write_filter_report(
        folder,
        survey=stats,
        selection=selection,
        config=config,
        step_names=lm.prompts.schema.names,
        duplicates=duplicates,
        shards=shards,
    )
    selected = np.flatnonzero(selection.reason == 0)
    rows = stats.row[selected].tolist()
    rates = {
        source[row].uid: float(rate)
        for row, rate in zip(rows, stats.pass_rate[selected], strict=True)
        if np.isfinite(rate)
    }
    for quota in selection.unmet:
        if quota.cell == "kinds in front":
            log(
                f"filter: {quota.wanted:,} of filter.front={list(config.front)} were wanted, only "
                f"{quota.available:,} are left; the kinds here are {list(stats.kinds)}"
            )
    log(f"filter: kept {len(rows):,} of {count:,} prompts; see {folder / 'report.html'}")
    write_json(path, {"rows": rows, "rates": rates})
    return Kept(rows=rows, rates=rates)


def _measure(
    config: MeasureConfig,
    records: Path,
    recorder: "Recorder",
    params: Any,
    source: ExampleSource,
    rows: Sequence[int],
    duplicates: Int64[np.ndarray, "M"],
    stop: StopSignal,
) -> list[Path]:
    """Writes this run's share of the shards, where missing; returns the paths of all of them."""
    count = len(rows)
    blocks = [rows[first : first + BLOCK] for first in range(0, count, BLOCK)]
    shards = [records / f"{n:05d}.parquet" for n in range(len(blocks))]
    with Progress(f"filter: rollouts of {count:,} prompts", total=count) as progress:
        for n in range(config.part, len(blocks), config.parts):
            first = n * BLOCK
            if not shards[n].is_file():

                def show(done: int, first: int = first) -> None:
                    """Shows the number of prompts with rollouts."""
                    progress.update(first + done)

                block = recorder.records(params, source, blocks[n], duplicates, n, show)
                write_records(shards[n], block, recorder.step_names)
            progress.update(first + len(blocks[n]))
            if stop:
                log(f"{stop.name}: {n + 1} of {len(blocks)} blocks are kept in {records}")
                raise SystemExit(stop.exit_code)
    return shards


class Recorder:
    """Measures prompts with a policy, a block at a time.

    Args:
      config: how many rollouts, and their seed.
      lm: model, prompts and devices.
    """

    def __init__(self, config: MeasureConfig, lm: LanguageModel):
        self._seed, self._count = config.seed, config.rollouts
        self._generator = Generator(lm, config.batch_size, warn=log)
        self._embed = jax.jit(make_embedding(lm))
        self._prompts, self._width = lm.prompts, lm.model.config.dim
        self.step_names = lm.prompts.schema.names

    def records(
        self,
        params: Any,
        source: ExampleSource,
        rows: Sequence[int],
        duplicates: Int64[np.ndarray, "M"],
        block: int,
        show: Callable[[int], None],
    ) -> list[PromptRecord]:
        """The records of some rows; ``duplicates`` among them are not measured."""
        skipped = set(duplicates.tolist())
        examples = {row: source[row] for row in rows}
        prompted = [row for row in rows if row not in skipped]
        embeddings = self._embeddings(params, [examples[row] for row in prompted])
        by_row = dict(zip(prompted, embeddings, strict=True))
        sampled = [row for row in prompted if examples[row].label is not None]
        # Each block has rollouts of its own, whichever blocks were measured before it.
        seed = int(np.random.SeedSequence((self._seed, block)).generate_state(1)[0])
        groups = self._generator.sample(
            params, [examples[row] for row in sampled], self._count, seed, show
        )
        rollouts = dict(zip(sampled, groups, strict=True))
        schema, unmeasured = self._prompts.schema, np.zeros(self._width, np.float16)
        return [
            _record(row, examples[row], schema, by_row.get(row, unmeasured), rollouts.get(row, []))
            for row in rows
        ]

    def _embeddings(self, params: Any, examples: Sequence[Example]) -> list[np.ndarray]:
        """The embedding of each pair with its greedy chain."""
        found: list[np.ndarray] = []
        rows = range(len(examples))
        for part, rollout in self._generator.greedy_rollouts(params, examples, rows):
            embeddings = jax.device_get(self._embed(params, rollout))
            found += [embedding.astype(np.float16) for embedding in embeddings[: len(part)]]
        return found


def _confidence(samples: Sequence[Sample]) -> float | None:
    """The share of the rollouts that give the commonest label; None without rollouts."""
    counts = Counter(s.chain.label for s in samples if s.chain.label is not None)
    return max(counts.values(), default=0) / len(samples) if samples else None


def _record(
    row: int,
    example: Example,
    schema: CotSchema,
    embedding: np.ndarray,
    samples: Sequence[Sample],
) -> PromptRecord:
    outcomes = [outcome_reward(s.chain, example, truncated=s.truncated) for s in samples]
    verified = [verify(sample.chain, example, schema) for sample in samples]
    rates: list[float | None] = []
    for k in range(len(schema.steps)):
        correct = [bool(rewards[k] >= FULL_REWARD) for rewards, known in verified if known[k]]
        rates.append(sum(correct) / len(correct) if correct else None)
    texts = tuple(sample.text for sample in samples)
    return PromptRecord(
        row=row,
        uid=example.uid,
        query=example.query,
        title=example.product.get("title", ""),
        label=None if example.label is None else str(example.label),
        kind=example.kind,
        confidence=_confidence(samples),
        right=tuple(reward >= FULL_REWARD for reward in outcomes),
        paths=tuple(schema.path(sample.chain) for sample in samples),
        step_rates=tuple(rates),
        texts=texts,
        embedding=embedding,
    )


def _duplicates(
    records: Path, source: ExampleSource, rows: Sequence[int], similarity: float
) -> Int64[np.ndarray, "M"]:
    """Rows whose text nearly repeats an earlier one of the same query.

    A signature of each text, and the number of its query, are kept beside the records.
    """
    path = records / "texts.npy"
    if not path.is_file():
        queries: list[str] = []
        with Progress("filter: near-duplicates", total=len(rows)) as progress:

            def texts() -> Iterator[str]:
                for row in rows:
                    example = source[row]
                    queries.append(" ".join(example.query.lower().split()))
                    progress.update(len(queries))
                    yield " ".join([example.query, *example.product.values()])

            text_signatures = signatures(texts())
        _, query_ids = np.unique(queries, return_inverse=True)
        part = _unique_part(path)  # other filter.parts may be at it too, with the same result
        with part.open("wb") as file:
            np.save(file, np.column_stack([text_signatures, query_ids.astype(np.uint32)]))
        part.replace(path)
    table = np.load(path, allow_pickle=False)
    earlier = near_duplicates(table[:, :-1], similarity, table[:, -1])
    return np.asarray(rows, np.int64)[earlier >= 0]


def _measured_rows(config: MeasureConfig, size: int) -> list[int]:
    """The rows to measure, ascending; another ``skip`` gives others, if there are enough."""
    rows = shuffled_rows(size, shuffled=config.shuffled)
    count = min(config.pairs, size)
    # A set that is smaller than what is skipped starts over.
    return sorted(int(rows[(config.skip + n) % size]) for n in range(count))


def _claim(records: Path, identity: Mapping[str, Any], similarity: float) -> float:
    """Creates the folder of the records, or checks that they are what this filter needs.

    Returns:
      The similarity from which on a pair got no rollouts: that of the folder's first filter, so
      that a block which a stricter one measures serves the first one too.
    """
    path = records / IDENTITY_FILE
    if not path.is_file():
        records.mkdir(parents=True, exist_ok=True)
        part = _unique_part(path)
        content = {**identity, "similarity": similarity}
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    if others := {k: (saved.get(k), v) for k, v in identity.items() if saved.get(k) != v}:
        lines = [f"  {key}: {old} in the records, {new} now" for key, (old, new) in others.items()]
        raise UserError(
            f"filter.records={records} holds records of something else:\n"
            + "\n".join(lines)
            + "\nGive another folder, or the values of these records"
        )
    first = saved["similarity"]
    if (similarity or 2.0) > (first or 2.0):  # 0 is off: nothing is too similar
        raise UserError(
            f"filter.records={records} were made with similarity {first}: what that left out has "
            f"no rollouts. Ask for no more than that (now: {similarity}), or give another folder"
        )
    return first


def _unique_part(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid4().hex}.part")
