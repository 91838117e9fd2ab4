"""Rankings under human grades and under a judge's: nDCG@10, and whether systems keep their order.

Gains are the class indices 0 to K - 1, worst to best, discounts 1 / log2(rank + 1) (Järvelin and
Kekäläinen 2002, with linear gains as trec_eval has them). Products with equal scores share the mean
of the gains that their places could have (scikit-learn), so that no order of ids decides. Queries
without a judged product above the worst class have no nDCG and are left out, and where a judge's
own order of all products is scored, those with one product, too.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from she_jax.evaluation.intervals import Interval, interval_of_sums

CUT = 10  # places that count


def ndcg_by_query(
    queries: Sequence[Hashable], gains: Int[np.ndarray, "N"], scores: Float[np.ndarray, "N"]
) -> dict[Hashable, float]:
    """nDCG@10 of each query that has one.

    Args:
      queries: the query of each pair.
      gains: class index of each pair.
      scores: any number that is larger for products that rank before others.
    """
    from sklearn import config_context
    from sklearn.metrics import ndcg_score

    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, query in enumerate(queries):
        rows[query].append(row)
    with config_context(assume_finite=True, skip_parameter_validation=True):  # some 10^5 calls
        return {
            query: float(ndcg_score([gains[of]], [scores[of]], k=CUT))
            for query, of in rows.items()
            if len(of) > 1 and gains[of].any()
        }


def mean_ndcg(by_query: Mapping[Hashable, float]) -> Interval:
    """The mean over queries, with its interval."""
    rows = np.array([(value, 1.0) for value in by_query.values()]).reshape(-1, 2)
    return interval_of_sums(list(by_query), lambda sums: sums[:, 0] / sums[:, 1], rows)


def compare_systems(
    ranks: Mapping[str, Mapping[int, float]],
    queries: Sequence[Hashable],
    human: Int[np.ndarray, "N"],
    judge: Int[np.ndarray, "N"],
) -> dict[str, object]:
    """nDCG@10 of ranking systems under human and under a judge's labels.

    Only judged products count: others of a system's ranking are taken out before it is scored. The
    ideal order is that of all judged products of the query, whoever found them. All systems are
    averaged over the same queries, those of which some system ranks a product and that have one
    above the worst class; who shows nothing good there has 0.

    Args:
      ranks: by system, for some of the pairs (by index) a number that is smaller for those in
        front, such as the rank; equal ones share their places.
      queries: the query of each pair.
      human: class index of each pair, by people.
      judge: class index of each pair, by the judge.

    Returns:
      ``systems``: for each its ``human`` and ``judge`` nDCG, an interval by query, and ``n``, its
      pairs; ``tau``: Kendall's tau-b of the two orders of systems; None of fewer than two.
    """
    from scipy.stats import kendalltau

    named = {queries[row] for places in ranks.values() for row in places}
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, query in enumerate(queries):
        if query in named:
            rows[query].append(row)
    systems: dict[str, Any] = {}
    for name, places in ranks.items():
        means = {
            side: mean_ndcg(_ndcg_of_system(places, rows, labels))
            for side, labels in (("human", human), ("judge", judge))
        }
        systems[name] = {side: asdict(mean) for side, mean in means.items()} | {"n": len(places)}
    estimates = [[s[side]["estimate"] for side in ("human", "judge")] for s in systems.values()]
    both = [pair for pair in estimates if None not in pair]
    tau = float("nan")
    if len(both) > 1:
        result: Any = kendalltau(*zip(*both, strict=True))
        tau = float(result.statistic)
    return {"systems": systems, "tau": None if np.isnan(tau) else tau}


def _ndcg_of_system(
    places: Mapping[int, float],
    rows: Mapping[Hashable, Sequence[int]],
    gains: Int[np.ndarray, "N"],
) -> dict[Hashable, float]:
    from sklearn import config_context
    from sklearn.metrics import dcg_score

    def dcg(rows: Sequence[int], scores: Sequence[float]) -> float:
        # With two worthless products at the end, since scikit-learn refuses fewer.
        last = [min(scores, default=0) - 1] * 2
        return dcg_score([[*gains[rows], 0, 0]], [[*scores, *last]], k=CUT)

    values = {}
    with config_context(assume_finite=True, skip_parameter_validation=True):
        for query, of in rows.items():
            if not gains[of].any():
                continue
            ranked = [row for row in of if row in places]
            found = dcg(ranked, [-places[row] for row in ranked])
            values[query] = float(found / dcg(of, gains[of].tolist()))
    return values
