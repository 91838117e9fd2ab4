"""Diversified data filtering: which prompts a policy can learn most from, and why not the others.

First near-duplicate pairs go. Of the rest those go that the policy is sure of, or gets right too
often or too seldom, or always by the same path. What is left is chosen evenly over class, kind of
query, difficulty and region of the policy's embedding, the most diverse rollouts first.

Everything here is pure: it reads ``she_jax.data.records`` shards and returns arrays sorted by row,
so that any split into shards, done in any order by any number of processes, gives the same result.

Reconstruction: the paper (arXiv 2510.07972) names diversified data filtering, and no more of it
than that could be obtained.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float16, Float32, Int, Int8, Int16, Int32, Int64, UInt64
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits

from she_jax.data.records import embeddings, read_columns

REASONS = (
    "kept",
    "duplicate",  # nearly the text of an earlier pair
    "confident",  # the policy is surer of its class than FilterConfig.confidence
    "unlabelled",  # no human label, so no outcome is known
    "unmeasured",  # labelled, but no rollouts were recorded
    "easy",  # pass rate above FilterConfig.high
    "hard",  # pass rate below FilterConfig.low
    "one_path",  # path entropy below FilterConfig.min_entropy
    "quota",  # good enough, but its quota was full
)
DIFFICULTIES = ("easy", "medium", "hard")

_CHUNK = 16_384
_FITTED = 20_000  # embeddings that k-means sees


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The thresholds and quotas of a filter.

    Attributes:
      similarity: Jaccard similarity of the texts' shingles from which on a pair repeats an earlier
        one, 0.5 to 1; 0 switches it off.
      confidence: pairs of whose class the policy is surer than this go; 1 keeps all.
      low: lowest pass rate kept.
      high: highest pass rate kept.
      min_entropy: lowest path entropy kept, in nats.
      size: how many prompts to keep; 0 keeps all that pass.
      balance: even quotas over class, kind and difficulty, and inside of them over clusters; else a
        seeded random choice.
      clusters: clusters of the embeddings; 0 for none.
      front: kinds of query that come first.
      front_share: share of ``size`` for the kinds in front, as far as they go.
      seed: of the random choices.

    Raises:
      ValueError: if a value is out of its range.
    """

    similarity: float = 0.9
    confidence: float = 1.0
    low: float = 0.0
    high: float = 1.0
    min_entropy: float = 0.0
    size: int = 0
    balance: bool = True
    clusters: int = 16
    front: tuple[str, ...] = ()
    front_share: float = 0.75
    seed: int = 0

    def __post_init__(self):
        checks = {
            "similarity": (self.similarity == 0 or 0.5 <= self.similarity <= 1, "0, or 0.5 to 1"),
            "confidence": (0 < self.confidence <= 1, "above 0, to 1"),
            "low": (0 <= self.low <= self.high, f"0 to high={self.high}"),
            "high": (self.low <= self.high <= 1, f"low={self.low} to 1"),
            "min_entropy": (self.min_entropy >= 0, "0 or more nats"),
            "size": (self.size >= 0, "0 or more prompts"),
            "clusters": (self.clusters >= 0, "0 or more"),
            "front_share": (0 <= self.front_share <= 1, "0 to 1"),
            "seed": (0 <= self.seed < 2**32, "0 to 2**32 - 1"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"{name}={getattr(self, name)}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a filter has to know of each prompt, sorted by row.

    Attributes:
      row: rows of the split, ascending, each once.
      label: relevance class, 0 where nobody judged the pair.
      kind: index into ``kinds``.
      kinds: the kinds of query that occur, sorted.
      confidence: see ``PromptRecord``; NaN where it is not known.
      rollouts: how many were made.
      pass_rate: share of them that are right; NaN without rollouts.
      entropy: path entropy in nats; NaN without rollouts.
      distinct: share of distinct bigrams of the rollouts' words; NaN where there are none.
      embedding: see ``PromptRecord``.
    """

    row: Int64[np.ndarray, "N"]
    label: Int8[np.ndarray, "N"]
    kind: Int16[np.ndarray, "N"]
    kinds: tuple[str, ...]
    confidence: Float32[np.ndarray, "N"]
    rollouts: Int16[np.ndarray, "N"]
    pass_rate: Float32[np.ndarray, "N"]
    entropy: Float32[np.ndarray, "N"]
    distinct: Float32[np.ndarray, "N"]
    embedding: Float16[np.ndarray, "N D"]


@dataclass(frozen=True, kw_only=True)
class Quota:
    """A cell's even share of the size, in words such as ``class 4, negation, hard``.

    ``wanted`` is that share, ``available`` how many prompts the thresholds left, ``kept`` how many
    were taken: more than wanted where other cells had too few.
    """

    cell: str
    wanted: int
    available: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What becomes of the prompts of a survey.

    Attributes:
      reason: index into ``REASONS`` for each prompt of the survey, 0 where it is kept.
      cluster: cluster of each prompt; -1 where it was not clustered.
      quotas: every cell's quota; empty if ``FilterConfig.size`` is 0.
    """

    reason: Int8[np.ndarray, "N"]
    cluster: Int32[np.ndarray, "N"]
    quotas: tuple[Quota, ...]

    @property
    def unmet(self) -> tuple[Quota, ...]:
        """The quotas that had fewer prompts than wanted."""
        return tuple(quota for quota in self.quotas if quota.available < quota.wanted)


def path_entropy(paths: Sequence[str]) -> float:
    """Entropy of the paths that a prompt's rollouts take.

    H = -sum_p (c_p / n) log(c_p / n), c_p being how many of the n rollouts take path p.

    Returns:
      Nats, 0 (all take one path) to log n (each its own); NaN without rollouts.
    """
    n = len(paths)
    # Equal counts in any order of the paths give the same sum, to the last bit.
    counts = sorted(Counter(paths).values())
    return max(0.0, math.log(n) - math.fsum(c * math.log(c) for c in counts) / n) if n else math.nan


def difficulty(pass_rate: Float32[np.ndarray, "N"]) -> Int8[np.ndarray, "N"]:
    """Index into ``DIFFICULTIES``: easy from 2/3 on, medium from 1/3 (ARES, arXiv 2510.08457)."""
    return np.where(pass_rate >= 2 / 3, 0, np.where(pass_rate >= 1 / 3, 1, 2)).astype(np.int8)


def water_fill(counts: Int[np.ndarray, "C"], total: int) -> Int64[np.ndarray, "C"]:
    """Quotas as even as the supply allows.

    The highest level at which ``sum_c min(counts_c, level) <= total``; what is left after that goes
    to the first cells that have more, one each.

    Args:
      counts: what each cell has.
      total: how many to hand out; all are, or everything there is.

    Returns:
      What each cell gives.
    """
    counts = np.asarray(counts, np.int64)
    total = min(total, int(counts.sum()))
    low, high = 0, int(counts.max(initial=0))
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.minimum(counts, level).sum() <= total else (low, level - 1)
    quota = np.minimum(counts, low)
    quota[np.flatnonzero(counts > low)[: total - int(quota.sum())]] += 1
    return quota


def survey(path: Path) -> Survey:
    """Surveys a shard; reads its small columns only, no texts.

    Raises:
      ValueError: if the file is no whole shard of records, or has a row twice.
    """
    names = ("row", "label", "kind", "confidence", "right", "paths", "distinct", "embedding")
    table = read_columns(path, names)
    values = {name: table.column(name) for name in names[:-1]}
    kind = values["kind"].combine_chunks().dictionary_encode()
    right = values["right"].combine_chunks()
    ends = right.offsets.to_numpy().astype(np.int64)
    passed = np.concatenate([[0], np.cumsum(right.values.to_numpy(zero_copy_only=False))])
    rollouts = np.diff(ends)
    known = np.where(rollouts > 0, rollouts, 1)
    rate = np.where(rollouts > 0, (passed[ends[1:]] - passed[ends[:-1]]) / known, np.nan)
    one = Survey(
        row=values["row"].to_numpy(),
        label=values["label"].fill_null(0).to_numpy(),
        kind=kind.indices.to_numpy().astype(np.int16),
        kinds=tuple(kind.dictionary.to_pylist()),
        confidence=values["confidence"].fill_null(math.nan).to_numpy().astype(np.float32),
        rollouts=rollouts.astype(np.int16),
        pass_rate=rate.astype(np.float32),
        entropy=np.array([path_entropy(x) for x in values["paths"].to_pylist()], np.float32),
        distinct=values["distinct"].to_numpy(),
        embedding=embeddings(table),
    )
    return merge([one])


def merge(surveys: Sequence[Survey]) -> Survey:
    """One survey of several: whatever their order and however the rows are split over them.

    Raises:
      ValueError: if there is none, a row comes twice, or embeddings differ in width.
    """
    widths = sorted({one.embedding.shape[1] for one in surveys})
    if len(widths) != 1:
        raise ValueError(f"surveys with embeddings of widths {widths}: expected one, of one policy")
    row = np.concatenate([one.row for one in surveys])
    order = np.argsort(row)
    row = row[order]
    if len(twice := row[1:][row[1:] == row[:-1]]):
        raise ValueError(
            f"{len(twice)} rows come twice, row {twice[0]} first: expected shards that share no "
            "rows. Record each block of rows once, into a folder of its own"
        )
    kinds = tuple(sorted({one.kinds[k] for one in surveys for k in np.unique(one.kind)}))
    place = {kind: k for k, kind in enumerate(kinds)}
    codes = [
        np.array([place.get(kind, -1) for kind in one.kinds], np.int16)[one.kind] for one in surveys
    ]
    # Scattered survey by survey, so that there is never a third copy of the embeddings.
    target = np.empty_like(order)
    target[order] = np.arange(len(order))
    embedding = np.empty((len(row), widths[0]), np.float16)
    start = 0
    for one in surveys:
        embedding[target[start : start + len(one.row)]] = one.embedding
        start += len(one.row)
    names = ("label", "confidence", "rollouts", "pass_rate", "entropy", "distinct")
    columns = {n: np.concatenate([getattr(one, n) for one in surveys])[order] for n in names}
    kind = np.concatenate(codes)[order]
    return Survey(row=row, kind=kind, kinds=kinds, embedding=embedding, **columns)


def select(
    survey: Survey, config: FilterConfig, duplicates: Int64[np.ndarray, "M"] | None = None
) -> Selection:
    """Decides on every prompt of a survey.

    A prompt goes for the first of these that is true of it, in the order of ``REASONS``; what is
    left competes for ``config.size`` places. The kinds in front get their share first. Each part is
    split over the cells class x kind x difficulty by ``water_fill``, a cell over its clusters
    likewise, and in a cluster the highest path entropy comes first, then the highest distinct-2,
    then a hash of seed and row.

    Args:
      survey: of all shards, merged.
      config: thresholds and quotas.
      duplicates: rows that nearly repeat an earlier one; they need not be in the survey.

    Raises:
      ValueError: if no prompt is left; says which threshold emptied it.
    """
    reason = _thresholds(survey, config, duplicates)
    passed = np.flatnonzero(reason == 0)
    if not len(passed):
        raise ValueError(_emptied(reason, config))
    cluster = np.full(len(reason), -1, np.int32)
    if not config.size:
        return Selection(reason=reason, cluster=cluster, quotas=())
    if config.balance and config.clusters:
        cluster[passed] = _clusters(survey, passed, config)
    codes = [k for k, kind in enumerate(survey.kinds) if kind in config.front]
    front = np.isin(survey.kind[passed], codes)
    wanted = round(config.front_share * config.size) if config.front else 0
    others = min(int((~front).sum()), config.size - min(wanted, int(front.sum())))
    parts = [("kinds in front", front, wanted, config.size - others)] if config.front else []
    title = "other kinds" if config.front else "all"
    parts.append((title, ~front, config.size - wanted, others))
    quotas = []
    for title, inside, share, places in parts:
        rows = passed[inside]
        taken = min(places, len(rows))
        quotas.append(Quota(cell=title, wanted=share, available=len(rows), kept=taken))
        if config.balance and len(rows):
            keep, cells = _balanced(survey, rows, cluster[rows], taken, config.seed)
            quotas += cells
        else:
            keep = np.argsort(np.argsort(_shuffled(survey.row[rows], config.seed))) < taken
        reason[rows[~keep]] = REASONS.index("quota")
    return Selection(reason=reason, cluster=cluster, quotas=tuple(quotas))


def _thresholds(
    survey: Survey, config: FilterConfig, duplicates: Int64[np.ndarray, "M"] | None
) -> Int8[np.ndarray, "N"]:
    """The first reason of each prompt before the quotas, 0 for none."""
    checks = {
        "duplicate": np.isin(survey.row, [] if duplicates is None else duplicates),
        # At 1 nothing goes: rounding may lift a probability above it.
        "confident": (survey.confidence > config.confidence) & (config.confidence < 1),
        "unlabelled": survey.label == 0,
        "unmeasured": survey.rollouts == 0,
        "easy": survey.pass_rate > config.high,
        "hard": survey.pass_rate < config.low,
        "one_path": survey.entropy < config.min_entropy,
    }
    reason = np.zeros(len(survey.row), np.int8)
    for name, fails in checks.items():
        reason[(reason == 0) & fails] = REASONS.index(name)
    return reason


def _emptied(reason: Int8[np.ndarray, "N"], config: FilterConfig) -> str:
    """Says which threshold took the last prompts, and what to change."""
    rules = {
        "duplicate": (f"similarity={config.similarity}", "raise it, or give 0 to keep them"),
        "confident": (f"confidence={config.confidence}", "raise it; 1 keeps all"),
        "unlabelled": ("the lack of labels", "filter a split whose pairs have been judged"),
        "unmeasured": ("the lack of rollouts", "record these pairs anew"),
        "easy": (f"high={config.high}", "raise it, or give the policy harder pairs"),
        "hard": (f"low={config.low}", "lower it, or train the policy further first"),
        "one_path": (
            f"min_entropy={config.min_entropy}",
            "lower it, or sample at a higher temperature",
        ),
    }
    counts = {name: int((reason == REASONS.index(name)).sum()) for name in rules}
    dropped = [f"{name} {count} ({rules[name][0]})" for name, count in counts.items() if count]
    if not dropped:
        return "no prompts to filter: the survey is empty; expected records of at least one"
    last = [name for name, count in counts.items() if count][-1]
    rule, advice = rules[last]
    return (
        f"no prompt is left of {len(reason)}; dropped, in this order: {', '.join(dropped)}. "
        f"{rule} took the last {counts[last]}: {advice}"
    )


def _clusters(
    survey: Survey, passed: Int64[np.ndarray, "M"], config: FilterConfig
) -> Int32[np.ndarray, "M"]:
    """k-means clusters of the embeddings of some prompts."""
    order = np.argsort(_shuffled(survey.row[passed], config.seed))
    sample = passed[np.sort(order[:_FITTED])]
    count = min(config.clusters, len(sample))
    model = MiniBatchKMeans(count, random_state=config.seed, batch_size=1024)
    found = np.empty(len(passed), np.int32)
    with threadpool_limits(1):  # the order of a sum, and so a cluster, would depend on the machine
        model.fit(survey.embedding[sample].astype(np.float32))
        for start in range(0, len(passed), _CHUNK):
            part = survey.embedding[passed[start : start + _CHUNK]].astype(np.float32)
            found[start : start + _CHUNK] = model.predict(part)
    return found


def _balanced(
    survey: Survey,
    rows: Int64[np.ndarray, "M"],
    cluster: Int32[np.ndarray, "M"],
    places: int,
    seed: int,
) -> tuple[Bool[np.ndarray, "M"], list[Quota]]:
    """Which of some prompts get a place, and the quotas of their cells."""
    columns = survey.label[rows], survey.kind[rows], difficulty(survey.pass_rate[rows])
    axes = [np.unique(column, return_inverse=True) for column in columns]
    shape = tuple(len(values) for values, _ in axes)
    cell = np.ravel_multi_index(tuple(codes for _, codes in axes), shape)
    counts = np.bincount(cell, minlength=math.prod(shape))
    quota = water_fill(counts, places)
    even = water_fill(np.full(len(counts), places), places)
    quotas = []
    for k, (wanted, available, kept) in enumerate(zip(even, counts, quota, strict=True)):
        label, kind, bucket = (axes[i][0][at] for i, at in enumerate(np.unravel_index(k, shape)))
        name = f"class {label}, {survey.kinds[kind] or 'no kind'}, {DIFFICULTIES[bucket]}"
        quotas.append(
            Quota(cell=name, wanted=int(wanted), available=int(available), kept=int(kept))
        )
    clusters = int(cluster.max(initial=0)) + 1
    group = cell * clusters + np.maximum(cluster, 0)
    sizes = np.bincount(group, minlength=len(counts) * clusters)
    nested = zip(sizes.reshape(len(counts), clusters), quota, strict=True)
    limits = np.concatenate([water_fill(own, int(total)) for own, total in nested])
    distinct = np.nan_to_num(survey.distinct[rows], nan=-1.0)
    tie = _shuffled(survey.row[rows], seed)
    order = np.lexsort((tie, -distinct, -survey.entropy[rows], group))
    start = np.cumsum(sizes) - sizes
    rank = np.arange(len(rows)) - start[group[order]]
    keep = np.zeros(len(rows), bool)
    keep[order] = rank < limits[group[order]]
    return keep, quotas


def _shuffled(row: Int64[np.ndarray, "M"], seed: int) -> UInt64[np.ndarray, "M"]:
    """A number for each row, another for each, that orders them as if at random (splitmix64)."""
    z = row.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return z ^ (z >> np.uint64(31))
