"""Metrics of probabilities of being correct, which both kinds of reward model give."""

import numpy as np

BINS = 10  # of the calibration error


def probability_metrics(correct: np.ndarray, score: np.ndarray) -> dict[str, float | None]:
    """``accuracy`` at a threshold of 1/2, ``auroc`` and ``ece`` of probabilities of being correct.

    Args:
      correct: [n] booleans.
      score: [n] probabilities in [0, 1].

    Returns:
      The metrics; None over nothing, or over one class where both are needed.
    """
    from sklearn.metrics import accuracy_score, roc_auc_score  # slow, so not at every start

    both = len(set(correct.tolist())) == 2
    return {
        "accuracy": float(accuracy_score(correct, score >= 0.5)) if len(correct) else None,
        "auroc": float(roc_auc_score(correct, score)) if both else None,
        "ece": calibration_error(correct, score) if len(correct) else None,
    }


def calibration_error(correct: np.ndarray, score: np.ndarray) -> float:
    """Expected calibration error: |share correct - mean score| over equal bins, weighted by size.

    Guo et al. (arXiv 1706.04599), equation 3, for P(correct) in ``BINS`` bins.
    """
    bins = np.minimum((score * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, correct, BINS) - np.bincount(bins, score, BINS)
    return float(np.abs(gaps).sum() / len(correct))
