"""Metrics of ranked items, from the rank of one target per user or from top-k lists and sets of targets."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megarec.base.jagged import Int64
from megarec.metrics.estimate import Estimate, estimate_mean

MAX_COMPARISONS = 1 << 22  # listed items that are compared with targets at one time


def measure_ranks(
    rank: npt.NDArray[np.number], *, cutoffs: Sequence[int], mrr_depth: int | None = None
) -> dict[str, Estimate]:
    """Metrics of users with one target each, whose 1-based rank is known.

    `hr@k = [rank <= k]`, `ndcg@k = [rank <= k] / log2(rank + 1)`, `mrr = 1 / rank`; means over all users.

    Source: the public HSTU tables (arXiv 2402.17152), whose `mrr` has `mrr_depth=2500`.

    Args:
        rank: `[B]`; 0 or inf where the target was not found.
        cutoffs: the k's.
        mrr_depth: in `mrr`, a target that is ranked deeper or was not found counts as rank `mrr_depth + 1`; None: every
            rank is exact, and a target that was not found scores 0.

    Returns:
        `hr@k`, `ndcg@k` for every k and `mrr`.

    Raises:
        ValueError: a rank is negative or nan, or a cutoff is below 1.
    """
    _check_cutoffs(cutoffs)
    ranks = np.asarray(rank, dtype=np.float64)
    if ranks.ndim != 1 or np.isnan(ranks).any() or (ranks < 0).any():
        raise ValueError("rank must be a vector of ranks from 1 on, with 0 or inf for targets that were not found")
    ranks = np.where(ranks == 0, np.inf, ranks)
    metrics = {}
    for k in cutoffs:
        hit = ranks <= k
        metrics[f"hr@{k}"] = estimate_mean(hit.astype(np.float64))
        metrics[f"ndcg@{k}"] = estimate_mean(hit / np.log2(ranks + 1))
    metrics["mrr"] = estimate_mean(1 / (ranks if mrr_depth is None else np.minimum(ranks, mrr_depth + 1)))
    return metrics


@dataclass(frozen=True, kw_only=True)
class ListMetrics:
    """Means over the users with a target, the share of the catalog that was shown, and who was left out."""

    estimates: dict[str, Estimate]
    coverage: dict[str, float]
    num_users_without_target: int


def measure_lists(
    top_items: Int64, target_offsets: Int64, target_items: Int64, *, cutoffs: Sequence[int], num_items: int
) -> ListMetrics:
    """Metrics of top-k lists against sets of targets.

    With T the set of a user's distinct targets: `recall@k = |top_k & T| / min(|T|, k)`, `hr@k = [top_k & T not empty]`,
    `ndcg@k = sum_{r <= k} [hit at r] / log2(r + 1) / sum_{r <= min(|T|, k)} 1 / log2(r + 1)`; means over users with a
    target. `coverage@k` is the number of distinct items in those users' top k over `num_items`.

    Source: Yambda (arXiv 2505.22238). Its published code divides DCG by the DCG of the same hits; this is the formula
    of the paper.

    Args:
        top_items: `[B, L]` distinct item ids, best first; -1 where a list is shorter than L.
        target_offsets: `[B + 1]`, where each user's targets begin.
        target_items: `[M]` item ids, repeats allowed.
        cutoffs: the k's, none above L.
        num_items: size of the catalog.

    Returns:
        Estimates `recall@k`, `hr@k`, `ndcg@k`, coverage `coverage@k`, and the users that had no target.

    Raises:
        ValueError: shapes do not fit together, a list repeats an item, or a cutoff is outside [1, L].
    """
    _check_cutoffs(cutoffs)
    num_users, longest = top_items.shape
    if len(target_offsets) != num_users + 1 or target_offsets[-1] != len(target_items):
        raise ValueError("target_offsets must be [B + 1] and end at the number of target_items")
    if max(cutoffs, default=0) > longest:
        raise ValueError(f"cutoffs go up to {max(cutoffs)}, but the lists have {longest} items")
    user, item = _distinct_pairs(np.repeat(np.arange(num_users), np.diff(target_offsets)), target_items)
    num_targets = np.bincount(user, minlength=num_users)
    hit = _find_hits(top_items, user, item)
    with_target = num_targets > 0
    hit, num_targets, shown = hit[with_target], num_targets[with_target], top_items[with_target]
    discount = 1 / np.log2(np.arange(longest) + 2)
    ideal = np.concatenate([[0.0], np.cumsum(discount)])
    estimates, coverage = {}, {}
    for k in cutoffs:
        attainable = np.minimum(num_targets, k)
        hits = hit[:, :k].sum(axis=1)
        estimates[f"recall@{k}"] = estimate_mean(hits / attainable)
        estimates[f"hr@{k}"] = estimate_mean((hits > 0).astype(np.float64))
        estimates[f"ndcg@{k}"] = estimate_mean(hit[:, :k] @ discount[:k] / ideal[attainable])
        listed = shown[:, :k]
        coverage[f"coverage@{k}"] = int(np.count_nonzero(np.bincount(listed[listed >= 0]))) / num_items
    return ListMetrics(
        estimates=estimates, coverage=coverage, num_users_without_target=int(num_users - with_target.sum())
    )


def _distinct_pairs(user: Int64, item: Int64) -> tuple[Int64, Int64]:
    order = np.lexsort((item, user))
    user, item = user[order], item[order]
    first = np.ones(len(user), dtype=np.bool_)
    first[1:] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
    return user[first], item[first]


def _find_hits(top_items: Int64, user: Int64, item: Int64) -> npt.NDArray[np.bool_]:
    """Whether each listed item `[B, L]` is among its user's (sorted, distinct) targets."""
    ordered = np.sort(top_items, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError("top_items repeats an item within a list")
    hit = np.zeros(top_items.shape, dtype=np.bool_)
    pairs = max(1, MAX_COMPARISONS // max(1, top_items.shape[1]))
    for start in range(0, len(user), pairs):
        part = slice(start, start + pairs)
        at, place = np.nonzero((top_items[user[part]] == item[part, None]) & (item[part, None] >= 0))
        hit[user[part][at], place] = True
    return hit


def _check_cutoffs(cutoffs: Sequence[int]) -> None:
    if any(k < 1 for k in cutoffs):
        raise ValueError(f"cutoffs must be at least 1, got {list(cutoffs)}")
