"""Causal softmax attention over jagged histories: the flash kernel of torch, tile by tile."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarec_kernels.tiles import Tile, TilePlan, heads_first, tokens_first
from megarec_kernels.visibility import Visibility

# The two halves of torch's scaled_dot_product_attention on a CPU. Called here by name, because autograd around the
# public function would add up the gradients of overlapping gathers token by token, or run the forward twice.
flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class JaggedSoftmaxAttention(torch.autograd.Function):
    """Keeps `q`, `k`, `v`, the output and one log-sum-exp per row: nothing grows with the square of a length."""

    @staticmethod
    def forward(  # noqa: PLR0917 (torch hands arguments over by position)
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, plan: TilePlan, visibility: Visibility | None
    ) -> Tensor:
        """The outputs of all tiles, `[T, N, H]`."""
        inputs = heads_first(q), heads_first(k), heads_first(v)
        out_NTH = torch.zeros_like(inputs[2])
        log_sums = []
        for tile in plan.tiles:
            rows = [tile.take(values) for values in inputs]
            mask = None if visibility is None else _mask(visibility, tile, rows[0])
            out, log_sum = flash_forward(*rows, 0.0, mask is None, attn_mask=mask, scale=scale)
            tile.put(out, out_NTH)
            log_sums.append(log_sum)
        ctx.save_for_backward(q, k, v, out_NTH, *log_sums)
        ctx.scale, ctx.plan, ctx.visibility = scale, plan, visibility
        return tokens_first(out_NTH, q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `q`, `k`, `v`."""
        q, k, v, out_NTH, *log_sums = ctx.saved_tensors
        inputs = heads_first(q), heads_first(k), heads_first(v)
        grad_out_NTH = heads_first(gradients[0])
        grads_NTH = tuple(torch.zeros_like(values) for values in inputs)
        for tile, log_sum in zip(ctx.plan.tiles, log_sums, strict=True):
            rows = [tile.take(values) for values in (*inputs, out_NTH)]
            grad_out = tile.take_gradient(grad_out_NTH)
            mask = None if ctx.visibility is None else _mask(ctx.visibility, tile, rows[0])
            tile_grads = flash_backward(grad_out, *rows, log_sum, 0.0, mask is None, attn_mask=mask, scale=ctx.scale)
            for grad, grad_NTH in zip(tile_grads, grads_NTH, strict=True):
                tile.put(grad, grad_NTH)
        grad_q, grad_k, grad_v = (tokens_first(grad, q.dtype) for grad in grads_NTH)
        return grad_q, grad_k, grad_v, None, None, None


def _mask(visibility: Visibility, tile: Tile, rows: Tensor) -> Tensor:
    """What is added to the scores of a tile, `[N, num_users, length, length]` in the dtype of `rows`."""
    seen = visibility.seen(tile, (0, tile.length, tile.length))
    mask = rows.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    return mask.expand(len(rows), *seen.shape)
