"""Context parallelism by exchange: a rank brings its tokens of all heads and gets all tokens of some heads.

Attention then runs as on one rank, on fewer heads. Per layer and pass a rank sends (cp - 1) / cp of its q, k, v and
output; it holds T tokens of N / cp heads in between, which is as much as T / cp tokens of all.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megarec.parallel.groups import Group
from megarec.parallel.mcore import all_to_all


def by_heads(attention: Callable[..., Tensor], group: Group) -> Callable[..., Tensor]:
    """`attention(q, k, v, ...)` on all tokens, for q, k and v that hold this rank's tokens.

    Args:
        attention: takes `[T, n, H]` thrice and gives `[T, n, Hv]`, each head on its own.
        group: the context-parallel ranks; its size divides the heads that come in.
    """
    return attention if group.size == 1 else partial(_attend, attention, group)


def _attend(  # noqa: PLR0917 (the first two are bound above)
    attention: Callable[..., Tensor], group: Group, q: Tensor, k: Tensor, v: Tensor, *args: Any, **settings: Any
) -> Tensor:
    widths = [x.shape[2] for x in (q, k, v)]
    q, k, v = _to_heads(torch.cat([q, k, v], dim=2), group).split(widths, dim=2)
    return _to_tokens(attention(q, k, v, *args, **settings), group)


def _to_heads(x: Tensor, group: Group) -> Tensor:
    """This rank's tokens of N heads, `[T / cp, N, C]`, to all tokens of its heads, `[T, N / cp, C]`."""
    local_tokens, heads, channels = x.shape
    by_rank = x.view(local_tokens, group.size, heads // group.size, channels).transpose(0, 1)
    return _exchange(by_rank, group).flatten(0, 1)


def _to_tokens(x: Tensor, group: Group) -> Tensor:
    """All tokens of this rank's heads, `[T, N / cp, C]`, to its tokens of N heads, `[T / cp, N, C]`."""
    received = _exchange(x.view(group.size, -1, *x.shape[1:]), group)
    return received.transpose(0, 1).flatten(1, 2)


def _exchange(by_rank: Tensor, group: Group) -> Tensor:
    """Entry r of `[cp, *]` goes to rank r, entry r of the result comes from it."""
    exchanged: Tensor = all_to_all(group.process_group, by_rank)
    return exchanged
