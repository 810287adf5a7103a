"""Gated norm on a GPU: the launches, and what autograd keeps."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarec_kernels.devices import on_its_device
from megarec_kernels.dropout import DropoutMask
from megarec_kernels.dropout.gpu import mask_arguments
from megarec_kernels.gated_norm import Concat, Over
from megarec_kernels.gated_norm.programs import gate_rows, gate_rows_backward

MAX_PROGRAMS = 1024  # of the backward pass, each with a partial sum: enough to fill any GPU, small beside the rows


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a kernel is compiled for: rows of `width` channels, `groups` rows to a token, what is made of them."""

    groups: int
    width: int
    head_width: int
    scale: str
    concat: Concat
    given: bool
    drop: bool

    def constants(self) -> dict[str, Any]:
        """By the kernels' names, with the tile: 8 channels for each thread."""
        block = max(16, triton.next_power_of_2(self.width))
        return {
            **{name.upper(): value for name, value in vars(self).items()},
            "ROWS": max(1, 1024 // block),
            "BLOCK": block,
            "num_warps": max(4, block // 256),
        }


@on_its_device
def run_gated_norm(
    u: Tensor,
    attention: Tensor,
    weights: tuple[Tensor | None, ...],
    *,
    over: Over,
    eps: float,
    concat: Concat,
    mask: DropoutMask | None,
) -> Tensor:
    """As `gated_norm`, by the kernels; `weights` are scale, shift, mean and 1 / standard deviation."""
    _, num_heads, head_width = u.shape
    together = over == "all_heads"
    shape = Shape(
        groups=1 if together else num_heads,
        width=num_heads * head_width if together else head_width,
        head_width=head_width,
        scale="none" if weights[0] is None else "channel" if together else "group",
        concat=concat,
        given=weights[2] is not None,
        drop=mask is not None,
    )
    out: Tensor = _GatedNorm.apply(u, attention, *weights, (shape, eps, mask))
    return out


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        u, attention, scale, shift, mean, rstd, (shape, eps, mask) = inputs
        u, attention = u if u.stride(2) == 1 else u.contiguous(), attention.contiguous()
        scale, shift, mean, rstd = (None if x is None else x.contiguous() for x in (scale, shift, mean, rstd))
        num_rows = len(u) * shape.groups
        if not shape.given:
            mean, rstd = u.new_empty(2, num_rows, dtype=torch.float32)
        out = u.new_empty(len(u), shape.groups * shape.width * (1 if shape.concat == "none" else 3))
        if out.numel():
            constants = shape.constants()
            gate_rows[(triton.cdiv(num_rows, constants["ROWS"]),)](
                u,
                attention,
                scale,
                shift,
                out,
                mean,
                rstd,
                num_rows=num_rows,
                u_token_stride=u.stride(0),
                u_head_stride=u.stride(1),
                eps=eps,
                **mask_arguments(mask),
                **constants,
            )
        ctx.save_for_backward(u, attention, scale, shift, mean, rstd)
        ctx.shape, ctx.mask = shape, mask
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        u, attention, scale, shift, mean, rstd = ctx.saved_tensors
        shape: Shape = ctx.shape
        constants = shape.constants()
        num_rows = len(u) * shape.groups
        num_tiles = triton.cdiv(num_rows, constants["ROWS"])
        tiles_per_program = max(1, triton.cdiv(num_tiles, MAX_PROGRAMS))
        num_programs = triton.cdiv(num_tiles, tiles_per_program)
        sizes = {"none": (0,), "channel": (num_programs, 2, shape.width), "group": (num_rows, 2)}
        partials = u.new_empty(sizes[shape.scale], dtype=torch.float32)
        u_gradient, attention_gradient = u.new_empty(u.shape), u.new_empty(u.shape)
        mean_gradient, rstd_gradient = (torch.empty_like(x) if shape.given else None for x in (mean, rstd))
        if u.numel():
            gate_rows_backward[(num_programs,)](
                gradients[0].contiguous(),
                u,
                attention,
                scale,
                shift,
                mean,
                rstd,
                u_gradient,
                attention_gradient,
                mean_gradient,
                rstd_gradient,
                partials,
                num_rows=num_rows,
                tiles_per_program=tiles_per_program,
                u_token_stride=u.stride(0),
                u_head_stride=u.stride(1),
                **mask_arguments(ctx.mask),
                **constants,
            )
        scale_gradient = shift_gradient = None
        if shape.scale == "channel":
            scale_gradient, shift_gradient = partials.sum(0).to(scale.dtype)
        elif shape.scale == "group":
            scale_gradient, shift_gradient = partials.view(len(u), shape.groups, 2).sum(0).T.to(scale.dtype)
        return u_gradient, attention_gradient, scale_gradient, shift_gradient, mean_gradient, rstd_gradient, None
