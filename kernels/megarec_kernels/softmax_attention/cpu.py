"""Causal softmax attention over jagged histories, tile by tile; its backward computes the scores again.

A block of rows sees all of its keys at once, so the softmax is the plain one and needs no running maximum.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarec_kernels.tiles import Tile, TilePlan, heads_first


class JaggedSoftmaxAttention(torch.autograd.Function):
    """Keeps `q`, `k`, `v` for the backward and nothing that grows with the square of a length."""

    @staticmethod
    def forward(  # noqa: PLR0917 (torch hands arguments over by position)
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, plan: TilePlan
    ) -> Tensor:
        """The outputs of all tiles, `[T, N, Hv]`."""
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.plan = scale, plan
        q_NTH, k_NTH, v_NTH = heads_first(q) * scale, heads_first(k), heads_first(v)
        out_NTH = torch.zeros_like(v_NTH)
        for tile in plan.tiles:
            queries, keys, values = tile.take(q_NTH), tile.take(k_NTH), tile.take(v_NTH)
            out = torch.empty_like(values)
            for first, last in tile.row_blocks():
                weights = _weights(queries[:, first:last], keys[:, :last])
                torch.bmm(weights, values[:, :last], out=out[:, first:last])
            tile.put(out, out_NTH)
        return out_NTH.transpose(0, 1).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `q`, `k`, `v`."""
        q, k, v = ctx.saved_tensors
        scale, plan = ctx.scale, ctx.plan
        inputs = heads_first(q) * scale, heads_first(k), heads_first(v)
        grad_out_NTH = heads_first(gradients[0])
        grads_NTH = tuple(torch.zeros_like(values) for values in inputs)
        for tile in plan.tiles:
            tile_grads = _tile_backward(tile, [tile.take(x) for x in inputs], tile.take_gradient(grad_out_NTH))
            for grad, grad_NTH in zip(tile_grads, grads_NTH, strict=True):
                tile.put(grad, grad_NTH)
        grads_NTH[0].mul_(scale)
        grad_q, grad_k, grad_v = (grad.transpose(0, 1).to(q.dtype) for grad in grads_NTH)
        return grad_q, grad_k, grad_v, None, None


def _tile_backward(tile: Tile, inputs: list[Tensor], grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, values = inputs
    grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for first, last in tile.row_blocks():
        block, rows = slice(0, last), slice(first, last)
        weights = _weights(queries[:, rows], keys[:, block])
        grad_v[:, block].baddbmm_(weights.transpose(1, 2), grad_out[:, rows])
        grad_weights = torch.bmm(grad_out[:, rows], values[:, block].transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        torch.bmm(grad_scores, keys[:, block], out=grad_q[:, rows])
        grad_k[:, block].baddbmm_(grad_scores.transpose(1, 2), queries[:, rows])
    return grad_q, grad_k, grad_v


def _weights(queries: Tensor, keys: Tensor) -> Tensor:
    """Softmax of the scores of the last rows of a history, `[M, rows, keys]`; the future is masked."""
    rows = queries.shape[1]
    scores = torch.bmm(queries, keys.transpose(1, 2))
    future = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu_(1)
    scores[:, :, -rows:].masked_fill_(future, float("-inf"))
    return scores.softmax(dim=-1)
