"""The same in plain torch: the path of the CPU and of fp64, and the twin of the kernels."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from megarec_kernels.hashing import hash_torch

if TYPE_CHECKING:
    from megarec_kernels.table_rows import RowUpdate

VALUES_AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 24}  # a core's cache; a few launches


def sum_bags_reference(padded: Tensor, index: Tensor) -> Tensor:
    """As `sum_bags`, of at least one slot."""
    empty = padded.shape[0] - 1
    flat = torch.where(index < 0, empty, index).reshape(-1, index.shape[-1])
    if index.shape[-1] == 1:
        sums = padded.index_select(0, flat.squeeze(1))
    else:
        sums = F.embedding_bag(flat, padded, mode="sum", padding_idx=empty)
    return sums.view(*index.shape[:-1], sums.shape[1])


def add_by_row_reference(total: Tensor, grad: Tensor, index: Tensor) -> None:
    """As `add_by_row`, of at least one slot, with `grad` `[N, E]`; neither `[V, E]` nor `[N, S, E]` is ever made."""
    rows, source = sort_slots(index)
    if rows.numel():
        distinct, sums = sum_by_row_reference(grad.to(total.dtype), rows, source)
        total.index_add_(0, distinct, sums)


def sort_slots(index: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that the slots of `index` `[..., S]` name, sorted, and the bag of each; empty slots are left out."""
    rows, order = torch.sort(index.reshape(-1), stable=True)
    num_empty = int(torch.searchsorted(rows, 0))
    return rows[num_empty:], order[num_empty:] // index.shape[-1]


def sum_by_row_reference(values: Tensor, rows: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """As `sum_by_row`, in the order of `rows`."""
    distinct, counts = torch.unique_consecutive(rows, return_counts=True)
    starts = counts.cumsum(0) - counts
    return distinct, F.embedding_bag(source, values, starts, mode="sum")


def update_rows_reference(
    values: Tensor, state: dict[str, Tensor], *, rows: Tensor, grad: Tensor, update: "RowUpdate"
) -> None:
    """As `update_rows`."""
    rows_at_once = max(1, VALUES_AT_ONCE[values.device.type] // values.shape[1])
    for start in range(0, rows.numel(), rows_at_once):
        part = slice(start, start + rows_at_once)
        touched, gradient = rows[part], grad[part] * update.scale
        old = values.index_select(0, touched).to(gradient.dtype)
        change = _direction(state, rows=touched, grad=gradient, update=update)
        new = old.mul_(1.0 - update.lr * update.weight_decay).sub_(change, alpha=update.lr)
        if values.dtype == torch.bfloat16:
            new = _round_at_random(new, update.key, touched * update.row_stride + update.row_offset)
        values.index_copy_(0, touched, new.to(values.dtype))


def _direction(state: dict[str, Tensor], *, rows: Tensor, grad: Tensor, update: "RowUpdate") -> Tensor:
    """What is subtracted, per unit of learning rate, from each row: `[G, E]`. Updates the state."""
    if update.kind == "sgd":
        return grad
    if update.kind == "rowwise_adagrad":
        square = state["square"].index_select(0, rows) + grad.square().mean(dim=1)
        state["square"].index_copy_(0, rows, square)
        return grad / (square.sqrt() + update.eps).unsqueeze(1)
    mean = state["mean"].index_select(0, rows).lerp_(grad, 1.0 - update.beta1)
    state["mean"].index_copy_(0, rows, mean)
    power = grad.square() if update.kind == "adam" else grad.square().mean(dim=1)
    square = state["square"].index_select(0, rows).lerp_(power, 1.0 - update.beta2)
    state["square"].index_copy_(0, rows, square)
    root = (square.sqrt() / math.sqrt(1.0 - update.beta2**update.step)).add_(update.eps)
    return mean / (1.0 - update.beta1**update.step) / (root if update.kind == "adam" else root.unsqueeze(1))


def _round_at_random(values: Tensor, key: int, rows: Tensor) -> Tensor:
    """fp32 `[G, E]` rounded to bf16: 16 random bits are added to the 16 bits that bf16 lacks, and both cut off.

    NaN stays NaN: one more than that of all bits is a zero.
    """
    width = values.shape[1]
    counters = rows.unsqueeze(1) * width + torch.arange(width, device=rows.device)
    noise = (hash_torch(key, counters) & 0xFFFF).to(torch.int32)
    rounded = ((values.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(values.isnan(), values, rounded)
