"""Intervals of metrics, and of differences between two judges, by resampling queries.

Pairs of the same query resemble each other, so intervals that resample pairs are too narrow. Here
whole queries are drawn with replacement (the cluster bootstrap), and the interval lies between
percentiles of the metric over the draws. Two judges are compared by the difference on the same
draws, never by two intervals. Equal queries give equal draws, whatever the order of the pairs.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

DRAWS = 1000
LEVEL = 0.95
MIN_DEFINED = 0.95  # share of the draws that need a value: what is missing is not missing by chance
_BLOCK = 2**20  # numbers drawn at a time


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A metric with its 95% interval; ``dataclasses.asdict`` gives JSON.

    Attributes:
      estimate: the metric over all pairs; None if it is undefined there.
      low: lower end of the interval; None if there is no interval.
      high: upper end; None if and only if ``low`` is.
      note: why there is no estimate, no interval, or one over fewer draws; else empty.
    """

    estimate: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""

    def __str__(self) -> str:
        if self.estimate is None:
            return f"none ({self.note})"
        if self.low is None or self.high is None:
            return f"{self.estimate:.3f} ({self.note})"
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(
    queries: Sequence[Hashable],
    metric: Callable[..., float],
    *arrays: Shaped[np.ndarray, "N ..."],
) -> Interval:
    """The interval of any metric of pairs, computed anew for every draw.

    Args:
      queries: the query of each pair, as text or number.
      metric: takes ``arrays`` and, as the last of them, how often each row counts (0 or more whole
        times, shape [N]); NaN where it is undefined.
      *arrays: a row per pair.

    Raises:
      ValueError: if the lengths differ.
    """
    check_lengths(queries, *arrays)
    if not len(queries):
        return Interval(estimate=None, note="no pairs")
    query_index = _query_index(queries)
    draws = (draw for block in _draws(query_index) for draw in block)
    values = [metric(*arrays, draw[query_index]) for draw in draws]
    return _percentiles(metric(*arrays, np.ones(len(query_index), int)), np.array(values))


def interval_of_sums(
    queries: Sequence[Hashable],
    metric: Callable[[Float[np.ndarray, "R ..."]], Float[np.ndarray, "R"]],
    rows: Shaped[np.ndarray, "N ..."],
) -> Interval:
    """The interval of a metric of sums over pairs, such as a confusion matrix; much faster.

    Args:
      queries: the query of each pair, as text or number.
      metric: from R sums, each of the shape of a row, to R values; NaN where it is undefined.
      rows: what each pair adds to the sums: its confusion matrix (``confusions``), or (value, 1)
        for a mean.

    Raises:
      ValueError: if the lengths differ.
    """
    check_lengths(queries, rows)
    if not len(queries):
        return Interval(estimate=None, note="no pairs")
    query_index = _query_index(queries)
    by_query = np.zeros((query_index.max() + 1, *rows.shape[1:]))
    np.add.at(by_query, query_index, rows)
    return _of_sums(query_index, metric, by_query)


def _of_sums(
    query_index: Int[np.ndarray, "N"],
    metric: Callable[[Float[np.ndarray, "R ..."]], Float[np.ndarray, "R"]],
    by_query: Float[np.ndarray, "Q ..."],
) -> Interval:
    # Not by BLAS, whose last digits change with the number of threads.
    values = [metric(np.einsum("rq,q...->r...", draw, by_query)) for draw in _draws(query_index)]
    return _percentiles(metric(by_query.sum(0)[None])[0], np.concatenate([*values, []]))


def interval_of_tables(
    queries: Sequence[Hashable],
    metric: Callable[[Float[np.ndarray, "R K L"]], Float[np.ndarray, "R"]],
    rows: Int[np.ndarray, "N"],
    columns: Int[np.ndarray, "N"],
    shape: tuple[int, int],
) -> Interval:
    """``interval_of_sums`` of a K x L table, such as a confusion matrix, in which each pair is a 1.

    Args:
      queries: the query of each pair.
      metric: from R tables to R values; NaN where it is undefined.
      rows: of the cell of each pair, in [0, K).
      columns: of the cell, in [0, L).
      shape: K and L.

    Raises:
      ValueError: if the lengths differ.
    """
    check_lengths(queries, rows, columns)
    if not len(queries):
        return Interval(estimate=None, note="no pairs")
    query_index = _query_index(queries)
    cells = np.ravel_multi_index((query_index, rows, columns), (query_index.max() + 1, *shape))
    counts = np.bincount(cells, minlength=(query_index.max() + 1) * shape[0] * shape[1])
    return _of_sums(query_index, metric, counts.reshape(-1, *shape).astype(float))


def difference(
    queries: Sequence[Hashable],
    metric: Callable[..., float],
    first: Sequence[Shaped[np.ndarray, "N ..."]],
    second: Sequence[Shaped[np.ndarray, "N ..."]],
) -> Interval:
    """The interval of the metric of ``first`` less that of ``second``, both on the same draws."""
    n = len(first)

    def less(*arrays: np.ndarray) -> float:
        *both, counts = arrays
        return metric(*both[:n], counts) - metric(*both[n:], counts)

    return interval(queries, less, *first, *second)


def difference_of_sums(
    queries: Sequence[Hashable],
    metric: Callable[[Float[np.ndarray, "R ..."]], Float[np.ndarray, "R"]],
    first: Shaped[np.ndarray, "N ..."],
    second: Shaped[np.ndarray, "N ..."],
) -> Interval:
    """The interval of the metric of ``first`` less that of ``second``, both on the same draws."""
    return interval_of_sums(
        queries, lambda sums: metric(sums[:, 0]) - metric(sums[:, 1]), np.stack([first, second], 1)
    )


def check_lengths(*arrays: Sequence[Hashable] | np.ndarray) -> None:
    """Checks that all have a row for each pair.

    Raises:
      ValueError: if their lengths differ.
    """
    lengths = [len(array) for array in arrays]
    if len(set(lengths)) > 1:
        raise ValueError(f"{lengths} rows: expected one for each pair in all of them")


def _query_index(queries: Sequence[Hashable]) -> Int[np.ndarray, "N"]:
    """The rank of each pair's query among the sorted queries, so that order changes nothing."""
    ranks = {query: i for i, query in enumerate(sorted(set(queries)))}  # type: ignore[type-var]
    return np.array([ranks[query] for query in queries])


def _draws(query_index: Int[np.ndarray, "N"]) -> Iterator[Int[np.ndarray, "r Q"]]:
    """How often each query is drawn, in blocks of draws; none if there is only one query."""
    n = int(query_index.max()) + 1
    rng = np.random.default_rng(0)
    block = max(1, _BLOCK // n)
    for start in range(0, DRAWS if n > 1 else 0, block):
        size = min(block, DRAWS - start)
        cells = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(cells.ravel(), minlength=size * n).reshape(size, n)


def _percentiles(estimate: float, values: Float[np.ndarray, "R"]) -> Interval:
    if np.isnan(estimate):
        return Interval(estimate=None, note="undefined for these labels")
    if not len(values):
        return Interval(estimate=float(estimate), note="one query: an interval takes two or more")
    defined = values[~np.isnan(values)]
    note = ""
    if len(defined) < len(values):
        note = f"undefined in {len(values) - len(defined)} of {len(values)} draws of the queries"
    if len(defined) < MIN_DEFINED * len(values):
        return Interval(estimate=float(estimate), note=note)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(estimate=float(estimate), low=float(low), high=float(high), note=note)
