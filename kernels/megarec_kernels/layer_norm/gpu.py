"""Layer norm on a GPU: the launches, and what autograd keeps."""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarec_kernels.devices import on_its_device
from megarec_kernels.dropout import DropoutMask
from megarec_kernels.dropout.gpu import mask_arguments
from megarec_kernels.layer_norm.programs import norm_rows, norm_rows_backward

ELEMENTS_PER_THREAD = 16
MAX_PROGRAMS = 1024  # of the backward pass, each with a partial sum: enough to fill any GPU, small beside the rows


def tile_of(width: int) -> dict[str, int]:
    """Rows and channels of a tile and the warps for it: 4 up to 2048 channels, then as many as keep the registers."""
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(4, block // (32 * ELEMENTS_PER_THREAD))}


@on_its_device
def run_layer_norm(x: Tensor, scale: Tensor | None, shift: Tensor | None, *, eps: float) -> Tensor:
    """As `layer_norm`, by the kernels."""
    normed: Tensor = _Norm.apply(x, None, scale, shift, (eps, None))[1]
    return normed


@on_its_device
def run_add_layer_norm(
    x: Tensor, y: Tensor | None, scale: Tensor | None, shift: Tensor | None, *, eps: float, mask: DropoutMask | None
) -> tuple[Tensor, Tensor]:
    """As `add_layer_norm`, by the kernels."""
    total, normed = _Norm.apply(x, y, scale, shift, (eps, mask))
    return total, normed


class _Norm(torch.autograd.Function):
    """The residual stream, which is x where nothing is added, and its norm."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, y, scale, shift, (eps, mask) = inputs
        x = x.contiguous()
        scale, shift = (None if weight is None else weight.contiguous() for weight in (scale, shift))
        total = x if y is None else torch.empty_like(x)
        normed, num_rows, width = torch.empty_like(x), x.numel() // max(1, x.shape[-1]), x.shape[-1]
        mean, rstd = x.new_empty(2, num_rows, dtype=torch.float32)
        if x.numel():
            tile = tile_of(width)
            norm_rows[(triton.cdiv(num_rows, tile["ROWS"]),)](
                x,
                None if y is None else y.contiguous(),
                total,
                scale,
                shift,
                normed,
                mean,
                rstd,
                num_rows=num_rows,
                width=width,
                eps=eps,
                **mask_arguments(mask),
                ADD=y is not None,
                DROP=mask is not None,
                AFFINE=scale is not None,
                **tile,
            )
        ctx.save_for_backward(total, scale, mean, rstd)
        ctx.adds, ctx.mask = y is not None, mask
        ctx.set_materialize_grads(False)  # where the stream ends here, no zeros are read
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        total_gradient, gradient = (None if g is None else g.contiguous() for g in gradients)
        x, scale, mean, rstd = ctx.saved_tensors
        if gradient is None:
            gradient = torch.zeros_like(x)
        width, num_rows = x.shape[-1], len(mean)
        x_gradient = torch.empty_like(x)
        y_gradient = torch.empty_like(x) if ctx.mask is not None else x_gradient
        tile = tile_of(width)
        num_tiles = triton.cdiv(num_rows, tile["ROWS"])
        tiles_per_program = triton.cdiv(num_tiles, MAX_PROGRAMS)
        num_programs = triton.cdiv(num_tiles, tiles_per_program) if num_tiles else 0
        partials = None if scale is None else mean.new_empty(num_programs, 2, width)
        if x.numel():
            norm_rows_backward[(num_programs,)](
                x,
                gradient,
                total_gradient,
                scale,
                mean,
                rstd,
                x_gradient,
                y_gradient,
                partials,
                num_rows=num_rows,
                width=width,
                tiles_per_program=tiles_per_program,
                **mask_arguments(ctx.mask),
                ADD=total_gradient is not None,
                DROP=ctx.mask is not None,
                AFFINE=scale is not None,
                **tile,
            )
        scale_gradient = shift_gradient = None
        if partials is not None:
            scale_gradient, shift_gradient = partials.sum(0).to(scale.dtype)
        return x_gradient, y_gradient if ctx.adds else None, scale_gradient, shift_gradient, None
