"""Diversified data filtering: selects the prompts that a policy can learn most from.

Near-duplicates are dropped first. Then prompts are dropped on which the policy is confident, whose
pass rate is too high or too low, or whose rollouts take too few paths. The rest is selected evenly
over class, kind, difficulty and cluster of the policy's embeddings, most diverse rollouts first.

All functions are pure. They read shards of ``she_jax.filtering.records`` and return arrays sorted
by row, so the result does not depend on how rows are split into shards or on their order.

Reconstruction: the paper (arXiv 2510.07972) names diversified data filtering, without details in
what could be obtained.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float16, Float32, Int, Int8, Int16, Int32, Int64, UInt64

from she_jax.filtering.records import embeddings, read_columns
from she_jax.types import UserError

REASONS = (
    "kept",
    "duplicate",  # near-duplicate of an earlier pair
    "confident",  # the policy's confidence is above FilterConfig.confidence
    "unlabeled",  # no label, so no outcome reward is known
    "unmeasured",  # labeled, but without recorded rollouts
    "easy",  # pass rate above FilterConfig.high
    "hard",  # pass rate below FilterConfig.low
    "one_path",  # path entropy below FilterConfig.min_entropy
    "quota",  # passed all thresholds, but its quota was full
)
DIFFICULTIES = ("easy", "medium", "hard")

_CHUNK = 16_384  # embeddings assigned to clusters at a time
_MAX_FIT = 20_000  # embeddings that k-means is fitted to


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The thresholds and quotas of a filter.

    Attributes:
      similarity: smallest Jaccard similarity of shingles at which a pair counts as a near-duplicate
        of an earlier one, in [0.5, 1]; 0 disables deduplication.
      confidence: largest confidence of the policy in its label, in (0, 1]; 1 keeps all prompts.
      low: lowest pass rate kept, in [0, 1].
      high: highest pass rate kept, in [0, 1].
      min_entropy: lowest path entropy kept, in nats.
      size: number of prompts to keep; 0 keeps all that pass the thresholds.
      balance: if ``size`` is set, even quotas over class, kind and difficulty, then clusters; else
        a random choice.
      clusters: number of clusters of the embeddings; 0 for no clustering.
      front: kinds of query that have priority.
      front_share: share of ``size`` for the kinds in ``front``, in [0, 1]; they get more if the
        other kinds have too few prompts, and less if they have too few themselves.
      seed: seed of the random choices.

    Raises:
      UserError: if a value is out of range.
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
        for name, (valid, expected) in checks.items():
            if not valid:
                raise UserError(f"{name}={getattr(self, name)}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Statistics of each prompt that the filter selects by, sorted by row.

    Attributes:
      row: rows of the split, ascending and unique.
      label: index into ``labels``.
      labels: the relevance classes that occur, as text, sorted; "" for an unknown one.
      kind: index into ``kinds``.
      kinds: the kinds of query that occur, sorted.
      confidence: see ``PromptRecord``; NaN if unknown.
      rollouts: number of rollouts.
      pass_rate: share of correct rollouts; NaN without rollouts.
      entropy: path entropy in nats; NaN without rollouts.
      distinct: distinct-2 of the rollouts' texts; NaN without bigrams.
      embedding: see ``PromptRecord``.
    """

    row: Int64[np.ndarray, "N"]
    label: Int16[np.ndarray, "N"]
    labels: tuple[str, ...]
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
    """The quota of a cell, such as ``class 4, negation, hard``.

    ``wanted`` is the cell's even share of the size, ``available`` the number of prompts that passed
    the thresholds, ``kept`` the number selected: above ``wanted`` if other cells had too few.
    """

    cell: str
    wanted: int
    available: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The filter's decision on each prompt of a survey.

    Attributes:
      reason: index into ``REASONS``; 0 if the prompt is kept.
      cluster: index of the prompt's cluster; -1 if it was not clustered.
      quotas: the quotas of all cells; empty if ``FilterConfig.size`` is 0.
    """

    reason: Int8[np.ndarray, "N"]
    cluster: Int32[np.ndarray, "N"]
    quotas: tuple[Quota, ...]

    @property
    def unmet(self) -> tuple[Quota, ...]:
        """The quotas with fewer prompts available than wanted."""
        return tuple(quota for quota in self.quotas if quota.available < quota.wanted)


def path_entropy(paths: Sequence[str]) -> float:
    """Entropy of the distribution of paths over a prompt's rollouts.

    H = -sum_p (c_p / n) log(c_p / n), where c_p of the n rollouts take path p.

    Returns:
      Entropy in nats, from 0 (a single path) to log n (all different); NaN without rollouts.
    """
    n = len(paths)
    # Sorted, so that the result is bitwise independent of the order of the paths.
    counts = sorted(Counter(paths).values())
    return max(0.0, math.log(n) - math.fsum(c * math.log(c) for c in counts) / n) if n else math.nan


def difficulty(pass_rate: Float32[np.ndarray, "N"]) -> Int8[np.ndarray, "N"]:
    """Index into ``DIFFICULTIES``: easy from 2/3 up, medium from 1/3 (ARES, arXiv 2510.08457)."""
    return np.where(pass_rate >= 2 / 3, 0, np.where(pass_rate >= 1 / 3, 1, 2)).astype(np.int8)


def water_fill(counts: Int[np.ndarray, "C"], total: int) -> Int64[np.ndarray, "C"]:
    """Distributes a total over cells as evenly as their counts allow.

    Each cell gets ``min(counts_c, level)``, with the highest level at which the sum is at most
    ``total``. The remainder goes to the first cells with larger counts, one each.

    Args:
      counts: number of prompts in each cell.
      total: number of prompts to select; capped at the sum of the counts.

    Returns:
      Number of prompts to select from each cell.
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
    """Computes the survey of a shard from its small columns, without reading the texts.

    Raises:
      UserError: if the file is not a complete shard of records, or has a row twice.
    """
    names = ("row", "label", "kind", "confidence", "right", "paths", "distinct", "embedding")
    table = read_columns(path, names)
    columns = {name: table.column(name) for name in names[:-1]}
    label = columns["label"].fill_null("").combine_chunks().dictionary_encode()
    kind = columns["kind"].combine_chunks().dictionary_encode()
    right = columns["right"].combine_chunks()
    offsets = right.offsets.to_numpy().astype(np.int64)
    cumulative = np.concatenate([[0], np.cumsum(right.values.to_numpy(zero_copy_only=False))])
    n_right = cumulative[offsets[1:]] - cumulative[offsets[:-1]]
    rollouts = np.diff(offsets)
    pass_rate = np.where(rollouts > 0, n_right / np.where(rollouts > 0, rollouts, 1), np.nan)
    unsorted = Survey(
        row=columns["row"].to_numpy(),
        label=label.indices.to_numpy().astype(np.int16),
        labels=tuple(label.dictionary.to_pylist()),
        kind=kind.indices.to_numpy().astype(np.int16),
        kinds=tuple(kind.dictionary.to_pylist()),
        confidence=columns["confidence"].fill_null(math.nan).to_numpy().astype(np.float32),
        rollouts=rollouts.astype(np.int16),
        pass_rate=pass_rate.astype(np.float32),
        entropy=np.array([path_entropy(p) for p in columns["paths"].to_pylist()], np.float32),
        distinct=columns["distinct"].to_numpy(),
        embedding=embeddings(table),
    )
    return merge([unsorted])


def merge(surveys: Sequence[Survey]) -> Survey:
    """Merges surveys; the result does not depend on their order or on the split of the rows.

    Raises:
      UserError: if there are no surveys, a row occurs twice, or embeddings differ in width.
    """
    widths = sorted({survey.embedding.shape[1] for survey in surveys})
    if len(widths) != 1:
        raise UserError(f"surveys with embeddings of widths {widths}: expected one, of one policy")
    row = np.concatenate([survey.row for survey in surveys])
    order = np.argsort(row)
    row = row[order]
    if len(repeats := row[1:][row[1:] == row[:-1]]):
        raise UserError(
            f"{len(repeats)} rows come twice, row {repeats[0]} first: expected shards that share "
            "no rows. Record each block of rows once, into a folder of its own"
        )
    kind, kinds = _merge_codes([(survey.kind, survey.kinds) for survey in surveys])
    label, labels = _merge_codes([(survey.label, survey.labels) for survey in surveys])
    # Scattered survey by survey, which avoids a third copy of the embeddings.
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    embedding = np.empty((len(row), widths[0]), np.float16)
    start = 0
    for survey in surveys:
        embedding[inverse[start : start + len(survey.row)]] = survey.embedding
        start += len(survey.row)
    names = ("confidence", "rollouts", "pass_rate", "entropy", "distinct")
    columns = {n: np.concatenate([getattr(survey, n) for survey in surveys])[order] for n in names}
    return Survey(
        row=row,
        label=label[order],
        labels=labels,
        kind=kind[order],
        kinds=kinds,
        embedding=embedding,
        **columns,
    )


def _merge_codes(
    parts: Sequence[tuple[Int16[np.ndarray, "M"], tuple[str, ...]]],
) -> tuple[Int16[np.ndarray, "N"], tuple[str, ...]]:
    """One column of codes with sorted names from several, without names that do not occur."""
    names = tuple(sorted({names[k] for codes, names in parts for k in np.unique(codes)}))
    index = {name: k for k, name in enumerate(names)}
    columns = [np.array([index.get(n, -1) for n in part], np.int16)[codes] for codes, part in parts]
    return np.concatenate(columns), names


def select(
    survey: Survey, config: FilterConfig, duplicates: Int64[np.ndarray, "M"] | None = None
) -> Selection:
    """Selects the prompts of a survey to keep.

    A prompt is dropped for the first reason that applies, in the order of ``REASONS``. From the
    rest, ``config.size`` prompts are selected. The kinds in ``config.front`` get their share first.
    Each share is distributed by ``water_fill`` over the cells (class, kind, difficulty), and each
    cell's quota over its clusters. Within a cluster, prompts are ranked by path entropy, then
    distinct-2 (both descending), then a hash of seed and row.

    Args:
      survey: the merged survey of all shards.
      config: thresholds and quotas.
      duplicates: rows of near-duplicates of an earlier row; they need not be in the survey.

    Raises:
      UserError: if no prompt is left; the message names the threshold that dropped the last ones.
    """
    reason = _threshold_reasons(survey, config, duplicates)
    passed = np.flatnonzero(reason == 0)
    if not len(passed):
        raise UserError(_nothing_left_message(reason, config))
    cluster = np.full(len(reason), -1, np.int32)
    if not config.size:
        return Selection(reason=reason, cluster=cluster, quotas=())
    if config.balance and config.clusters:
        cluster[passed] = _fit_clusters(survey, passed, config)
    front_kinds = [k for k, kind in enumerate(survey.kinds) if kind in config.front]
    front = np.isin(survey.kind[passed], front_kinds)
    front_quota = round(config.front_share * config.size) if config.front else 0
    n_other = min(int((~front).sum()), config.size - min(front_quota, int(front.sum())))
    parts = [("kinds in front", front, front_quota, config.size - n_other)] if config.front else []
    title = "other kinds" if config.front else "all"
    parts.append((title, ~front, config.size - front_quota, n_other))
    quotas = []
    for title, members, wanted, limit in parts:
        candidates = passed[members]
        size = min(limit, len(candidates))
        quotas.append(Quota(cell=title, wanted=wanted, available=len(candidates), kept=size))
        if config.balance and len(candidates):
            keep, cells = _select_evenly(survey, candidates, cluster[candidates], size, config.seed)
            quotas += cells
        else:
            keep = np.argsort(np.argsort(_hash_rows(survey.row[candidates], config.seed))) < size
        reason[candidates[~keep]] = REASONS.index("quota")
    return Selection(reason=reason, cluster=cluster, quotas=tuple(quotas))


def _threshold_reasons(
    survey: Survey, config: FilterConfig, duplicates: Int64[np.ndarray, "M"] | None
) -> Int8[np.ndarray, "N"]:
    """The first threshold that drops each prompt, as an index into ``REASONS``; 0 for none."""
    fails = {
        "duplicate": np.isin(survey.row, [] if duplicates is None else duplicates),
        # A threshold of 1 drops nothing, although rounding may lift a probability above 1.
        "confident": (survey.confidence > config.confidence) & (config.confidence < 1),
        "unlabeled": np.array([not label for label in survey.labels])[survey.label],
        "unmeasured": survey.rollouts == 0,
        "easy": survey.pass_rate > config.high,
        "hard": survey.pass_rate < config.low,
        "one_path": survey.entropy < config.min_entropy,
    }
    reason = np.zeros(len(survey.row), np.int8)
    for name, mask in fails.items():
        reason[(reason == 0) & mask] = REASONS.index(name)
    return reason


def _nothing_left_message(reason: Int8[np.ndarray, "N"], config: FilterConfig) -> str:
    """An error message that names the threshold that dropped the last prompts, with advice."""
    rules = {
        "duplicate": (f"similarity={config.similarity}", "raise it, or give 0 to keep them"),
        "confident": (f"confidence={config.confidence}", "raise it; 1 keeps all"),
        "unlabeled": ("the lack of labels", "filter a split whose pairs are labeled"),
        "unmeasured": ("the lack of rollouts", "record these pairs again"),
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


def _fit_clusters(
    survey: Survey, indices: Int64[np.ndarray, "M"], config: FilterConfig
) -> Int32[np.ndarray, "M"]:
    """k-means clusters of the embeddings at the given indices of the survey."""
    from sklearn.cluster import MiniBatchKMeans  # slow, so not at every start
    from threadpoolctl import threadpool_limits

    order = np.argsort(_hash_rows(survey.row[indices], config.seed))
    sample = indices[np.sort(order[:_MAX_FIT])]
    n_clusters = min(config.clusters, len(sample))
    kmeans = MiniBatchKMeans(n_clusters, random_state=config.seed, batch_size=1024)
    cluster = np.empty(len(indices), np.int32)
    with threadpool_limits(1):  # more threads would add in another order and so change clusters
        kmeans.fit(survey.embedding[sample].astype(np.float32))
        for start in range(0, len(indices), _CHUNK):
            chunk = survey.embedding[indices[start : start + _CHUNK]].astype(np.float32)
            cluster[start : start + _CHUNK] = kmeans.predict(chunk)
    return cluster


def _select_evenly(
    survey: Survey,
    indices: Int64[np.ndarray, "M"],
    cluster: Int32[np.ndarray, "M"],
    size: int,
    seed: int,
) -> tuple[Bool[np.ndarray, "M"], list[Quota]]:
    """A mask of ``size`` prompts, even over cells and their clusters, and the cells' quotas."""
    columns = survey.label[indices], survey.kind[indices], difficulty(survey.pass_rate[indices])
    axes = [np.unique(column, return_inverse=True) for column in columns]
    shape = tuple(len(values) for values, _ in axes)
    cell = np.ravel_multi_index(tuple(codes for _, codes in axes), shape)
    counts = np.bincount(cell, minlength=math.prod(shape))
    quota = water_fill(counts, size)
    even = water_fill(np.full(len(counts), size), size)
    quotas = []
    for k, (wanted, available, kept) in enumerate(zip(even, counts, quota, strict=True)):
        label, kind, level = (axes[d][0][i] for d, i in enumerate(np.unravel_index(k, shape)))
        name = f"class {survey.labels[label]}, {survey.kinds[kind] or 'no kind'}"
        quotas.append(
            Quota(
                cell=f"{name}, {DIFFICULTIES[level]}",
                wanted=int(wanted),
                available=int(available),
                kept=int(kept),
            )
        )
    # A group is a cluster within a cell.
    n_clusters = int(cluster.max(initial=0)) + 1
    group = cell * n_clusters + np.maximum(cluster, 0)
    group_counts = np.bincount(group, minlength=len(counts) * n_clusters)
    cells = zip(group_counts.reshape(len(counts), n_clusters), quota, strict=True)
    group_quota = np.concatenate([water_fill(clusters, int(total)) for clusters, total in cells])
    distinct = np.nan_to_num(survey.distinct[indices], nan=-1.0)
    hashes = _hash_rows(survey.row[indices], seed)
    order = np.lexsort((hashes, -distinct, -survey.entropy[indices], group))
    group_start = np.cumsum(group_counts) - group_counts
    rank = np.arange(len(indices)) - group_start[group[order]]
    keep = np.zeros(len(indices), bool)
    keep[order] = rank < group_quota[group[order]]
    return keep, quotas


def _hash_rows(row: Int64[np.ndarray, "M"], seed: int) -> UInt64[np.ndarray, "M"]:
    """A seeded bijective hash of row numbers that gives a pseudo-random order (splitmix64)."""
    z = row.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return z ^ (z >> np.uint64(31))
