"""Attention between some tokens of a pack, as queries, and others, as keys: what ranks that share a pack compute.

A *rectangle* is a few histories of similar size, the queries and keys of each padded to the longest. A query sees the
keys that it sees in the whole pack. Which ones is found from token numbers, block by block, so that nothing but the
time buckets grows with the square of a length. A `Tile` is the rectangle whose queries and keys are the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megarec_kernels.tiles import ROWS_PER_BLOCK, Tile, group_users, make_tile
from megarec_kernels.visibility import Visibility

NEVER = torch.iinfo(torch.int64).max  # where padding stands in its history: behind every query


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """`U` histories with `I` queries and `J` keys each, padding included.

    Attributes:
        queries: which of the queries' rows they are; `token` is a row there.
        keys: likewise of the keys' rows.
        query_token: `[U, I]` int64, the number of each query in the pack; padding repeats one.
        key_token: `[U, J]` int64, likewise.
        query_index: `[U, I]` int64, the number of each query in its history.
        key_index: `[U, J]` int64, likewise, `NEVER` for padding.
        reach: for each block of rows, how many keys are no later than the last of its queries.
    """

    queries: Tile
    keys: Tile
    query_token: Tensor
    key_token: Tensor
    query_index: Tensor
    key_index: Tensor
    reach: tuple[int, ...]

    @property
    def num_users(self) -> int:
        """Histories in the rectangle."""
        return self.queries.num_users

    def row_blocks(self) -> Iterator[tuple[int, int, int]]:
        """Ranges `[first, last)` of query rows and how many keys they need; those that need none are left out."""
        for number, num_keys in enumerate(self.reach):
            first = number * ROWS_PER_BLOCK
            if num_keys:
                yield first, min(first + ROWS_PER_BLOCK, self.queries.length), num_keys

    def seen(self, visibility: Visibility | None, block: tuple[int, int, int]) -> Tensor:
        """What the queries of a block see of its keys, `[U, rows, keys]` bool."""
        first, last, num_keys = block
        index, key = self.query_index[:, first:last, None], self.key_index[:, None, :num_keys]
        seen = key <= index
        if visibility is not None:
            token = self.query_token[:, first:last, None]
            seen &= (key < visibility.seen_before[token]) | (key >= visibility.group_first[token])
        return seen

    def distance(self, visibility: Visibility | None, block: tuple[int, int, int]) -> Tensor:
        """Distances from the queries of a block to its keys, `[U, rows, keys]`."""
        first, last, num_keys = block
        query, key = self.query_index, self.key_index
        if visibility is not None:
            query, key = visibility.place[self.query_token], visibility.place[self.key_token]
        return (query[:, first:last, None] - key[:, None, :num_keys]).clamp_(min=0)


@dataclass(frozen=True, kw_only=True)
class RectanglePlan:
    """Attention of a part of a pack, which `cu_seqlens` is of, as rectangles."""

    cu_seqlens: Tensor
    tiles: tuple[Rectangle, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all histories of the pack."""
        return int(self.cu_seqlens[-1])


def plan_rectangles(cu_seqlens: Tensor, query_token: Tensor, key_token: Tensor) -> tuple[Rectangle, ...]:
    """Groups the histories that have a query and a key no later than it; the largest come first.

    Args:
        cu_seqlens: `[B + 1]` int64, where each history of the pack begins; tokens behind the last are dead.
        query_token: the numbers of the queries in the pack, ascending, in the order of their rows.
        key_token: likewise of the keys.
    """
    queries, keys = (list(pairwise(torch.searchsorted(x, cu_seqlens).tolist())) for x in (query_token, key_token))
    asks, asked = query_token.tolist(), key_token.tolist()
    sizes = {
        user: (last - first, last_key - first_key)
        for user, ((first, last), (first_key, last_key)) in enumerate(zip(queries, keys, strict=True))
        if first < last and first_key < last_key and asked[first_key] <= asks[last - 1]
    }
    rectangles = []
    for users in group_users(sizes):
        rows, columns = (
            make_tile([(side[user][0], sizes[user][axis]) for user in users], cu_seqlens.device)
            for axis, side in enumerate((queries, keys))
        )
        first_token = cu_seqlens[users].unsqueeze(1)
        tokens = query_token[rows.query_token], key_token[columns.query_token]
        query_index, key_index = (token - first_token for token in tokens)
        key_index.view(-1)[columns.padding] = NEVER
        reach = torch.searchsorted(key_index, query_index, right=True).amax(dim=0).cpu()
        rectangles.append(
            Rectangle(
                queries=rows,
                keys=columns,
                query_token=tokens[0],
                key_token=tokens[1],
                query_index=query_index,
                key_index=key_index,
                reach=tuple(int(block.max()) for block in reach.split(ROWS_PER_BLOCK)),
            )
        )
    return tuple(rectangles)
