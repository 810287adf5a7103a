"""Exact ranks and top items over a whole catalog; equal scores are ordered by the lower item id.

Scores are `[B, V]`, one column per item id. Column 0 stands for "unknown" and is never recommended.
"""

import math

import torch
from torch import Tensor

from megarec.base.errors import UserError

UNRANKED = 0  # the rank of a target that cannot be found, as `megarec.metrics.ranking` writes it
MAX_COMPARISONS = 1 << 23  # scores compared at one time


def hide_items(scores: Tensor, user: Tensor, item: Tensor) -> None:
    """Makes items `item` `[S]` impossible for the users in rows `user` `[S]`, and id 0 for all, in place.

    Raises:
        UserError: a score is not a number.
    """
    if not bool(torch.isfinite(scores).all()):
        raise UserError("the scores are not finite numbers", fix="The weights may have diverged; take an older step")
    scores[user, item] = -math.inf
    scores[:, 0] = -math.inf


def rank_targets(scores: Tensor, user: Tensor, item: Tensor) -> Tensor:
    """The 1-based rank `[M]` (int64) of each target `item` `[M]` among all items of its row `user` `[M]`.

    An item stands before the target when its score is higher, or equal with a lower id. A target whose own score
    is -inf has the rank `UNRANKED`.
    """
    ranks = torch.empty(len(item), dtype=torch.int64, device=scores.device)
    ids = torch.arange(scores.shape[1], device=scores.device)
    rows = max(1, MAX_COMPARISONS // scores.shape[1])
    for start in range(0, len(item), rows):
        part = slice(start, start + rows)
        row = scores[user[part]]
        own = row.gather(1, item[part, None])
        before = (row > own) | ((row == own) & (ids < item[part, None]))
        ranks[part] = torch.where(own[:, 0] == -math.inf, UNRANKED, 1 + before.sum(1))
    return ranks


def top_items(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best item ids of each row, best first, and their scores: both `[B, k]`.

    Rows with fewer than `k` possible items end in id 0 with score -inf. `torch.topk` alone leaves the order of
    equal scores open, so it only gives the threshold here.
    """
    k = min(k, scores.shape[1])
    threshold = scores.topk(k, dim=1).values[:, -1:]
    above = scores > threshold
    level = scores == threshold
    missing = k - above.sum(1, keepdim=True)
    chosen = above | (level & (level.cumsum(1, dtype=torch.int32) <= missing))
    ids = chosen.nonzero()[:, 1].view(
        len(scores), k
    )  # ascending in each row, so a stable sort keeps the lower id first
    best, order = scores.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order).masked_fill(best == -math.inf, 0), best
