"""The launches of the kernels on rows."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from megarec_kernels.devices import on_its_device
from megarec_kernels.hashing import signed
from megarec_kernels.table_rows import RowUpdate, programs

SPAN = 64  # places; a longer segment is cut into pieces, so that no program walks further
PLACES_AT_ONCE = 1024  # of the kernel that finds where segments begin


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Slots sorted by the row they name: a segment is the places of one row. Nothing here is known to the host.

    Attributes:
        rows: the row of each place, sorted, empty slots (-1) first, `[n]`.
        order: the slot at each place, `[n]`.
        number: the segment of each place, counted from 1, 0 for empty slots, `[n]` int32.
        starts: the first place of segment g at `g - 1`, and n behind the last one, `[n + 1]` int32.
        num_slots: the bag of slot i is `i // num_slots`.
    """

    rows: Tensor
    order: Tensor
    number: Tensor
    starts: Tensor
    num_slots: int


def tile_of(width: int) -> dict[str, int]:
    """Rows and channels of a tile and the warps for it: 8 numbers for a thread of 4 warps, up to 16 for wide rows."""
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, 1024 // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": 4 if block <= 2048 else 8}


def reducing_tile_of(width: int) -> dict[str, int]:
    """The same where the rows of a tile are summed: up to SPAN of them, 32 numbers for a thread of 8 warps."""
    block = max(16, triton.next_power_of_2(width))
    return {"ROWS": min(SPAN, max(1, 8192 // block)), "BLOCK": block, "num_warps": 8}


@on_its_device
def run_sum_bags(table: Tensor, index: Tensor) -> Tensor:
    """As `sum_bags`."""
    index, num_slots = index.contiguous(), index.shape[-1]
    num, width = index.numel() // num_slots, table.shape[1]
    out = table.new_empty(*index.shape[:-1], width)
    tile = tile_of(width)
    programs.sum_slots[(triton.cdiv(num, tile["ROWS"]),)](table, index, out, num, num_slots, width, **tile)
    return out


@on_its_device
def run_add_by_row(total: Tensor, grad: Tensor, index: Tensor) -> None:
    """As `add_by_row`."""
    _sum_segments(sort_slots(index, total.shape[0]), grad, values=total, kind="add", arguments=_no_update())


@on_its_device
def run_sum_by_row(values: Tensor, rows: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """As `sum_by_row`; the host waits for the number of distinct rows, which is a shape."""
    distinct, number = torch.unique_consecutive(rows, return_inverse=True)
    sums = values.new_zeros(distinct.numel(), values.shape[1])
    segments = find_segments(number, source, num_slots=1)
    _sum_segments(segments, values, values=sums, kind="add", arguments=_no_update())
    return distinct, sums


@on_its_device
def run_update_bags(
    values: Tensor, state: dict[str, Tensor], *, index: Tensor, grad: Tensor, update: RowUpdate
) -> None:
    """As `update_bags`."""
    segments = sort_slots(index, values.shape[0])
    _sum_segments(segments, grad, values=values, kind=update.kind, arguments=update_arguments(state, update, grad))


@on_its_device
def run_update_rows(values: Tensor, state: dict[str, Tensor], *, rows: Tensor, grad: Tensor, update: RowUpdate) -> None:
    """As `update_rows`."""
    tile = tile_of(values.shape[1])
    programs.update_given[(triton.cdiv(rows.numel(), tile["ROWS"]),)](
        rows.contiguous(),
        grad.contiguous(),
        values,
        **update_arguments(state, update, grad),
        width=values.shape[1],
        num=rows.numel(),
        KIND=update.kind,
        **tile,
    )


def sort_slots(index: Tensor, num_rows: int) -> Segments:
    """Sorts the slots of `index` `[..., S]` by row, those of one row in their order; by 32-bit keys where they fit."""
    keys = index.reshape(-1).to(torch.int32 if num_rows <= 2**31 else torch.int64)
    rows, order = torch.sort(keys, stable=True)
    return find_segments(rows, order, num_slots=index.shape[-1])


def find_segments(rows: Tensor, order: Tensor, *, num_slots: int) -> Segments:
    """Numbers the segments of sorted rows and finds where they begin."""
    number = (rows != F.pad(rows[:-1], (1, 0), value=-1)).cumsum(0, dtype=torch.int32)
    num = rows.numel()
    starts = number.new_empty(num + 1)
    programs.find_starts[(triton.cdiv(num, PLACES_AT_ONCE),)](number, starts, num, BLOCK=PLACES_AT_ONCE)
    return Segments(rows=rows, order=order.contiguous(), number=number, starts=starts, num_slots=num_slots)


def update_arguments(state: dict[str, Tensor], update: RowUpdate, grad: Tensor) -> dict[str, Any]:
    """What a kernel is told of an optimizer."""
    scale = update.scale
    return {
        "mean": state.get("mean"),
        "square": state.get("square"),
        "scale": scale.reshape(1) if isinstance(scale, Tensor) else grad.new_full((1,), scale),
        "lr": float(update.lr),
        "keep": 1.0 - update.lr * update.weight_decay,
        "weight1": 1.0 - update.beta1,
        "weight2": 1.0 - update.beta2,
        "correction1": 1.0 - update.beta1**update.step,
        "root_correction2": math.sqrt(1.0 - update.beta2**update.step),
        "eps": update.eps,
        "key": signed(update.key),
        "row_stride": update.row_stride,
        "row_offset": update.row_offset,
    }


def _no_update() -> dict[str, Any]:
    return dict.fromkeys(programs.UPDATE_ARGUMENTS)


def _sum_segments(segments: Segments, grad: Tensor, *, values: Tensor, kind: str, arguments: dict[str, Any]) -> None:
    """Sums the gradients of every segment and finishes its row, in three launches whose sizes the host knows."""
    grad = grad.contiguous()
    num, width = segments.rows.numel(), values.shape[1]
    num_spans = triton.cdiv(num, SPAN)
    tile, reducing = tile_of(width), reducing_tile_of(width)
    places = {"order": segments.order, "number": segments.number, "starts": segments.starts}
    sizes = {"width": width, "num": num, "SPAN": SPAN}
    programs.sum_short[(triton.cdiv(min(num, values.shape[0]), tile["ROWS"]),)](
        segments.rows,
        **places,
        grad=grad,
        values=values,
        **arguments,
        num_slots=segments.num_slots,
        **sizes,
        KIND=kind,
        **tile,
    )
    if num <= SPAN:
        return
    partial = torch.empty(2 * num_spans, width, dtype=torch.float32, device=values.device)
    programs.sum_pieces[(num_spans,)](
        **places, grad=grad, partial=partial, num_slots=segments.num_slots, **sizes, **reducing
    )
    del places["order"]
    programs.sum_long[(num_spans,)](
        segments.rows, **places, partial=partial, values=values, **arguments, **sizes, KIND=kind, **reducing
    )
