"""Exact ranks and top items over a whole catalog; equal scores are ordered by the lower item id.

Scores are `[B, V]`, one column per item id. Column 0 stands for "unknown" and is never recommended.
"""

import math

import torch
from torch import Tensor

from megarec.base.errors import UserError

UNRANKED = 0  # the rank of a target that cannot be found, as `megarec.metrics.ranking` writes it


def hide_items(scores: Tensor, user: Tensor, item: Tensor) -> None:
    """Makes items `item` `[S]` impossible for the users in rows `user` `[S]`, and id 0 for all, in place.

    Raises:
        UserError: a score is not a number.
    """
    if not bool(torch.isfinite(scores).all()):
        raise UserError("the scores are not finite numbers", fix="The weights may have diverged; take an older step")
    scores[user, item] = -math.inf
    scores[:, 0] = -math.inf


def rank_targets(scores: Tensor, item: Tensor) -> Tensor:
    """The 1-based rank `[B]` (int64) of one target `item` `[B]` per row among all items of that row.

    An item stands before the target when its score is higher, or equal with a lower id. A target whose own score
    is -inf has the rank `UNRANKED`.
    """
    own = scores.gather(1, item[:, None])
    ids = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (ids < item[:, None]))
    return torch.where(own[:, 0] == -math.inf, UNRANKED, 1 + before.sum(1))


def top_items(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best item ids of each row, best first, and their scores: both `[B, k]`.

    Rows with fewer than `k` possible items end in id 0 with score -inf. `torch.topk` alone leaves open how equal
    scores are ordered and which of them make the list: the first is mended by a sort of the list, the second, seen by
    the next best score, by a look at the whole row.
    """
    k = min(k, scores.shape[1])
    best, ids = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    open_rows = (best[:, k - 1 : k] == best[:, k:]).any(1).nonzero()[:, 0]
    best, ids = _sort_list(best[:, :k], ids[:, :k])
    if len(open_rows):
        best[open_rows], ids[open_rows] = _sort_list(*_best_with_ties(scores[open_rows], k))
    return ids.masked_fill(best == -math.inf, 0), best


def _sort_list(best: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Descending by score, equal scores by the lower id."""
    ids, order = ids.sort(dim=1)
    best, place = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    return best, ids.gather(1, place)


def _best_with_ties(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best scores of each row and their ids, in any order; of equal scores the lower ids."""
    threshold = scores.topk(k, dim=1).values[:, -1:]
    above = scores > threshold
    level = scores == threshold
    missing = k - above.sum(1, keepdim=True)
    chosen = above | (level & (level.cumsum(1, dtype=torch.int32) <= missing))
    ids = chosen.nonzero()[:, 1].view(len(scores), k)
    return scores.gather(1, ids), ids
