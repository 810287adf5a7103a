"""Dropout on a GPU: one pass forward, the same pass over the gradient backward."""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarec_kernels.devices import on_its_device
from megarec_kernels.dropout import WORD, DropoutMask
from megarec_kernels.dropout.programs import drop_channels
from megarec_kernels.hashing import signed

TILE = 4096  # elements: 16 for each thread of 8 warps
NUM_WARPS = 8
MAX_BLOCK = 1024


def mask_arguments(mask: DropoutMask | None) -> dict[str, Any]:
    """What a kernel is told of a mask: the key as the `int64` of the same bits, the probability in 2^-16."""
    if mask is None:
        names = ("key", "first_word", "words_per_token", "threshold")
        return {"token": None, **dict.fromkeys(names, 0), "keep_scale": 1.0}
    return {
        "token": mask.token.contiguous(),
        "key": signed(mask.key),
        "first_word": mask.first_channel // WORD,
        "words_per_token": -(-mask.num_channels // WORD),
        "threshold": round(mask.probability * 65536),
        "keep_scale": 1.0 / (1.0 - mask.probability),
    }


def tile_of(width: int) -> tuple[int, int]:
    """Rows and channels of a tile."""
    block = min(MAX_BLOCK, max(16, triton.next_power_of_2(width)))
    return TILE // block, block


@on_its_device
def run_dropout(x: Tensor, mask: DropoutMask, add_to: Tensor | None) -> Tensor:
    """As `dropout`, by the kernel."""
    dropped: Tensor = _Dropout.apply(x, add_to, mask)
    return dropped


def launch_dropout(x: Tensor, mask: DropoutMask, add_to: Tensor | None) -> Tensor:
    """`x keep / (1 - probability) (+ add_to)`."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return out
    num_rows, width = x.shape
    rows, block = tile_of(width)
    drop_channels[(triton.cdiv(num_rows, rows), triton.cdiv(width, block))](
        x,
        None if add_to is None else add_to.contiguous(),
        out,
        num_rows=num_rows,
        width=width,
        **mask_arguments(mask),
        ADD=add_to is not None,
        ROWS=rows,
        BLOCK=block,
        num_warps=NUM_WARPS,
    )
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, add_to: Tensor | None, mask: DropoutMask) -> Tensor:
        ctx.mask = mask
        return launch_dropout(x, mask, add_to)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        return launch_dropout(gradient, ctx.mask, None), gradient if ctx.needs_input_grad[1] else None, None
