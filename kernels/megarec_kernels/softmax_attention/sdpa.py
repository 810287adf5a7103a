"""Causal softmax attention over jagged histories by torch's public functions, tile by tile; autograd goes through."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megarec_kernels.tiles import TilePlan
from megarec_kernels.visibility import Visibility


def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    plan: TilePlan,
    visibility: Visibility | None = None,
    weigh: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """As `softmax_attention`: `scaled_dot_product_attention`, or with `weigh` all probabilities of a tile at once.

    A padding row comes after every real row of its history, so no real row attends to it and it gets no gradient.
    """
    heads, width = q.shape[1:]
    pieces = [(q + k + v)[:0]]  # nothing, with a graph: a pack without users still gives zero gradients
    tokens = [torch.zeros(0, dtype=torch.int64, device=q.device)]
    for tile in plan.tiles:
        query, key, value = (
            values.index_select(0, tile.token).view(tile.num_users, tile.length, heads, width).transpose(1, 2)
            for values in (q, k, v)
        )
        seen = None if visibility is None else visibility.seen(tile, (0, tile.length, tile.length)).unsqueeze(1)
        if weigh is None:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=seen is None, scale=scale)
        else:
            factor = weigh(tile.token, tile.length).view(tile.num_users, tile.length, heads, tile.length)
            out = (_probabilities(query * scale, key, seen) * factor.transpose(1, 2)).to(value.dtype) @ value
        pieces.append(out.transpose(1, 2).reshape(-1, heads, width).index_select(0, tile.real))
        tokens.append(tile.token[tile.real])
    return torch.zeros_like(v).index_copy(0, torch.cat(tokens), torch.cat(pieces))


def _probabilities(query: Tensor, key: Tensor, seen: Tensor | None) -> Tensor:
    """Probabilities `[users, heads, rows, rows]` of the keys that are `seen`; None: of all that are not later."""
    scores = query @ key.transpose(2, 3)
    if seen is None:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~seen, float("-inf")).softmax(dim=3)
