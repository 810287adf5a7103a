"""Row-wise optimizers: one update per touched row, however often it was used in the step.

A row is touched when a step fetches it, even if its gradient came out as zero. Rows that were not fetched change in
nothing: neither their moments nor their values decay, as in the fused embedding optimizers of FBGEMM. `adam` and
`rowwise_adam` correct their bias by the number of updates of the whole table, as FBGEMM does.
"""

import math

import torch
from megarec_kernels.hashing import hash_torch
from torch import Tensor

from megarec.embedding.config import TableConfig

VALUES_AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 24}  # a core's cache; a few launches


def make_state(config: TableConfig, values: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The optimizer's state for the rows of `values` `[L, E]`, all zero.

    `rowwise_adagrad`: `square` `[L]`. `adam`: `mean` and `square` `[L, E]`. `rowwise_adam`: `mean` `[L, E]` and
    `square` `[L]`.
    """
    per_row, per_value = values.shape[:1], values.shape
    shapes: dict[str, torch.Size]
    match config.kind:
        case "sgd":
            shapes = {}
        case "rowwise_adagrad":
            shapes = {"square": per_row}
        case "adam":
            shapes = {"mean": per_value, "square": per_value}
        case "rowwise_adam":
            shapes = {"mean": per_value, "square": per_row}
    return {name: torch.zeros(shape, dtype=dtype, device=values.device) for name, shape in shapes.items()}


@torch.no_grad()
def update_rows(
    config: TableConfig,
    values: Tensor,
    state: dict[str, Tensor],
    *,
    rows: Tensor,
    grad: Tensor,
    scale: float | Tensor,
    lr: float,
    step: int,
    rounding: tuple[int, Tensor],
) -> None:
    """Updates `values[rows]` and `state[rows]` in place.

    Args:
        config: which optimizer.
        values: the rows, `[L, E]`.
        state: from `make_state`.
        rows: distinct, `[G]`.
        grad: their gradients, `[G, E]`.
        scale: multiplies the gradients.
        lr: the learning rate.
        step: the number of this update, from 1.
        rounding: a key for the random bits and the global number of each row, `[G]`: bf16 rows are rounded up or
            down at random, by how near each is, so that small updates are not lost.
    """
    key, global_rows = rounding
    rows_at_once = max(1, VALUES_AT_ONCE[values.device.type] // values.shape[1])
    for start in range(0, rows.numel(), rows_at_once):
        part = slice(start, start + rows_at_once)
        touched, gradient = rows[part], grad[part] * scale
        old = values.index_select(0, touched).to(gradient.dtype)
        change = _direction(config, state, rows=touched, grad=gradient, step=step)
        new = old.mul_(1.0 - lr * config.weight_decay).sub_(change, alpha=lr)
        if values.dtype == torch.bfloat16:
            new = _round_at_random(new, key, global_rows[part])
        values.index_copy_(0, touched, new.to(values.dtype))


def _direction(config: TableConfig, state: dict[str, Tensor], *, rows: Tensor, grad: Tensor, step: int) -> Tensor:
    """What is subtracted, per unit of learning rate, from each row: `[G, E]`. Updates the state."""
    if config.kind == "sgd":
        return grad
    if config.kind == "rowwise_adagrad":  # FBGEMM's EXACT_ROWWISE_ADAGRAD: the mean square over the row
        square = state["square"].index_select(0, rows) + grad.square().mean(dim=1)
        state["square"].index_copy_(0, rows, square)
        return grad / (square.sqrt() + config.eps).unsqueeze(1)
    mean = state["mean"].index_select(0, rows).lerp_(grad, 1.0 - config.beta1)
    state["mean"].index_copy_(0, rows, mean)
    power = grad.square() if config.kind == "adam" else grad.square().mean(dim=1)
    square = state["square"].index_select(0, rows).lerp_(power, 1.0 - config.beta2)
    state["square"].index_copy_(0, rows, square)
    root = (square.sqrt() / math.sqrt(1.0 - config.beta2**step)).add_(config.eps)
    return mean / (1.0 - config.beta1**step) / (root if config.kind == "adam" else root.unsqueeze(1))


def _round_at_random(values: Tensor, key: int, rows: Tensor) -> Tensor:
    """fp32 `[G, E]` rounded to bf16: 16 random bits are added to the 16 bits that bf16 lacks, and both cut off."""
    width = values.shape[1]
    counters = rows.unsqueeze(1) * width + torch.arange(width, device=rows.device)
    noise = (hash_torch(key, counters) & 0xFFFF).to(torch.int32)
    return ((values.view(torch.int32) + noise) & -0x10000).view(torch.float32)
