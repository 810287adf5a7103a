"""Metrics of predicted feedback: does it rank, does it inform, is it calibrated."""

import numpy as np
import numpy.typing as npt

from megarec.metrics.estimate import Estimate, Float64, estimate_mean

Labels = npt.NDArray[np.integer] | npt.NDArray[np.bool_]


def measure_auc(label: Labels, score: Float64) -> float:
    """The share of (positive, negative) pairs in which the positive scores higher; a tie counts half.

    Args:
        label: `[M]` 0 or 1.
        score: `[M]`, any scale.

    Returns:
        nan when a class is missing.
    """
    user = np.zeros(len(label), dtype=np.int64)
    area, _ = _auc_by_user(user, np.asarray(label, dtype=np.bool_), _check_scores(score))
    return float(area[0]) if len(area) else float("nan")


def measure_grouped_auc(label: Labels, score: Float64, user: npt.NDArray[np.integer]) -> Estimate:
    """AUC within each user that has both classes, averaged with the users' numbers of events as weights.

    Source: GAUC of DIN (arXiv 1706.06978), weighted by events.

    Args:
        label: `[M]` 0 or 1.
        score: `[M]`, any scale.
        user: `[M]`, whose event it is, in any order.

    Returns:
        The weighted mean, its standard error over users and the number of users that count.
    """
    area, num_events = _auc_by_user(user, np.asarray(label, dtype=np.bool_), _check_scores(score))
    return estimate_mean(area, num_events.astype(np.float64))


def measure_normalized_entropy(label: npt.NDArray[np.integer], log_loss: Float64) -> float:
    """Mean loss of the model over the loss of the best constant prediction, which is the entropy of the labels.

    Below 1 the model knows more than the frequencies of the classes. Source: He et al. 2014; ARGUS (arXiv 2507.15994).

    Args:
        label: `[M]` class of each event, any non-negative ids.
        log_loss: `[M]` the model's cross-entropy of each event, nats.

    Returns:
        nan when there are no events or only one class.
    """
    _, counts = np.unique(label, return_counts=True)
    if len(counts) < 2:
        return float("nan")
    share = counts / counts.sum()
    return float(np.mean(log_loss, dtype=np.float64) / -np.sum(share * np.log(share)))


def measure_calibration(label: Labels, probability: Float64) -> float:
    """Mean prediction over mean outcome: 1 is calibrated, above 1 promises too much; nan without positives."""
    positives = np.asarray(label, dtype=np.float64).sum()
    return float(np.sum(probability, dtype=np.float64) / positives) if positives else float("nan")


def measure_calibration_error(label: Labels, probability: Float64, *, num_bins: int = 20) -> float:
    """Expected calibration error: `sum_b n_b / M |mean prediction_b - mean outcome_b|`.

    Bins hold equal counts (up to one) of events sorted by prediction; equal predictions keep the order of the input.

    Args:
        label: `[M]` 0 or 1.
        probability: `[M]` in [0, 1].
        num_bins: number of bins; no more than events are used.

    Returns:
        nan when there are no events.
    """
    if len(label) == 0:
        return float("nan")
    order = np.argsort(probability, kind="stable")
    gap = np.asarray(probability, dtype=np.float64)[order] - np.asarray(label, dtype=np.float64)[order]
    bins = np.array_split(gap, min(num_bins, len(gap)))
    return float(sum(abs(values.sum()) for values in bins) / len(gap))


def _check_scores(score: Float64) -> Float64:
    if np.isnan(score).any():
        raise ValueError("score holds nan")
    return score


def _auc_by_user(
    user: npt.NDArray[np.integer], positive: npt.NDArray[np.bool_], score: Float64
) -> tuple[Float64, npt.NDArray[np.int64]]:
    """AUC and number of events of every user with both classes, in the order of users."""
    order = np.lexsort((score, user))
    user, positive, score = user[order], positive[order], score[order]
    new_user = np.ones(len(user), dtype=np.bool_)
    new_user[1:] = user[1:] != user[:-1]
    new_score = new_user.copy()
    new_score[1:] |= score[1:] != score[:-1]
    user_number = np.cumsum(new_user) - 1
    tie = np.cumsum(new_score) - 1
    negatives_in_tie = np.bincount(tie, weights=~positive)[tie]
    negatives_up_to_tie = np.cumsum(np.bincount(tie, weights=~positive))[tie]
    negatives_of_user = np.bincount(user_number, weights=~positive)
    negatives_before_user = (np.cumsum(negatives_of_user) - negatives_of_user)[user_number]
    beaten = negatives_up_to_tie - negatives_before_user - negatives_in_tie / 2
    won_pairs = np.bincount(user_number, weights=np.where(positive, beaten, 0.0))
    num_events = np.bincount(user_number)
    all_pairs = negatives_of_user * (num_events - negatives_of_user)
    both = all_pairs > 0
    return won_pairs[both] / all_pairs[both], num_events[both]
