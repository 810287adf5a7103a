"""HSTU attention over jagged histories, tile by tile; its backward computes the scores again."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarec_kernels.tiles import Tile, TilePlan, heads_first, tokens_first
from megarec_kernels.visibility import Visibility

LOG_WIDTH = 0.301  # of a time bucket: a factor of 1.35


@dataclass(frozen=True, kw_only=True)
class TimeBuckets:
    """The time bucket of every causal pair of a pack, per tile and block of rows: `[num_users, rows, keys]`."""

    num_buckets: int
    blocks: tuple[tuple[Tensor, ...], ...]


def bucket_times(plan: TilePlan, timestamp: Tensor, query_timestamp: Tensor, *, num_buckets: int) -> TimeBuckets:
    """Sorts the time between every query and key into buckets, once per pack; all layers share the result.

    `bucket(x) = clamp(int(log(max(1, |x|)) / 0.301), 0, num_buckets)` with x = query time - key time, in seconds.

    Args:
        plan: the tiles of the pack.
        timestamp: `[T]` int64, when the event happened, seconds.
        query_timestamp: `[T]` int64, the time at which the query at that token asks, seconds.
        num_buckets: the last bucket; at most 255 keeps one byte per pair.

    Raises:
        ValueError: a shape or dtype is wrong; names the argument.
    """
    for name, value in (("timestamp", timestamp), ("query_timestamp", query_timestamp)):
        if value.dtype != torch.int64 or value.dim() != 1 or len(value) < int(plan.cu_seqlens[-1]):
            raise ValueError(f"{name} must be int64 [T], got {value.dtype} {list(value.shape)}")
    dtype = torch.uint8 if num_buckets <= 255 else torch.int32
    blocks = []
    for tile in plan.tiles:
        shape = tile.num_users, tile.length
        asked, happened = query_timestamp[tile.token].view(shape), timestamp[tile.token].view(shape)
        blocks.append(
            tuple(
                _bucket(asked[:, first:last, None] - happened[:, None, :last], num_buckets).to(dtype)
                for first, last in tile.row_blocks()
            )
        )
    return TimeBuckets(num_buckets=num_buckets, blocks=tuple(blocks))


def _bucket(seconds: Tensor, num_buckets: int) -> Tensor:
    return seconds.abs_().clamp_(min=1).double().log_().div_(LOG_WIDTH).clamp_(max=num_buckets)


@dataclass(frozen=True, kw_only=True)
class HSTUSettings:
    """What the kernel needs besides tensors with gradients."""

    scale: float
    divisor: float
    plan: TilePlan
    time_buckets: TimeBuckets | None
    visibility: Visibility | None


class JaggedHSTUAttention(torch.autograd.Function):
    """Keeps `q`, `k`, `v` and the biases for the backward and nothing that grows with the square of a length."""

    @staticmethod
    def forward(  # noqa: PLR0917 (torch hands arguments over by position)
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_bias: Tensor | None,
        time_bias: Tensor | None,
        settings: HSTUSettings,
    ) -> Tensor:
        """The outputs of all tiles, `[T, N, Hv]`."""
        ctx.save_for_backward(q, k, v, position_bias, time_bias)
        ctx.settings = settings
        bias = _Bias(position_bias, time_bias, settings, dtype=torch.promote_types(q.dtype, torch.float32))
        q_NTH, k_NTH, v_NTH = heads_first(q) * settings.scale, heads_first(k), heads_first(v)
        out_NTH = torch.zeros_like(v_NTH)
        for number, tile in enumerate(settings.plan.tiles):
            queries, keys, values = tile.take(q_NTH), tile.take(k_NTH), tile.take(v_NTH)
            out = torch.empty_like(values)
            for block, (first, last) in enumerate(tile.row_blocks()):
                scores = torch.bmm(queries[:, first:last], keys[:, :last].transpose(1, 2))
                bias.add(scores, tile, number=number, block=block)
                visible = None if settings.visibility is None else settings.visibility.seen(tile, first, last)
                weights = _forget_unseen(F.silu(scores, inplace=True), visible)
                torch.bmm(weights, values[:, :last], out=out[:, first:last])
            tile.put(out, out_NTH)
        return tokens_first(out_NTH.div_(settings.divisor), q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `q`, `k`, `v` and the two biases."""
        q, k, v, position_bias, time_bias = ctx.saved_tensors
        settings: HSTUSettings = ctx.settings
        bias = _Bias(position_bias, time_bias, settings, dtype=torch.promote_types(q.dtype, torch.float32))
        inputs = heads_first(q) * settings.scale, heads_first(k), heads_first(v)
        grad_out_NTH = heads_first(gradients[0]) / settings.divisor
        grads_NTH = tuple(torch.zeros_like(values) for values in inputs)
        for number, tile in enumerate(settings.plan.tiles):
            rows = [tile.take(values) for values in inputs]
            tile_grads = _tile_backward(tile, rows, tile.take_gradient(grad_out_NTH), bias=bias, number=number)
            for grad, grad_NTH in zip(tile_grads, grads_NTH, strict=True):
                tile.put(grad, grad_NTH)
        grads_NTH[0].mul_(settings.scale)
        grad_q, grad_k, grad_v = (tokens_first(grad, q.dtype) for grad in grads_NTH)
        return grad_q, grad_k, grad_v, *bias.gradients(), None


def _tile_backward(
    tile: Tile, inputs: list[Tensor], grad_out: Tensor, *, bias: "_Bias", number: int
) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, values = inputs
    grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for block, (first, last) in enumerate(tile.row_blocks()):
        rows, seen = slice(first, last), slice(0, last)
        scores = torch.bmm(queries[:, rows], keys[:, seen].transpose(1, 2))
        bias.add(scores, tile, number=number, block=block)
        grad_scores = torch.bmm(grad_out[:, rows], values[:, seen].transpose(1, 2))
        visible = None if bias.visibility is None else bias.visibility.seen(tile, first, last)
        grad_scores = _forget_unseen(torch.ops.aten.silu_backward(grad_scores, scores), visible)
        weights = _forget_unseen(F.silu(scores, inplace=True), visible)
        grad_v[:, seen].baddbmm_(weights.transpose(1, 2), grad_out[:, rows])
        torch.bmm(grad_scores, keys[:, seen], out=grad_q[:, rows])
        grad_k[:, seen].baddbmm_(grad_scores.transpose(1, 2), queries[:, rows])
        bias.collect(grad_scores, tile, number=number, block=block)
    return grad_q, grad_k, grad_v


def _forget_future(pairs: Tensor) -> Tensor:
    """Zeroes what a query would give to later keys; row i of the block is query `keys - rows + i`."""
    _, rows, keys = pairs.shape
    return pairs.tril_(keys - rows)


def _forget_unseen(pairs: Tensor, visible: Tensor | None) -> Tensor:
    """Zeroes what a query would give to keys that are not `visible` `[num_users, rows, keys]`; None: to later keys."""
    if visible is None:
        return _forget_future(pairs)
    pairs.view(-1, *visible.shape).masked_fill_(~visible, 0)
    return pairs


class _Bias:
    """Adds the position and time bias to scores `[N * num_users, rows, keys]` and sums their gradients."""

    def __init__(
        self,
        position_bias: Tensor | None,
        time_bias: Tensor | None,
        settings: HSTUSettings,
        *,
        dtype: torch.dtype,
    ) -> None:
        self.originals = position_bias, time_bias
        self.time_buckets = settings.time_buckets
        self.visibility = settings.visibility
        self.position = None if position_bias is None else position_bias.to(dtype)
        self.time = None if time_bias is None else time_bias.to(dtype)
        self.grad_position = None if position_bias is None else torch.zeros_like(position_bias, dtype=torch.float64)
        self.grad_time = None if time_bias is None else torch.zeros_like(time_bias, dtype=torch.float64)

    def add(self, scores: Tensor, tile: Tile, *, number: int, block: int) -> None:
        """Adds both biases in place; `block` is the block of rows of tile `number`."""
        _, rows, keys = scores.shape
        by_user = scores.view(-1, tile.num_users, rows, keys)
        if self.position is not None and self.visibility is not None:
            by_user.add_(self.position[self.visibility.distance(tile, keys - rows, keys)])
        elif self.position is not None:
            by_user.add_(_distances_to_pairs(self.position, rows, keys))
        if self.time is not None and self.time_buckets is not None:
            buckets = self.time_buckets.blocks[number][block]
            by_user.add_(self.time.index_select(0, buckets.flatten().int()).view(buckets.shape))

    def collect(self, grad_scores: Tensor, tile: Tile, *, number: int, block: int) -> None:
        """Adds the gradient of one block to the gradients of the biases."""
        _, rows, keys = grad_scores.shape
        if self.grad_position is not None and self.visibility is not None:
            by_user = grad_scores.view(-1, tile.num_users, rows, keys).sum(dim=0).double()
            distance = self.visibility.distance(tile, keys - rows, keys).flatten()
            self.grad_position += torch.bincount(distance, weights=by_user.flatten(), minlength=len(self.grad_position))
        elif self.grad_position is not None:
            self.grad_position[:keys] += _pairs_to_distances(grad_scores.sum(dim=0), keys)
        if self.grad_time is not None and self.time_buckets is not None:
            by_user = grad_scores.view(-1, tile.num_users, rows, keys).sum(dim=0).double()
            buckets = self.time_buckets.blocks[number][block].flatten()
            self.grad_time += torch.bincount(buckets, weights=by_user.flatten(), minlength=len(self.grad_time))

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Gradients of the biases in their own dtype."""
        sums = self.grad_position, self.grad_time
        return tuple(
            None if total is None or original is None else total.to(original.dtype)
            for total, original in zip(sums, self.originals, strict=True)
        )


def _distances_to_pairs(values: Tensor, rows: int, keys: int) -> Tensor:
    """`[rows, keys]` with `values[i - j]` for the last `rows` queries of `keys`; 0 in the future."""
    newest_first = torch.cat([values[:keys].flip(0), values.new_zeros(rows - 1)])
    return newest_first.unfold(0, keys, 1).flip(0)


def _pairs_to_distances(pairs: Tensor, keys: int) -> Tensor:
    """Sums `[rows, keys]` along the diagonals into `[keys]` by distance i - j: turns `_distances_to_pairs` round."""
    rows = pairs.shape[0]
    # A row of keys + rows values read with a stride one less moves right by one per row: diagonals become columns.
    skewed = F.pad(pairs.flip(1), (0, rows)).flatten()[:-rows].view(rows, keys + rows - 1)
    return skewed.sum(dim=0, dtype=torch.float64)[rows - 1 :]
