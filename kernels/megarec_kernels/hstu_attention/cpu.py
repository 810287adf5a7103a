"""HSTU attention over jagged histories, tile by tile; its backward computes the scores again."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarec_kernels.hstu_attention.times import TimeBuckets
from megarec_kernels.tiles import AttentionPlan, heads_first, tokens_first
from megarec_kernels.visibility import Visibility


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
        bias = Bias(position_bias, time_bias, settings, dtype=torch.promote_types(q.dtype, torch.float32))
        inputs = heads_first(q) * settings.scale, heads_first(k), heads_first(v)
        out_NTH = torch.zeros_like(inputs[2])
        add_outputs(out_NTH, inputs, range(len(settings.plan.tiles)), bias=bias)
        return tokens_first(out_NTH.div_(settings.divisor), q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `q`, `k`, `v` and the two biases."""
        q, k, v, position_bias, time_bias = ctx.saved_tensors
        settings: HSTUSettings = ctx.settings
        bias = Bias(position_bias, time_bias, settings, dtype=torch.promote_types(q.dtype, torch.float32))
        inputs = heads_first(q) * settings.scale, heads_first(k), heads_first(v)
        grad_out_NTH = heads_first(gradients[0]) / settings.divisor
        grads_NTH = torch.zeros_like(inputs[0]), torch.zeros_like(inputs[1]), torch.zeros_like(inputs[2])
        add_gradients(grads_NTH, grad_out_NTH, inputs, range(len(settings.plan.tiles)), bias=bias)
        grads_NTH[0].mul_(settings.scale)
        grad_q, grad_k, grad_v = (tokens_first(grad, q.dtype) for grad in grads_NTH)
        return grad_q, grad_k, grad_v, *bias.gradients(), None


Three = tuple[Tensor, Tensor, Tensor]


def add_outputs(out_NTH: Tensor, inputs: Three, numbers: range, *, bias: "Bias") -> None:
    """Adds `sum_j SiLU(q_i . k_j + biases) v_j` over the keys j of some tiles that query i sees.

    Args:
        out_NTH: `[N, I, Hv]`, the sums so far.
        inputs: q `[N, I, H]` with the scale in it, k `[N, J, H]`, v `[N, J, Hv]`, in fp32 or fp64.
        numbers: of the tiles, or rectangles, in the plan that `bias` was made for.
        bias: of the scores.
    """
    for number in numbers:
        tile = bias.tiles[number]
        queries, keys, values = tile.queries.take(inputs[0]), tile.keys.take(inputs[1]), tile.keys.take(inputs[2])
        out = values.new_zeros(*queries.shape[:2], values.shape[2])
        for place, block in enumerate(tile.row_blocks()):
            first, last, num_keys = block
            scores = torch.bmm(queries[:, first:last], keys[:, :num_keys].transpose(1, 2))
            bias.add(scores, block, number=number, place=place)
            weights = _forget_unseen(F.silu(scores, inplace=True), tile.seen(bias.visibility, block))
            torch.bmm(weights, values[:, :num_keys], out=out[:, first:last])
        tile.queries.add(out, out_NTH)


def add_gradients(grads_NTH: Three, grad_out_NTH: Tensor, inputs: Three, numbers: range, *, bias: "Bias") -> None:
    """Adds what some tiles give to the gradients of q, k, v, in the shapes of `inputs`, and of the biases.

    Args:
        grads_NTH: of q (with the scale in it), k and v.
        grad_out_NTH: of the sums, `[N, I, Hv]`.
        inputs: as in `add_outputs`.
        numbers: likewise.
        bias: likewise.
    """
    for number in numbers:
        tile = bias.tiles[number]
        rows = tile.queries.take(inputs[0]), tile.keys.take(inputs[1]), tile.keys.take(inputs[2])
        found = _tile_backward(number, rows, tile.queries.take_gradient(grad_out_NTH), bias=bias)
        for side, grad, grad_NTH in zip((tile.queries, tile.keys, tile.keys), found, grads_NTH, strict=True):
            side.add(grad, grad_NTH)


def _tile_backward(number: int, inputs: Three, grad_out: Tensor, *, bias: "Bias") -> Three:
    tile = bias.tiles[number]
    queries, keys, values = inputs
    grad_q, grad_k, grad_v = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for place, block in enumerate(tile.row_blocks()):
        rows, seen = slice(*block[:2]), slice(block[2])
        scores = torch.bmm(queries[:, rows], keys[:, seen].transpose(1, 2))
        bias.add(scores, block, number=number, place=place)
        grad_scores = torch.bmm(grad_out[:, rows], values[:, seen].transpose(1, 2))
        visible = tile.seen(bias.visibility, block)
        grad_scores = _forget_unseen(torch.ops.aten.silu_backward(grad_scores, scores), visible)
        weights = _forget_unseen(F.silu(scores, inplace=True), visible)
        grad_v[:, seen].baddbmm_(weights.transpose(1, 2), grad_out[:, rows])
        torch.bmm(grad_scores, keys[:, seen], out=grad_q[:, rows])
        grad_k[:, seen].baddbmm_(grad_scores.transpose(1, 2), queries[:, rows])
        bias.collect(grad_scores, block, number=number, place=place)
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


class Bias:
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
        self.tiles = settings.plan.tiles
        self.time_buckets = settings.time_buckets
        self.visibility = settings.visibility
        self.position = None if position_bias is None else position_bias.to(dtype)
        self.time = None if time_bias is None else time_bias.to(dtype)
        self.grad_position = None if position_bias is None else torch.zeros_like(position_bias, dtype=torch.float64)
        self.grad_time = None if time_bias is None else torch.zeros_like(time_bias, dtype=torch.float64)

    def add(self, scores: Tensor, block: tuple[int, int, int], *, number: int, place: int) -> None:
        """Adds both biases in place; `block` is the one at `place` of tile `number`."""
        _, rows, keys = scores.shape
        tile = self.tiles[number]
        by_user = scores.view(-1, tile.num_users, rows, keys)
        if self.position is not None:
            distance = tile.distance(self.visibility, block)
            by_user.add_(
                _distances_to_pairs(self.position, rows, keys) if distance is None else self.position[distance]
            )
        if self.time is not None and self.time_buckets is not None:
            buckets = self.time_buckets.blocks[number][place]
            by_user.add_(self.time.index_select(0, buckets.flatten().int()).view(buckets.shape))

    def collect(self, grad_scores: Tensor, block: tuple[int, int, int], *, number: int, place: int) -> None:
        """Adds the gradient of one block to the gradients of the biases."""
        _, rows, keys = grad_scores.shape
        tile = self.tiles[number]
        by_user = grad_scores.view(-1, tile.num_users, rows, keys)
        distance = None if self.grad_position is None else tile.distance(self.visibility, block)
        if self.grad_position is not None and distance is None:
            self.grad_position[:keys] += _pairs_to_distances(grad_scores.sum(dim=0), keys)
        elif self.grad_position is not None and distance is not None:
            self.grad_position += _sum_by(distance, by_user, len(self.grad_position))
        if self.grad_time is not None and self.time_buckets is not None:
            self.grad_time += _sum_by(self.time_buckets.blocks[number][place], by_user, len(self.grad_time))

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Gradients of the biases in their own dtype."""
        sums = self.grad_position, self.grad_time
        return tuple(
            None if total is None or original is None else total.to(original.dtype)
            for total, original in zip(sums, self.originals, strict=True)
        )


def _sum_by(index: Tensor, by_user: Tensor, size: int) -> Tensor:
    """Sums `[N, num_users, rows, keys]` by an `index` `[num_users, rows, keys]` into `[size]`, in fp64."""
    return torch.bincount(index.flatten(), weights=by_user.sum(dim=0).double().flatten(), minlength=size)


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
