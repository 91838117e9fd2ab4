"""Rankings by a judge under human grades: nDCG@10.

Gains are the class indices 0 to K - 1, worst to best, discounts 1 / log2(rank + 1) (Järvelin and
Kekäläinen 2002, with linear gains as trec_eval has them). Products with equal scores share the mean
of the gains that their places could have (scikit-learn), so that no order of ids decides. Queries
with one judged product, or none above the worst class, have no nDCG and are left out.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

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
    from sklearn.metrics import ndcg_score

    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, query in enumerate(queries):
        rows[query].append(row)
    return {
        query: float(ndcg_score([gains[of]], [scores[of]], k=CUT))
        for query, of in rows.items()
        if len(of) > 1 and gains[of].any()
    }


def mean_ndcg(by_query: Mapping[Hashable, float]) -> Interval:
    """The mean over queries, with its interval."""
    rows = np.array([(value, 1.0) for value in by_query.values()]).reshape(-1, 2)
    return interval_of_sums(list(by_query), lambda sums: sums[:, 0] / sums[:, 1], rows)
