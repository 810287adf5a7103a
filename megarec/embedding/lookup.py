"""Sums of fetched rows, and the one deterministic way gradients are added up per row."""

from typing import Any

import torch
import torch.nn.functional as F
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

    The backward pass adds each row's gradients into `fetched.grad` in the order of `index`, so it is deterministic,
    and neither `[U, E]` nor `[..., S, E]` is ever made.
    """
    if not index.numel():
        return fetched.padded.new_zeros(*index.shape[:-1], fetched.padded.shape[1])
    result: Tensor = _Lookup.apply(fetched.leaf, fetched, index)
    return result


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which gradients of values of type `dtype` are added up."""
    return dtype if dtype == torch.float64 else torch.float32


def sum_by_row(values: Tensor, rows: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Adds `values[source[i]]` to row `rows[i]` for all i, in the order of i.

    Args:
        values: `[N, E]`.
        rows: `[n]`, sorted.
        source: `[n]`, indices into `values`.

    Returns:
        the distinct rows `[G]` and their sums `[G, E]`.
    """
    distinct, counts = torch.unique_consecutive(rows, return_counts=True)
    starts = counts.cumsum(0) - counts
    return distinct, F.embedding_bag(source, values, starts, mode="sum")


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, fetched: Fetched, index: Tensor) -> Tensor:
        del leaf
        ctx.fetched, ctx.num_slots = fetched, index.shape[-1]
        ctx.save_for_backward(index)
        empty = fetched.padded.shape[0] - 1
        flat = torch.where(index < 0, empty, index).reshape(-1, index.shape[-1])
        if index.shape[-1] == 1:
            sums = fetched.padded.index_select(0, flat.squeeze(1))
        else:
            sums = F.embedding_bag(flat, fetched.padded, mode="sum", padding_idx=empty)
        return sums.view(*index.shape[:-1], sums.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        (index,) = ctx.saved_tensors
        total: Tensor = ctx.fetched.grad
        grad = grads[0].reshape(-1, total.shape[1]).to(total.dtype)
        rows, order = torch.sort(index.reshape(-1), stable=True)
        num_empty = int(torch.searchsorted(rows, 0))
        rows, source = rows[num_empty:], order[num_empty:] // ctx.num_slots
        if rows.numel():
            distinct, sums = sum_by_row(grad, rows, source)
            total.index_add_(0, distinct, sums)
        return None, None, None
