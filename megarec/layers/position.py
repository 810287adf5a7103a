"""Learned vectors by position."""

from typing import Any

import torch
from torch import Tensor, nn

from megarec.parallel.parts import whole_parameter
from megarec.parallel.placement import Init


class PositionEmbedding(nn.Module):
    """A learned vector for each of `max_positions` positions; starts as normal(0, `std`)."""

    def __init__(self, max_positions: int, width: int, *, std: float) -> None:
        super().__init__()
        self.weight = whole_parameter((max_positions, width), Init(kind="normal", std=std))

    def forward(self, position: Tensor) -> Tensor:
        """Positions `[T]` to vectors `[T, width]`."""
        vectors: Tensor = _SelectRows.apply(self.weight, position)  # type: ignore[no-untyped-call]
        return vectors


class _SelectRows(torch.autograd.Function):
    """`weight[index]`; the gradient of a row is summed in the order of the tokens, so it is the same in every run."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = weight.shape[0]
        return weight[index]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        (index,) = ctx.saved_tensors
        ordered, order = torch.sort(index, stable=True)
        starts = torch.searchsorted(ordered, torch.arange(ctx.num_rows + 1, device=index.device))
        wide = grad[order].to(torch.promote_types(grad.dtype, torch.float32))
        summed = torch.segment_reduce(wide, "sum", offsets=starts, axis=0, initial=0)
        return summed.to(grad.dtype), None
