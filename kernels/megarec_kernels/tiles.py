"""Cuts a pack of histories of unequal length into tiles of nearly equal length, once per pack.

An attention kernel on plain torch wants rectangles; a pack has histories of 1 to thousands of events. A *tile* is a
few histories of similar length, padded to the longest of them, small enough that its scores stay in the cache.
Every layer of a step shares the plan, because it depends on `cu_seqlens` alone.

Padding repeats the last token of its own history, so nothing is ever read from another history or from the dead
tail. Causal attention then needs no length mask: a padding key comes after every real query of its history.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megarec_kernels.rectangles import Rectangle
    from megarec_kernels.visibility import Visibility

Made = TypeVar("Made")
ROWS_PER_BLOCK = 128
MAX_PAIRS = 1 << 17
FLOATS = torch.float64, torch.float32, torch.bfloat16, torch.float16
MAX_WASTED_PAIRS = 1 << 15  # what another tile costs, in pairs


class Memory:
    """A buffer that is used again for tile after tile, so that it stays in the cache."""

    def __init__(self, like: Tensor) -> None:
        self._buffer = like.new_empty(0)

    def shaped(self, *shape: int) -> Tensor:
        """Its beginning, with whatever is there; what it gave before is lost."""
        size = math.prod(shape)
        if len(self._buffer) < size:
            self._buffer = self._buffer.new_empty(size)
        return self._buffer[:size].view(shape)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """`num_users` histories, each padded to `length` rows.

    It is the `Rectangle` whose queries and keys are the same rows, and offers what one does.

    Attributes:
        num_users: histories in the tile.
        length: rows per history.
        first_token: the token in the first row.
        token: `[num_users * length]` int64, the token in every row.
        real: the rows that are no padding, int64.
        padding: the other rows, int64.
        sees_later: whether a query may see keys behind it.
    """

    num_users: int
    length: int
    first_token: int
    token: Tensor
    real: Tensor
    padding: Tensor
    sees_later: bool = False

    @property
    def queries(self) -> "Tile":
        """The rows that ask."""
        return self

    @property
    def keys(self) -> "Tile":
        """The rows that are asked."""
        return self

    @property
    def query_token(self) -> Tensor:
        """The token in every row, `[num_users, length]`."""
        return self.token.view(self.num_users, self.length)

    @property
    def key_token(self) -> Tensor:
        """As `query_token`."""
        return self.query_token

    def row_blocks(self) -> Iterator[tuple[int, int, int]]:
        """Ranges `[first, last)` of query rows and how many keys they need: the rows `[0, last)`, or all."""
        for first in range(0, self.length, ROWS_PER_BLOCK):
            last = min(first + ROWS_PER_BLOCK, self.length)
            yield first, last, self.length if self.sees_later else last

    def seen(self, visibility: "Visibility | None", block: tuple[int, int, int]) -> Tensor | None:
        """What the queries of a block see, `[num_users, rows, keys]` bool; None: all that is not later."""
        return None if visibility is None else visibility.seen(self, block)

    def distance(self, visibility: "Visibility | None", block: tuple[int, int, int]) -> Tensor | None:
        """Distances from the queries of a block to its keys, `[num_users, rows, keys]`; None: those of their rows."""
        return None if visibility is None else visibility.distance(self, block)

    def take(self, values_NTH: Tensor, memory: "Memory | None" = None) -> Tensor:
        """The rows of all heads, `[N, T, H]` to `[N, num_users, length, H]`; a view if the tile is one history."""
        if self.num_users == 1:
            return values_NTH[:, None, self.first_token : self.first_token + self.length]
        values_TNH = values_NTH.transpose(0, 1)  # as they lie in memory
        memory = memory or Memory(values_NTH)
        room = memory.shaped(len(self.token), *values_TNH.shape[1:])
        rows = torch.index_select(values_TNH, 0, self.token, out=room)
        return rows.transpose(0, 1).unflatten(1, (self.num_users, self.length))

    def take_gradient(self, gradient_NTH: Tensor, memory: "Memory | None" = None) -> Tensor:
        """As `take`, with zeros in the padding, so that padding rows push nothing back."""
        rows = self.take(gradient_NTH, memory)
        if len(self.padding):
            rows.flatten(1, 2).index_fill_(1, self.padding, 0)
        return rows

    def put(self, rows: Tensor, values_NTH: Tensor, memory: "Memory | None" = None) -> None:
        """Writes the real ones of `rows` to their tokens: the way back of `take`."""
        if self.num_users == 1:
            values_NTH[:, None, self.first_token : self.first_token + self.length] = rows
            return
        rows, token = rows.flatten(1, 2).transpose(0, 1), self.token
        if len(self.padding):
            memory = memory or Memory(values_NTH)
            room = memory.shaped(len(self.real), *rows.shape[1:])
            rows, token = torch.index_select(rows, 0, self.real, out=room), token[self.real]
        values_NTH.transpose(0, 1).index_copy_(0, token, rows)

    def add(self, rows: Tensor, values_NTH: Tensor) -> None:
        """As `put`, but adds to what is there."""
        self.put(rows + self.take(values_NTH), values_NTH)


class AttentionPlan(Protocol):
    """The tiles of one pack, or the rectangles of a part of it, for the `cu_seqlens` they were made of."""

    @property
    def cu_seqlens(self) -> Tensor:
        """`[B + 1]`, where each history begins."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all histories; those behind are dead."""

    @property
    def tiles(self) -> "Sequence[Tile | Rectangle]":
        """They are computed one after the other."""


class TilePlan:
    """How attention goes about one pack; what is made of it is made when first asked for, and kept.

    Args:
        cu_seqlens: as for `plan_tiles`.
        sees_later: whether a token may see later ones of its history, as a visibility says.

    Attributes:
        cu_seqlens: a copy.
        bounds: the same on the host.
        num_tokens: of all histories.
        max_length: of a history.
    """

    def __init__(self, cu_seqlens: Tensor, *, sees_later: bool = False) -> None:
        check_cu_seqlens(cu_seqlens)
        self.cu_seqlens = cu_seqlens.clone()
        self.bounds: list[int] = cu_seqlens.tolist()
        self.num_tokens = self.bounds[-1]
        self.max_length = max((last - first for first, last in pairwise(self.bounds)), default=0)
        self.sees_later = sees_later
        self._source, self._version = cu_seqlens, _version_of(cu_seqlens)
        self._made: dict[Hashable, Any] = {}

    @cached_property
    def tiles(self) -> "tuple[Tile, ...]":
        """The tiles of the pack, longest histories first."""
        lengths = [last - first for first, last in pairwise(self.bounds)]
        sizes = {user: (length, length) for user, length in enumerate(lengths) if length}
        tiles = (
            make_tile([(self.bounds[user], lengths[user]) for user in users], self.cu_seqlens.device)
            for users in group_users(sizes)
        )
        return tuple(replace(tile, sees_later=self.sees_later) for tile in tiles)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, called for the first of the layers that ask with this key."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def is_of(self, cu_seqlens: Tensor) -> bool:
        """Whether it was made of these numbers; asks the device only if it was not made of this very tensor."""
        if cu_seqlens is self._source and self._version is not None and self._version == _version_of(cu_seqlens):
            return True
        return torch.equal(self.cu_seqlens, cu_seqlens)


def _version_of(value: Tensor) -> int | None:
    """How often it was changed in place; None: nobody counts, for it was made in inference mode."""
    return None if value.is_inference() else value._version


def plan_tiles(cu_seqlens: Tensor) -> TilePlan:
    """Plans attention over all tokens of a pack.

    A history joins a tile while the tile's padding wastes no more pairs than another tile costs, and one block of rows
    keeps to `MAX_PAIRS` scores per head.

    Args:
        cu_seqlens: `[B + 1]` int32 or int64, where each history begins; starts with 0.

    Raises:
        ValueError: `cu_seqlens` is no such vector.
    """
    return TilePlan(cu_seqlens)


def group_users(sizes: dict[int, tuple[int, int]]) -> Iterator[list[int]]:
    """Users of similar `sizes` (queries, keys), those with most pairs first; what `plan_tiles` says of tiles holds."""
    users: list[int] = []
    queries = keys = real_pairs = 0
    for user in sorted(sizes, key=lambda user: -sizes[user][0] * sizes[user][1]):
        own_queries, own_keys = sizes[user]
        wider, higher = max(queries, own_queries), max(keys, own_keys)
        grown = real_pairs + own_queries * own_keys
        wasteful = (len(users) + 1) * wider * higher - grown > MAX_WASTED_PAIRS
        large = (len(users) + 1) * higher * min(wider, ROWS_PER_BLOCK) > MAX_PAIRS
        if users and (wasteful or large):
            yield users
            users, grown, wider, higher = [], own_queries * own_keys, own_queries, own_keys
        users.append(user)
        queries, keys, real_pairs = wider, higher, grown
    if users:
        yield users


def make_tile(histories: list[tuple[int, int]], device: torch.device) -> Tile:
    """The tile of histories that are given as (first row, rows)."""
    starts, lengths = torch.tensor(histories).unsqueeze(2).unbind(1)
    length = int(lengths.max())
    row = torch.arange(length)
    real = (row < lengths).flatten()
    return Tile(
        num_users=len(histories),
        length=length,
        first_token=histories[0][0],
        token=(starts + torch.minimum(row, lengths - 1)).flatten().to(device),
        real=real.nonzero().squeeze(1).to(device),
        padding=(~real).nonzero().squeeze(1).to(device),
    )


def check_cu_seqlens(cu_seqlens: Tensor) -> None:
    """Refuses anything but `[B + 1]` integers that start with 0 and never fall."""
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64 [B + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if int(cu_seqlens[0]) != 0 or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError("cu_seqlens must start with 0 and never fall")


def check_jagged_attention(q: Tensor, k: Tensor, v: Tensor, plan: TilePlan) -> None:
    """Refuses shapes and dtypes that no attention kernel of ours takes; says which argument is wrong."""
    if q.dim() != 3:
        raise ValueError(f"q must be [T, N, H], got {list(q.shape)}")
    if q.dtype not in FLOATS:
        raise ValueError(f"q must be float64, float32, bfloat16 or float16, got {q.dtype}")
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {list(q.shape)}, got {list(k.shape)}")
    if v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v must be [T, N, Hv] with T, N = {list(q.shape[:2])}, got {list(v.shape)}")
    for name, value in (("k", k), ("v", v)):
        if value.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {value.dtype}")
    if plan.num_tokens > q.shape[0]:
        raise ValueError(f"cu_seqlens ends at {plan.num_tokens}, but q has {q.shape[0]} tokens")


def plan_for(cu_seqlens: Tensor, plan: TilePlan | None) -> TilePlan:
    """The given plan if it was made of these `cu_seqlens`, a new one if none is given."""
    if plan is None:
        return plan_tiles(cu_seqlens)
    if not plan.is_of(cu_seqlens):
        raise ValueError("plan was made of other cu_seqlens")
    return plan


def heads_first(values_TNH: Tensor) -> Tensor:
    """`[T, N, H]` as `[N, T, H]` in the dtype of sums, fp32 for bf16 and fp16; a view if it has that already.

    The numbers of a row lie side by side: those of the gradient of a sum, which is one number everywhere, do not.
    """
    if values_TNH.stride(2) != 1:
        values_TNH = values_TNH.contiguous()
    return values_TNH.transpose(0, 1).to(torch.promote_types(values_TNH.dtype, torch.float32))


def tokens_first(values_NTH: Tensor, dtype: torch.dtype) -> Tensor:
    """`[N, T, H]` as contiguous `[T, N, H]` in `dtype`: the way back of `heads_first`; a view if it lies so already."""
    return values_NTH.transpose(0, 1).to(dtype).contiguous()
