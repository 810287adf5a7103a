"""Sums of fetched rows, with gradients that are added up per row in a fixed order."""

from typing import Any

import torch
from megarec_kernels.table_rows import add_by_row, sum_bags
from torch import Tensor

from megarec.embedding.exchange import Route


class Fetched:
    """The rows that one step uses, with the buffer in which their gradients are added up.

    Args:
        padded: the rows, and one row of zeros after the last that serves the empty slots, `[U + 1, E]`.
        index: see below.
        route: see below.

    Attributes:
        values: the rows, `[U, E]`.
        index: for every id asked for, its row in `values` or -1, in the shape of the request.
        grad: the gradient of `values`, `[U, E]`, in fp32 or better; the backward pass of `lookup` adds in place.
        route: the way back to the owners.
    """

    def __init__(self, padded: Tensor, *, index: Tensor, route: Route) -> None:
        self.index = index
        self.route = route
        self.padded = padded
        self.values = padded[:-1]
        self.grad = torch.zeros_like(self.values, dtype=gradient_dtype(padded.dtype))
        # Autograd calls a backward only for the sake of some leaf.
        self.leaf = torch.zeros((), dtype=padded.dtype, device=padded.device, requires_grad=True)


def lookup(fetched: Fetched, index: Tensor) -> Tensor:
    """The sum over slots of fetched rows: `[..., S]` to `[..., E]`; a slot of -1 gives nothing.

    The backward pass adds each row's gradients into `fetched.grad` in an order that `index` alone decides, so it is
    deterministic, and neither `[U, E]` nor `[..., S, E]` is ever made.
    """
    if not index.numel():
        return fetched.padded.new_zeros(*index.shape[:-1], fetched.padded.shape[1])
    result: Tensor = _Lookup.apply(fetched.leaf, fetched, index)
    return result


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which gradients of values of type `dtype` are added up."""
    return dtype if dtype == torch.float64 else torch.float32


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, fetched: Fetched, index: Tensor) -> Tensor:
        del leaf
        ctx.fetched = fetched
        ctx.save_for_backward(index)
        return sum_bags(fetched.padded, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        (index,) = ctx.saved_tensors
        add_by_row(ctx.fetched.grad, grads[0], index)
        return None, None, None
