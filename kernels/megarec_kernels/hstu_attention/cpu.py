"""HSTU attention over jagged histories, tile by tile; its backward computes the scores again."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarec_kernels.hstu_attention.times import TimeBuckets
from megarec_kernels.tiles import (
    MAX_PAIRS,
    ROWS_PER_BLOCK,
    AttentionPlan,
    Memory,
    Tile,
    heads_first,
    tokens_first,
)
from megarec_kernels.visibility import Visibility

HIDDEN = -1e30  # SiLU and its derivative are 0 there, and no score reaches it


@dataclass(frozen=True, kw_only=True)
class HSTUSettings:
    """What the kernel needs besides tensors with gradients."""

    scale: float
    divisor: float
    plan: AttentionPlan
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
        inputs = heads_first(q), heads_first(k), heads_first(v)
        bias = Bias(position_bias, time_bias, settings, dtype=inputs[0].dtype)
        return tokens_first(attend(inputs, range(len(settings.plan.tiles)), bias=bias), q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `q`, `k`, `v` and the two biases."""
        q, k, v, position_bias, time_bias = ctx.saved_tensors
        settings: HSTUSettings = ctx.settings
        inputs = heads_first(q), heads_first(k), heads_first(v)
        bias = Bias(position_bias, time_bias, settings, dtype=inputs[0].dtype)
        found = attend_backward(heads_first(gradients[0]), inputs, range(len(settings.plan.tiles)), bias=bias)
        grad_q, grad_k, grad_v = (tokens_first(grad, q.dtype) for grad in found)
        return grad_q, grad_k, grad_v, *bias.gradients(), None


Block = tuple[int, int, int]
Three = tuple[Tensor, Tensor, Tensor]


def attend(inputs: Three, numbers: range, *, bias: "Bias") -> Tensor:
    """`sum_j SiLU(scale q_i . k_j + biases) v_j / divisor` over the keys j of some tiles that query i sees.

    Args:
        inputs: q `[N, I, H]`, k `[N, J, H]`, v `[N, J, Hv]`, in fp32 or fp64.
        numbers: of the tiles, or rectangles, in the plan that `bias` was made for.
        bias: of the scores.

    Returns:
        `[N, I, Hv]`, 0 for queries of no tile.
    """
    scale, share = bias.settings.scale, 1 / bias.settings.divisor
    out = _zeros(inputs[2], inputs[0].shape[1])
    *of_rows, of_sums, of_scores = (Memory(out) for _ in range(5))
    for number in numbers:
        tile = bias.tiles[number]
        sides = tile.queries, tile.keys, tile.keys
        queries, keys, values = (side.take(x, memory) for side, x, memory in zip(sides, inputs, of_rows, strict=True))
        sums = _start_sums(out, tile.queries, of_sums)
        for place, block in enumerate(tile.row_blocks()):
            (first, last, num_keys), biases = block, bias.of_block(block, number=number, place=place)
            for heads in _groups_of_heads(len(out), biases):
                q, k, v = queries[heads, :, first:last], keys[heads, :, :num_keys], values[heads, :, :num_keys]
                weights = F.silu(_scores(of_scores, q, k, biases=biases, scale=scale), inplace=True)
                _batch(sums[heads, :, first:last]).baddbmm_(weights, _batch(v), beta=0, alpha=share)
        if tile.queries.num_users > 1:
            tile.queries.put(sums, out, of_scores)
    return out


def attend_backward(grad_out: Tensor, inputs: Three, numbers: range, *, bias: "Bias") -> Three:
    """What some tiles give to the gradients of q, k and v, in the shapes of `inputs`; `bias` collects its own.

    Args:
        grad_out: of what `attend` returned, `[N, I, Hv]`.
        inputs: as in `attend`.
        numbers: likewise.
        bias: likewise.
    """
    grads = _zeros(inputs[0]), _zeros(inputs[1]), _zeros(inputs[2])
    memories = [Memory(grad_out) for _ in range(10)]
    for number in numbers:
        tile = bias.tiles[number]
        sides = tile.queries, tile.keys, tile.keys
        queries, keys, values = (
            side.take(x, memory) for side, x, memory in zip(sides, inputs, memories[:3], strict=True)
        )
        outer = tile.queries.take_gradient(grad_out, memories[3])
        grad_q, grad_k, grad_v = (_start_sums(*x) for x in zip(grads, sides, memories[4:7], strict=True))
        sums = grad_q, grad_k, grad_v
        _add_tile(sums, outer, (queries, keys, values), number=number, bias=bias, memories=memories[7:])
        for side, found, grad in zip(sides, sums, grads, strict=True):
            if side.num_users > 1:
                side.put(found, grad, memories[7])
    return grads


def _add_tile(
    sums: Three, grad_out: Tensor, inputs: Three, *, number: int, bias: "Bias", memories: list[Memory]
) -> None:
    """Adds what a tile gives to the gradients of its q, k, v; all are `[N, num_users, rows, width]`.

    With sigma = sigmoid(s) and w = SiLU(s) = s sigma, the derivative of SiLU is `sigma + w (1 - sigma)`.
    """
    scale, share = bias.settings.scale, 1 / bias.settings.divisor
    (queries, keys, values), (grad_q, grad_k, grad_v) = inputs, sums
    of_scores, of_sigmoids, of_biases = memories
    for place, block in enumerate(bias.tiles[number].row_blocks()):
        (first, last, num_keys), biases = block, bias.of_block(block, number=number, place=place)
        grad_biases = of_biases.shaped(*biases.shape).zero_() if bias.learns else None
        for heads in _groups_of_heads(len(queries), biases):
            q, k = queries[heads, :, first:last], keys[heads, :, :num_keys]
            g, v = _batch(grad_out[heads, :, first:last]), _batch(values[heads, :, :num_keys])
            scores = _scores(of_scores, q, k, biases=biases, scale=scale)
            sigmoid = torch.sigmoid(scores, out=of_sigmoids.shaped(*scores.shape))
            weights = scores.mul_(sigmoid)
            _batch(grad_v[heads, :, :num_keys]).baddbmm_(weights.transpose(1, 2), g, alpha=share)
            slope = torch.lerp(sigmoid, bias.one, weights, out=sigmoid)
            grad_scores = weights.baddbmm_(g, v.transpose(1, 2), beta=0, alpha=share).mul_(slope)
            _batch(grad_q[heads, :, first:last]).baddbmm_(grad_scores, _batch(k), beta=0, alpha=scale)
            _batch(grad_k[heads, :, :num_keys]).baddbmm_(grad_scores.transpose(1, 2), _batch(q), alpha=scale)
            if grad_biases is not None:
                for of_head in grad_scores.view(-1, *biases.shape):
                    grad_biases += of_head
        if grad_biases is not None:
            bias.collect(grad_biases, block, number=number, place=place)


def _zeros(like: Tensor, num_tokens: int | None = None) -> Tensor:
    """Zeros `[N, T, width]` that lie in memory as `[T, N, width]`."""
    heads, tokens, width = like.shape
    return like.new_zeros(num_tokens or tokens, heads, width).transpose(0, 1)


def _start_sums(total_NTH: Tensor, side: Tile, memory: Memory) -> Tensor:
    """Zeros `[N, num_users, rows, H]` to sum in: a part of `total_NTH` itself if the tile is one history."""
    if side.num_users == 1:
        return side.take(total_NTH)
    return memory.shaped(len(total_NTH), side.num_users, side.length, total_NTH.shape[2]).zero_()


def _groups_of_heads(num_heads: int, biases: Tensor) -> Iterator[slice]:
    """Heads whose scores of a block fit into the cache together; of several histories one head, so that views do."""
    size = max(1, MAX_PAIRS // biases.numel()) if len(biases) == 1 else 1
    for first in range(0, num_heads, size):
        yield slice(first, min(first + size, num_heads))


def _batch(rows: Tensor) -> Tensor:
    """`[heads, num_users, rows, width]` as a batch of matrices; a view, since there is one head or one history."""
    return rows.flatten(0, 1)


def _scores(memory: Memory, q: Tensor, k: Tensor, *, biases: Tensor, scale: float) -> Tensor:
    """`scale q_i . k_j + biases` of some heads, `[heads * num_users, rows, keys]`."""
    scores = memory.shaped(*q.shape[:3], k.shape[2]).copy_(biases)
    return _batch(scores).baddbmm_(_batch(q), _batch(k).transpose(1, 2), alpha=scale)


class Bias:
    """What is added to the scores of a block, `[num_users, rows, keys]`, and the sums of its gradients.

    It is the position and the time bias, and `HIDDEN` where a query does not see a key, so that SiLU and its
    derivative are 0 there. Where queries and keys are the same rows and a query sees all that is not later, position
    bias and `HIDDEN` depend on i - j alone: every block is a part of one table, and its gradient adds to that part.
    """

    def __init__(
        self,
        position_bias: Tensor | None,
        time_bias: Tensor | None,
        settings: HSTUSettings,
        *,
        dtype: torch.dtype,
    ) -> None:
        self.originals = position_bias, time_bias
        self.settings = settings
        self.tiles = settings.plan.tiles
        self.learns = position_bias is not None or time_bias is not None
        self.one = torch.ones((), dtype=dtype, device=settings.plan.cu_seqlens.device)
        self.position = None if position_bias is None else position_bias.to(dtype)
        self.time = None if time_bias is None else time_bias.to(dtype)
        self.grad_position = None if position_bias is None else torch.zeros_like(position_bias, dtype=torch.float64)
        self.grad_time = None if time_bias is None else torch.zeros_like(time_bias, dtype=torch.float64)
        longest = max((tile.queries.length for tile in self.tiles), default=1)
        self.last_block = (longest - 1) // ROWS_PER_BLOCK * ROWS_PER_BLOCK
        self.table = self._make_table(min(longest, ROWS_PER_BLOCK))
        self.grad_table = torch.zeros_like(self.table)

    def _make_table(self, rows: int) -> Tensor:
        """`[rows, keys]` of the last block of the longest history: `position[i - j]`, `HIDDEN` in the future."""
        keys = self.last_block + rows
        past = self.one.new_zeros(0) if self.position is None else self.position[:keys]
        past = F.pad(past, (0, keys - len(past)))
        newest_first = torch.cat([past.flip(0), past.new_full((rows - 1,), HIDDEN)])
        return newest_first.unfold(0, keys, 1).flip(0).contiguous()

    def _part(self, table: Tensor, block: Block) -> Tensor:
        """The rows and columns of a block in the table; earlier blocks see fewer keys, the nearest ones."""
        first, last, num_keys = block
        skipped = self.last_block - first
        return table[: last - first, skipped : skipped + num_keys]

    def of_block(self, block: Block, *, number: int, place: int) -> Tensor:
        """What is added to the scores of the block that is at `place` of tile `number`."""
        tile, visibility = self.tiles[number], self.settings.visibility
        buckets, seen = self._buckets(number, place), tile.seen(visibility, block)
        time = None if self.time is None else self.time.index_select(0, buckets.flatten().int()).view(buckets.shape)
        if seen is None:
            part = self._part(self.table, block)
            return part.expand(tile.queries.num_users, *part.shape) if time is None else time.add_(part)
        biases = self.one.new_zeros(seen.shape) if time is None else time
        if self.position is not None:
            distance = tile.distance(visibility, block)
            assert distance is not None
            biases += self.position.index_select(0, distance.flatten()).view(distance.shape)
        return biases.masked_fill_(~seen, HIDDEN)

    def collect(self, grad: Tensor, block: Block, *, number: int, place: int) -> None:
        """Adds the gradient of one block, summed over the heads, to the gradients of the biases."""
        distance = self.tiles[number].distance(self.settings.visibility, block)
        if self.grad_position is not None and distance is None:
            self._part(self.grad_table, block).add_(grad[0] if len(grad) == 1 else grad.sum(dim=0))
        elif self.grad_position is not None and distance is not None:
            self.grad_position += _sum_by(distance, grad, len(self.grad_position))
        if self.grad_time is not None:
            self.grad_time += _sum_by(self._buckets(number, place), grad, len(self.grad_time))

    def _buckets(self, number: int, place: int) -> Tensor:
        if self.settings.time_buckets is None:
            return self.one
        return self.settings.time_buckets.blocks[number][place]

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Gradients of the biases in their own dtype, after all blocks were collected."""
        if self.grad_position is not None:
            by_distance = _pairs_to_distances(self.grad_table)[: len(self.grad_position)]
            self.grad_position[: len(by_distance)] += by_distance
        sums = self.grad_position, self.grad_time
        return tuple(
            None if total is None or original is None else total.to(original.dtype)
            for total, original in zip(sums, self.originals, strict=True)
        )


def _sum_by(index: Tensor, pairs: Tensor, size: int) -> Tensor:
    """Sums `pairs` by an `index` of the same shape into `[size]`, in fp64."""
    return torch.bincount(index.flatten(), weights=pairs.double().flatten(), minlength=size)


def _pairs_to_distances(pairs: Tensor) -> Tensor:
    """Sums `[rows, keys]` along the diagonals into `[keys]` by distance: row i is query `keys - rows + i`."""
    rows, keys = pairs.shape
    # A row of keys + rows values read with a stride one less moves right by one per row: diagonals become columns.
    skewed = F.pad(pairs.flip(1), (0, rows)).flatten()[:-rows].view(rows, keys + rows - 1)
    return skewed.sum(dim=0, dtype=torch.float64)[rows - 1 :]
