"""Attention between some tokens of a pack, as queries, and others, as keys: what ranks that share a pack compute.

A *rectangle* is a few histories of similar size, the queries and keys of each padded to the longest. A query sees the
keys that it sees in the whole pack. Which ones is found from token numbers, block by block, so that nothing but the
time buckets grows with the square of a length.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megarec_kernels.tiles import MAX_PAIRS, MAX_WASTED_PAIRS, ROWS_PER_BLOCK
from megarec_kernels.visibility import Visibility

NOBODY = -1  # the token number of padding


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """`U` histories with `I` queries and `J` keys each, padding included.

    Attributes:
        query_row: `[U, I]` int64, the row of each query among the queries' rows; padding repeats a row.
        key_row: `[U, J]` int64, likewise.
        query_token: `[U, I]` int64, the number of each query in the pack, `NOBODY` for padding.
        key_token: `[U, J]` int64, likewise.
        first_token: `[U]` int64, where each history begins in the pack.
    """

    query_row: Tensor
    key_row: Tensor
    query_token: Tensor
    key_token: Tensor
    first_token: Tensor

    def row_blocks(self) -> Iterator[slice]:
        """Ranges of queries, small enough for all of their scores."""
        num_queries = self.query_row.shape[1]
        for first in range(0, num_queries, ROWS_PER_BLOCK):
            yield slice(first, min(first + ROWS_PER_BLOCK, num_queries))

    def seen(self, block: slice, visibility: Visibility | None) -> Tensor:
        """Which keys the queries of a block see, bool `[U, i, J]`."""
        query, key = self.query_token[:, block, None], self.key_token[:, None]
        seen = (query != NOBODY) & (key != NOBODY) & (key <= query)
        if visibility is not None:
            index, token = key - self.first_token[:, None, None], query.clamp(min=0)
            seen &= (index < visibility.seen_before[token]) | (index >= visibility.group_first[token])
        return seen

    def distance(self, block: slice, visibility: Visibility | None) -> Tensor:
        """The distance that a position bias reads, from the queries of a block to all keys, `[U, i, J]`."""
        query, key = self.query_token[:, block], self.key_token
        if visibility is not None:
            query, key = visibility.place[query.clamp(min=0)], visibility.place[key.clamp(min=0)]
        return (query[:, :, None] - key[:, None]).clamp_(min=0)

    def take_queries(self, values_NTH: Tensor, block: slice) -> Tensor:
        """The rows of the queries of a block, `[N, *, H]` to `[N * U, i, H]`."""
        return _take(values_NTH, self.query_row[:, block])

    def take_keys(self, values_NTH: Tensor) -> Tensor:
        """The rows of the keys, `[N, *, H]` to `[N * U, J, H]`."""
        return _take(values_NTH, self.key_row)

    def add_to_queries(self, rows: Tensor, block: slice, values_NTH: Tensor) -> None:
        """Adds `[N * U, i, H]` to the rows of the queries; padding is left out."""
        _add(rows, self.query_row[:, block], self.query_token[:, block] != NOBODY, values_NTH)

    def put_to_queries(self, rows: Tensor, block: slice, values_NTH: Tensor) -> None:
        """Writes `[N * U, i, H]` to the rows of the queries; padding is left out."""
        heads, _, width = values_NTH.shape
        number = (self.query_token[:, block] != NOBODY).flatten().nonzero().squeeze(1)
        places = self.query_row[:, block].flatten()[number]
        values_NTH.index_copy_(1, places, rows.view(heads, -1, width).index_select(1, number))

    def add_to_keys(self, rows: Tensor, values_NTH: Tensor) -> None:
        """Adds `[N * U, J, H]` to the rows of the keys; padding is left out."""
        _add(rows, self.key_row, self.key_token != NOBODY, values_NTH)


def plan_rectangles(cu_seqlens: Tensor, query_tokens: Tensor, key_tokens: Tensor) -> tuple[Rectangle, ...]:
    """Groups the histories that have a query and a key that it may see, the largest first.

    Args:
        cu_seqlens: `[B + 1]` int64, where each history of the pack begins; tokens behind the last are dead.
        query_tokens: the numbers of the queries in the pack, ascending, in the order of their rows.
        key_tokens: likewise of the keys.
    """
    query_bounds = torch.searchsorted(query_tokens, cu_seqlens)
    key_bounds = torch.searchsorted(key_tokens, cu_seqlens)
    num_queries, num_keys = query_bounds.diff(), key_bounds.diff()
    living = (num_queries > 0) & (num_keys > 0)
    last_query = query_tokens[(query_bounds[1:] - 1).clamp(min=0)] if len(query_tokens) else cu_seqlens[1:]
    first_key = key_tokens[key_bounds[:-1].clamp(max=len(key_tokens) - 1)] if len(key_tokens) else cu_seqlens[1:]
    users = (living & (first_key <= last_query)).nonzero().squeeze(1)
    order = users[torch.argsort(num_queries[users] * num_keys[users], descending=True, stable=True)].tolist()
    sizes = list(zip(num_queries.tolist(), num_keys.tolist(), strict=True))
    return tuple(
        Rectangle(
            query_row=_padded(query_bounds, group),
            key_row=_padded(key_bounds, group),
            query_token=_tokens(query_tokens, query_bounds, group),
            key_token=_tokens(key_tokens, key_bounds, group),
            first_token=cu_seqlens[group],
        )
        for group in _group(order, sizes)
    )


def _group(order: list[int], sizes: list[tuple[int, int]]) -> Iterator[Tensor]:
    users: list[int] = []
    queries = keys = real = 0
    for user in order:
        wide, high = max(queries, sizes[user][0]), max(keys, sizes[user][1])
        pairs, grown = (len(users) + 1) * wide * high, real + sizes[user][0] * sizes[user][1]
        large = (len(users) + 1) * min(wide, ROWS_PER_BLOCK) * high > MAX_PAIRS
        if users and (large or pairs - grown > MAX_WASTED_PAIRS):
            yield torch.tensor(users)
            users, (wide, high), grown = [], sizes[user], sizes[user][0] * sizes[user][1]
        users.append(user)
        queries, keys, real = wide, high, grown
    if users:
        yield torch.tensor(users)


def _padded(bounds: Tensor, users: Tensor) -> Tensor:
    """Rows of the histories `users`, the last row of each repeated to the length of the longest."""
    first, last = bounds[users, None], bounds[users + 1, None]
    return torch.minimum(first + torch.arange(int((last - first).max()), device=bounds.device), last - 1)


def _tokens(tokens: Tensor, bounds: Tensor, users: Tensor) -> Tensor:
    rows = _padded(bounds, users)
    number = torch.arange(rows.shape[1], device=rows.device)
    return torch.where(number < bounds.diff()[users, None], tokens[rows], NOBODY)


def _take(values_NTH: Tensor, rows: Tensor) -> Tensor:
    heads, _, width = values_NTH.shape
    return values_NTH.index_select(1, rows.flatten()).view(heads * rows.shape[0], rows.shape[1], width)


def _add(rows: Tensor, places: Tensor, real: Tensor, values_NTH: Tensor) -> None:
    heads, _, width = values_NTH.shape
    number = real.flatten().nonzero().squeeze(1)
    values_NTH.index_add_(1, places.flatten()[number], rows.view(heads, -1, width).index_select(1, number))
