"""Filtering with a policy: measure each prompt by rollouts, keep them, choose, report.

The rollouts are kept in blocks of prompts, a file each, so a run that was killed goes on with the
block it was in, and filters with other thresholds need no new ones (``filter.records``).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import jax
import numpy as np
from jaxtyping import Int64

from she_jax.cot import CotSchema
from she_jax.data.dataset import (
    ExampleSource,
    Prepared,
    fingerprint,
    in_no_order,
    open_split,
)
from she_jax.filtering.near_duplicates import near_duplicates, signatures
from she_jax.filtering.records import PromptRecord, write_records
from she_jax.filtering.report import write_filter_report
from she_jax.filtering.select import FilterConfig, merge, select, survey
from she_jax.generate.generator import Judge, Sample
from she_jax.generate.language_model import Policy
from she_jax.generate.readout import label_tokens, make_look
from she_jax.rewards.verifier import FULL_MARKS, outcome_reward, verify
from she_jax.training.files import write_json
from she_jax.training.logging import Progress, say
from she_jax.training.stop import StopSignal
from she_jax.training.workdir import Config
from she_jax.types import Example

BLOCK = 512  # prompts that a killed run has to measure again at most


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The rows of the training split that a filter kept, and their pass rates by uid."""

    rows: list[int]
    rates: Mapping[str, float]


def filter_prompts(
    config: Config, workdir: Path, policy: Policy, params: Any, made: Prepared, stop: StopSignal
) -> Kept | None:
    """Chooses among ``filter.pairs`` training pairs, or reads what was chosen before.

    Args:
      config: of the run.
      workdir: its folder; everything goes to ``filter/`` in it.
      policy: model, prompts and devices.
      params: of the policy that is measured.
      made: the pairs.
      stop: asks to stop; honoured between two blocks.

    Returns:
      What was kept; None where other parts of the records are still to be made by other runs.

    Raises:
      ValueError: if nothing is left, or the records are of other pairs or rollouts.
    """
    folder = workdir / "filter"
    path = folder / "kept.json"
    if path.is_file():
        return Kept(**json.loads(path.read_text(encoding="utf-8")))
    own, thresholds = config.filter, filter_config(config)
    source = open_split(made.path, "train")
    looked_at = _looked_at(config, len(source))
    count = len(looked_at)
    records = Path(own.records or folder / "records")
    identity = {
        "data": fingerprint(made),
        "policy": _digest(params),
        "steps": list(policy.format.schema.names),
        "seed": config.seed,
        "skip": own.skip,
        "pairs": count,
        "rollouts": own.rollouts,
        "spread": config.data.name != "shopworld",
    }
    made_with = _claim(records, identity, thresholds)
    repeats = _repeats(records, source, looked_at, made_with["similarity"])
    recorder = Recorder(config, policy, made_with["confidence"])
    shards = _measure(own, records, recorder, params, source, looked_at, repeats, stop)
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        say(
            f"{len(missing)} of {len(shards)} blocks are not there yet: they are for the other "
            f"filter.parts. Once they are done, the same command goes on with all of {records}"
        )
        return None
    surveyed = merge([survey(shard) for shard in shards])
    if thresholds.similarity != made_with["similarity"]:
        # What had no rollouts as a repeat stays one, though what it repeats may be one itself now.
        more = _repeats(records, source, looked_at, thresholds.similarity)
        repeats = np.union1d(repeats, more)
    selection = select(surveyed, thresholds, repeats)
    write_filter_report(
        folder,
        survey=surveyed,
        selection=selection,
        config=thresholds,
        step_names=policy.format.schema.names,
        duplicates=repeats,
        shards=shards,
    )
    chosen = np.flatnonzero(selection.reason == 0)
    rows = surveyed.row[chosen].tolist()
    rates = {
        source[row].uid: float(rate)
        for row, rate in zip(rows, surveyed.pass_rate[chosen], strict=True)
        if np.isfinite(rate)
    }
    for quota in selection.unmet:
        if quota.cell == "kinds in front":
            say(
                f"filter: {quota.wanted:,} of filter.front={list(own.front)} were wanted, only "
                f"{quota.available:,} are left; the kinds here are {list(surveyed.kinds)}"
            )
    say(f"filter: kept {len(rows):,} of {count:,} prompts; see {folder / 'report.html'}")
    write_json(path, {"rows": rows, "rates": rates})
    return Kept(rows=rows, rates=rates)


def _measure(
    own: Config,
    records: Path,
    recorder: "Recorder",
    params: Any,
    source: ExampleSource,
    rows: Sequence[int],
    repeats: Int64[np.ndarray, "M"],
    stop: StopSignal,
) -> list[Path]:
    """Makes this run's share of the shards, those that are not there; returns all of them."""
    count = len(rows)
    blocks = [rows[first : first + BLOCK] for first in range(0, count, BLOCK)]
    shards = [records / f"{n:05d}.parquet" for n in range(len(blocks))]
    with Progress(f"filter: rollouts of {count:,} prompts", total=count) as progress:
        for n in range(own.part, len(blocks), own.parts):
            first = n * BLOCK
            if not shards[n].is_file():

                def show(done: int, first: int = first) -> None:
                    """Says how many prompts have their rollouts."""
                    progress.update(first + done)

                found = recorder.records(params, source, blocks[n], repeats, n, show)
                write_records(shards[n], found, recorder.step_names)
            progress.update(first + len(blocks[n]))
            if stop:
                say(f"{stop.name}: {n + 1} of {len(blocks)} blocks are kept in {records}")
                raise SystemExit(stop.exit_code)
    return shards


class Recorder:
    """Measures prompts with a policy, a block at a time.

    Args:
      config: of the run.
      policy: model, prompts and devices; its parameters are not read.
      confidence: a pair of whose class the policy is surer than this gets no rollouts.
    """

    def __init__(self, config: Config, policy: Policy, confidence: float):
        self._seed, self._count = config.seed, config.filter.rollouts
        self._judge = Judge(policy, config.eval.batch_size)
        self._look = jax.jit(make_look(policy))
        self._confidence = confidence
        self._format, self._width = policy.format, policy.model.config.dim
        self.step_names = policy.format.schema.names

    def records(
        self,
        params: Any,
        source: ExampleSource,
        rows: Sequence[int],
        repeats: Int64[np.ndarray, "M"],
        block: int,
        show: Callable[[int], None],
    ) -> list[PromptRecord]:
        """The records of some rows; those among ``repeats`` are not measured."""
        left_out = set(repeats.tolist())
        examples = {row: source[row] for row in rows}
        asked = [row for row in rows if row not in left_out]
        looked = self._greedy(params, [examples[row] for row in asked])
        seen = dict(zip(asked, looked, strict=True))
        sampled = [
            row for row in asked if examples[row].label is not None and self._unsure(seen[row][0])
        ]
        # Each block has rollouts of its own, whichever blocks were made before it.
        seed = int(np.random.SeedSequence((self._seed, block)).generate_state(1)[0])
        groups = self._judge.samples(
            params, [examples[row] for row in sampled], self._count, seed, show
        )
        rollouts = dict(zip(sampled, groups, strict=True))
        none = (None, np.zeros(self._width, np.float16))
        return [
            _record(
                row, examples[row], self._format.schema, *seen.get(row, none), rollouts.get(row, [])
            )
            for row in rows
        ]

    def _unsure(self, confidence: float | None) -> bool:
        # Rounding may lift a probability above 1, and at 1 nothing is left out.
        return self._confidence >= 1 or confidence is None or confidence <= self._confidence

    def _greedy(
        self, params: Any, examples: Sequence[Example]
    ) -> list[tuple[float | None, np.ndarray]]:
        """Confidence and embedding of each pair, by its greedy chain."""
        found: list[tuple[float | None, np.ndarray]] = []
        for part, rollout, chains in self._judge.read(params, examples, range(len(examples))):
            where, rivals = label_tokens(self._format, rollout, chains)
            shares, places = jax.device_get(self._look(params, rollout, where, rivals))
            for n in range(len(part)):
                sure = float(shares[n].max()) if where[n] else None
                found.append((sure, places[n].astype(np.float16)))
        return found


def _record(
    row: int,
    example: Example,
    schema: CotSchema,
    confidence: float | None,
    embedding: np.ndarray,
    samples: Sequence[Sample],
) -> PromptRecord:
    outcomes = [outcome_reward(s.chain, example, truncated=s.truncated) for s in samples]
    told = [verify(sample.chain, example, schema) for sample in samples]
    rates: list[float | None] = []
    for k in range(len(schema.steps)):
        known = [bool(rewards[k] >= FULL_MARKS) for rewards, known in told if known[k]]
        rates.append(sum(known) / len(known) if known else None)
    texts = tuple(sample.text for sample in samples)
    return PromptRecord(
        row=row,
        uid=example.uid,
        query=example.query,
        title=example.product["title"],
        label=example.label,
        kind=example.kind,
        confidence=confidence,
        right=tuple(reward >= FULL_MARKS for reward in outcomes),
        paths=tuple(schema.path(sample.chain) for sample in samples),
        step_rates=tuple(rates),
        texts=texts,
        embedding=embedding,
    )


def _repeats(
    records: Path, source: ExampleSource, rows: Sequence[int], similarity: float
) -> Int64[np.ndarray, "M"]:
    """Rows whose text nearly repeats an earlier one of the same query.

    What they are found by is kept beside the records: a signature of each text, and its query's.
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

            found = signatures(texts())
        _, asked = np.unique(queries, return_inverse=True)
        part = _own_part(path)  # other filter.parts may be at it too, with the same result
        with part.open("wb") as file:
            np.save(file, np.column_stack([found, asked.astype(np.uint32)]))
        part.replace(path)
    kept = np.load(path, allow_pickle=False)
    earlier = near_duplicates(kept[:, :-1], similarity, kept[:, -1])
    return np.asarray(rows, np.int64)[earlier >= 0]


def _looked_at(config: Config, size: int) -> list[int]:
    """The rows to look at, ascending; of another ``skip`` they are others, if there are so many."""
    own, rows = config.filter, in_no_order(config.data.name, size)
    count = min(own.pairs, size)
    # A set that is smaller than what is skipped is begun anew.
    return sorted(int(rows[(own.skip + n) % size]) for n in range(count))


def _claim(
    records: Path, identity: Mapping[str, Any], thresholds: FilterConfig
) -> Mapping[str, float]:
    """Makes the folder of the records, or checks that they are what this filter needs.

    Returns:
      The thresholds that say which pairs get rollouts: those of the filter that came first, so
      that a block which a stricter one makes serves the first one too.
    """
    path = records / "made.json"
    own = {"confidence": thresholds.confidence, "similarity": thresholds.similarity}
    if not path.is_file():
        records.mkdir(parents=True, exist_ok=True)
        part = _own_part(path)
        part.write_text(json.dumps({**identity, **own}, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    then = json.loads(path.read_text(encoding="utf-8"))
    then.setdefault("spread", False)  # as records were that do not say so
    if others := {k: (then.get(k), v) for k, v in identity.items() if then.get(k) != v}:
        lines = [f"  {key}: {was} in the records, {now} now" for key, (was, now) in others.items()]
        raise ValueError(
            f"filter.records={records} holds records of something else:\n"
            + "\n".join(lines)
            + "\nGive another folder, or the values of these records"
        )
    looser = [k for k in own if _reach(k, own[k]) > _reach(k, then[k])]
    if looser:
        told = ", ".join(f"{k} {then[k]}" for k in looser)
        now = ", ".join(f"{k} {own[k]}" for k in looser)
        raise ValueError(
            f"filter.records={records} were made with {told}: what that left out has no rollouts. "
            f"Ask for no more than that (now: {now}), or give another folder"
        )
    return {key: then[key] for key in own}


def _reach(name: str, value: float) -> float:
    """How far a threshold lets pairs through to the rollouts; a similarity of 0 lets all."""
    return 2.0 if name == "similarity" and not value else value


def _digest(params: Any) -> str:
    """Tells one policy from another."""
    told = sha256()
    for leaf in jax.tree.leaves(jax.device_get(params)):
        told.update(np.ascontiguousarray(leaf).tobytes())
    return told.hexdigest()[:16]


def _own_part(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid4().hex}.part")


FILTER_RUN = ("pairs", "skip", "rollouts", "records", "part", "parts")  # not FilterConfig's


def filter_config(config: Config) -> FilterConfig:
    """The thresholds and quotas of a run's config.

    Raises:
      ValueError: if one is out of its range.
    """
    own = {k: v for k, v in config.filter.items() if k not in FILTER_RUN}
    return FilterConfig(**own | {"front": tuple(own["front"]), "seed": config.seed})
