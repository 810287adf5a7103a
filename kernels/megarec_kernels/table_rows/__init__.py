"""Rows of embedding tables: bag sums, sums of gradients per row, row-wise optimizers."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megarec_kernels.devices import has_kernel
from megarec_kernels.table_rows import reference

MAX_WIDTH = 4096  # a row stays in the registers of one program
Kind = Literal["sgd", "rowwise_adagrad", "adam", "rowwise_adam"]


@dataclass(frozen=True, kw_only=True)
class RowUpdate:
    """One step of a row-wise optimizer. A row is updated once, however often it was used.

    With the gradient g of a row x of width E, times `scale`; all in fp32, moments are bias-corrected by `step`:

        sgd               d = g
        rowwise_adagrad   square += mean(g^2);                           d = g / (sqrt(square) + eps)
        adam              mean, square decay to g, g^2;                  d = mean' / (sqrt(square') + eps)
        rowwise_adam      mean decays to g, square to mean(g^2);         d = mean' / (sqrt(square') + eps)
        x = (1 - lr weight_decay) x - lr d

    Source: FBGEMM's EXACT_ROWWISE_ADAGRAD; Adam, arXiv 1412.6980, with AdamW's decay, arXiv 1711.05101.

    Attributes:
        kind: which of the four.
        lr: the learning rate.
        scale: multiplies the gradients, a number or a scalar on the device (clipping).
        step: the number of this update, from 1.
        beta1: decay of `mean`.
        beta2: decay of `square` (adam).
        eps: added to the root.
        weight_decay: decoupled.
        key: of the random bits: a bf16 row is rounded up or down at random, by how near each is, so that small updates
            are not lost.
        row_stride: row r draws the bits of row `r * row_stride + row_offset`, its number in all shards together.
        row_offset: see `row_stride`.
    """

    kind: Kind
    lr: float
    scale: float | Tensor = 1.0
    step: int = 1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    key: int = 0
    row_stride: int = 1
    row_offset: int = 0


def sum_bags(padded: Tensor, index: Tensor) -> Tensor:
    """The sum over slots of rows: `[..., S]` to `[..., E]`; a slot of -1 gives nothing.

    Args:
        padded: `[V + 1, E]`; the last row is of zeros, for libraries that know no empty slot.
        index: `[..., S]` int64, each in [-1, V).
    """
    if not index.numel():
        return padded.new_zeros(*index.shape[:-1], padded.shape[1])
    if _has_kernel(padded):
        from megarec_kernels.table_rows.gpu import run_sum_bags

        return run_sum_bags(padded, index)
    return reference.sum_bags_reference(padded, index)


def add_by_row(total: Tensor, grad: Tensor, index: Tensor) -> None:
    """The backward of `sum_bags`: adds `grad[i]` to `total[index[i, s]]` for all i and s; -1 takes nothing.

    The order in which a row's gradients are added is a function of `index` alone, so the same inputs give the same
    bits. On CUDA the host waits for nothing.

    Args:
        total: `[V, E]` fp32 (fp64), changed in place.
        grad: `[..., E]`.
        index: `[..., S]` int64, each in [-1, V), fewer than 2^31.
    """
    if not index.numel():
        return
    grad = grad.reshape(-1, total.shape[1])
    if _has_kernel(total):
        from megarec_kernels.table_rows.gpu import run_add_by_row

        run_add_by_row(total, grad, index)
    else:
        reference.add_by_row_reference(total, grad, index)


def sum_by_row(values: Tensor, rows: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Adds `values[source[i]]` to row `rows[i]` for all i; deterministic as `add_by_row`.

    Args:
        values: `[N, E]` fp32 (fp64).
        rows: `[n]`, sorted.
        source: `[n]`, indices into `values`.

    Returns:
        the distinct rows `[G]` and their sums `[G, E]`.
    """
    if rows.numel() and _has_kernel(values):
        from megarec_kernels.table_rows.gpu import run_sum_by_row

        return run_sum_by_row(values, rows, source)
    return reference.sum_by_row_reference(values, rows, source)


@torch.no_grad()
def update_rows(values: Tensor, state: dict[str, Tensor], *, rows: Tensor, grad: Tensor, update: RowUpdate) -> None:
    """Updates `values[rows]` and `state[rows]` in place, in one pass on CUDA.

    Args:
        values: the rows, `[L, E]`.
        state: from `make_state`, in fp32 (fp64 for fp64 rows).
        rows: distinct, `[G]` int64.
        grad: their gradients, `[G, E]` in the dtype of the state.
        update: the optimizer.

    Raises:
        ValueError: a shape is wrong, or the state is of another optimizer; names the argument.
    """
    _check_state(values, state, update)
    if grad.shape != (rows.numel(), values.shape[1]):
        raise ValueError(f"grad must be [{rows.numel()}, {values.shape[1]}], one for each row, got {list(grad.shape)}")
    if rows.numel() and _has_kernel(values):
        from megarec_kernels.table_rows.gpu import run_update_rows

        run_update_rows(values, state, rows=rows, grad=grad, update=update)
    else:
        reference.update_rows_reference(values, state, rows=rows, grad=grad, update=update)


@torch.no_grad()
def update_bags(values: Tensor, state: dict[str, Tensor], *, index: Tensor, grad: Tensor, update: RowUpdate) -> None:
    """`add_by_row`, then `update_rows` of the rows that `index` names: on CUDA the sums never reach memory.

    For tables whose whole gradient is at hand and needs no norm first; the same numbers as in two calls.

    Args:
        values: the rows, `[L, E]`.
        state: as in `update_rows`.
        index: `[..., S]` int64, each in [-1, L), fewer than 2^31.
        grad: of the bag sums, `[..., E]` in the dtype of the state.
        update: the optimizer.

    Raises:
        ValueError: as `update_rows`.
    """
    _check_state(values, state, update)
    if not index.numel():
        return
    grad = grad.reshape(-1, values.shape[1])
    if _has_kernel(values):
        from megarec_kernels.table_rows.gpu import run_update_bags

        run_update_bags(values, state, index=index, grad=grad, update=update)
    else:
        rows, sums = reference.sum_by_row_reference(grad, *reference.sort_slots(index))
        reference.update_rows_reference(values, state, rows=rows, grad=sums, update=update)


def make_state(kind: Kind, values: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The optimizer's state for the rows of `values` `[L, E]`, all zero.

    `rowwise_adagrad`: `square` `[L]`. `adam`: `mean` and `square` `[L, E]`. `rowwise_adam`: `mean` `[L, E]` and
    `square` `[L]`.
    """
    shapes = _state_shapes(kind, values)
    return {name: torch.zeros(shape, dtype=dtype, device=values.device) for name, shape in shapes.items()}


def _state_shapes(kind: Kind, values: Tensor) -> dict[str, torch.Size]:
    per_row, per_value = values.shape[:1], values.shape
    shapes: dict[Kind, dict[str, torch.Size]] = {
        "sgd": {},
        "rowwise_adagrad": {"square": per_row},
        "adam": {"mean": per_value, "square": per_value},
        "rowwise_adam": {"mean": per_value, "square": per_row},
    }
    return shapes[kind]


def _has_kernel(rows: Tensor) -> bool:
    return has_kernel(rows) and rows.is_contiguous() and rows.shape[1] <= MAX_WIDTH


def _check_state(values: Tensor, state: dict[str, Tensor], update: RowUpdate) -> None:
    want = _state_shapes(update.kind, values)
    got = {name: tensor.shape for name, tensor in state.items()}
    if got != want:
        raise ValueError(f"state of {update.kind} must hold {_shapes(want)}, got {_shapes(got)}")


def _shapes(shapes: dict[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "nothing"
