"""SiLU of packed rows and behind a product, on a GPU: the launches, and what autograd keeps."""

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarec_kernels.devices import on_its_device
from megarec_kernels.silu import SiluOn, UvqkLayout
from megarec_kernels.silu.programs import linear_silu_tile, pack_gradients

TILE = 4096  # elements of a tile of packed gradients, 16 for each thread of 8 warps
MAX_BLOCK = 1024


def pack_tile_of(layout: UvqkLayout) -> dict[str, int]:
    """Rows and channels of a tile of packed gradients."""
    block = min(MAX_BLOCK, max(16, triton.next_power_of_2(sum(layout.widths))))
    return {"ROWS": TILE // block, "BLOCK": block, "num_warps": 8}


def product_tile_of(dtype: torch.dtype, num_columns: int, in_width: int) -> dict[str, Any]:
    """The tile of a product: the widest that two warp groups hold in registers; half for narrow and uneven ones."""
    rows, columns, depth, warps = 128, 256, 64, 8
    if dtype == torch.float32:  # without tensor cores
        rows, columns, depth, warps = 64, 64, 32, 4
    even = in_width % depth == 0
    if columns == 256 and (num_columns <= 128 or not even):
        columns = 128
    shape = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "GROUP": 8, "EVEN": even}
    return {**shape, "num_warps": warps, "num_stages": 3}


@on_its_device
def run_split_silu(uvqk: Tensor, layout: UvqkLayout, *, silu_on: SiluOn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `split_silu`, with the gradient by the kernel."""
    u, v, q, k = _SplitSilu.apply(uvqk, layout, silu_on)
    return u, v, q, k


class _SplitSilu(torch.autograd.Function):
    """Forward is torch's own: SiLU over contiguous memory is at the limit, and the rest are views."""

    @staticmethod
    def forward(ctx: Any, uvqk: Tensor, layout: UvqkLayout, silu_on: SiluOn) -> tuple[Tensor, ...]:
        uvqk = uvqk.contiguous()
        ctx.save_for_backward(uvqk if silu_on != "none" else None)
        ctx.layout, ctx.silu_on = layout, silu_on
        packed = F.silu(uvqk) if silu_on == "uvqk" else uvqk
        u, v, q, k = packed.view(len(packed), layout.num_heads, sum(layout.widths)).split(layout.widths, dim=2)
        return F.silu(u).contiguous() if silu_on == "u" else u, v, q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (uvqk,) = ctx.saved_tensors
        layout: UvqkLayout = ctx.layout
        parts = [g if g.stride(2) == 1 else g.contiguous() for g in gradients]
        packed = parts[0].new_empty(len(parts[0]), layout.row_width)
        num_rows = len(packed) * layout.num_heads
        if num_rows:
            tile = pack_tile_of(layout)
            grid = triton.cdiv(num_rows, tile["ROWS"]), triton.cdiv(sum(layout.widths), tile["BLOCK"])
            pack_gradients[grid](
                uvqk,
                *parts,
                packed,
                num_rows,
                *(stride for part in parts for stride in part.stride()[:2]),
                NUM_HEADS=layout.num_heads,
                V_WIDTH=layout.v_head_width,
                QK_WIDTH=layout.qk_head_width,
                SILU_ON_ALL=ctx.silu_on == "uvqk",
                SILU_ON_U=ctx.silu_on == "u",
                **tile,
            )
        return packed, None, None


@on_its_device
def run_linear_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `linear_silu`, by the kernel."""
    activated: Tensor = _LinearSilu.apply(x, weight, bias)
    return activated


class _LinearSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        (num_rows, in_width), num_columns = x.shape, len(weight)
        linear, activated = x.new_empty(num_rows, num_columns), x.new_empty(num_rows, num_columns)
        if linear.numel():
            tile = product_tile_of(x.dtype, num_columns, in_width)
            grid = (triton.cdiv(num_rows, tile["ROWS"]) * triton.cdiv(num_columns, tile["COLUMNS"]),)
            linear_silu_tile[grid](
                x,
                weight,
                None if bias is None else bias.contiguous(),
                linear,
                activated,
                num_rows,
                num_columns,
                in_width,
                x.stride(0),
                weight.stride(0),
                HAS_BIAS=bias is not None,
                **tile,
            )
        ctx.save_for_backward(x, weight, linear)
        ctx.has_bias = bias is not None
        return activated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, linear = ctx.saved_tensors
        gradient = torch.ops.aten.silu_backward(gradients[0], linear)
        wanted = ctx.needs_input_grad
        return (
            gradient @ weight if wanted[0] else None,
            gradient.T @ x if wanted[1] else None,
            gradient.sum(0) if ctx.has_bias and wanted[2] else None,
        )
