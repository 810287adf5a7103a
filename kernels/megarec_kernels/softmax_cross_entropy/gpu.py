"""Softmax cross entropy on a GPU: the launches."""

from typing import Any

import torch
import triton
from torch import Tensor

from megarec_kernels.devices import on_its_device
from megarec_kernels.softmax_cross_entropy import Correction
from megarec_kernels.softmax_cross_entropy.programs import exponentials_tile, log_sum_exp_tile, row_losses

NUM_WARPS = 8
MANY_ROWS = 1024  # from here on programs of several rows fill a GPU, and read what rows share once
PROGRAMS = 528  # four for each processor of an H100 or H200: into so many parts the items are cut for few queries
EXPONENTIALS = {"ROWS": 4, "BLOCK": 1024, "num_warps": NUM_WARPS}


def rows_tile_of(num_rows: int, *, per_row: bool) -> dict[str, int]:
    """Rows of a program and columns of a block: 16 numbers for each thread."""
    rows = 4 if num_rows >= MANY_ROWS and not per_row else 1
    return {"ROWS": rows, "BLOCK": 4096 // rows, "num_warps": NUM_WARPS}


def product_tile_of(dtype: torch.dtype, width: int) -> dict[str, Any]:
    """The tile of logits in registers: 128 x 128 for two warp groups; steps of 64 bytes times two a row."""
    depth = 32 if dtype == torch.float32 else 64
    precision = "tf32x3" if dtype == torch.float32 else "ieee"
    shape = {"ROWS": 128, "COLUMNS": 128, "DEPTH": depth, "PRECISION": precision, "EVEN": width % depth == 0}
    return {**shape, "num_warps": 8, "num_stages": 3}


@on_its_device
def launch_losses(
    products: Tensor,
    *,
    target: Tensor | None,
    ids: Tensor,
    log_q: Tensor | None,
    correction: Correction,
    inverse_temperature: Tensor,
) -> tuple[Tensor, Tensor]:
    """Losses, and gradients in the memory of `products`; without `target` the first column is it and `ids` `[R, C]`."""
    products = products.contiguous()
    num_rows, num_columns = products.shape
    loss = products.new_empty(num_rows, dtype=torch.float32)
    if products.numel():
        tile = rows_tile_of(num_rows, per_row=target is None)
        row_losses[(triton.cdiv(num_rows, tile["ROWS"]),)](
            products,
            None if target is None else target.contiguous(),
            ids.contiguous(),
            None if log_q is None else log_q.contiguous(),
            inverse_temperature,
            loss,
            num_rows=num_rows,
            num_columns=num_columns,
            PER_ROW=target is None,
            CORRECTION=correction,
            **tile,
        )
    return loss, products


@on_its_device
def launch_exponentials(products: Tensor, log_sum: Tensor) -> Tensor:
    """As `exponentials`."""
    assert products.is_contiguous()
    num_rows, num_columns = products.shape
    if products.numel():
        grid = triton.cdiv(num_rows, EXPONENTIALS["ROWS"]), triton.cdiv(num_columns, EXPONENTIALS["BLOCK"])
        exponentials_tile[grid](products, log_sum.contiguous(), num_rows, num_columns, **EXPONENTIALS)
    return products


@on_its_device
def launch_log_sum_exp(query: Tensor, items: Tensor) -> Tensor:
    """As `log_sum_exp`: parts of the items side by side, brought together in order."""
    query, items = query.contiguous(), items.contiguous()
    (num_queries, width), num_items = query.shape, len(items)
    if not num_items or not num_queries:
        return query.new_full((num_queries,), float("-inf"), dtype=torch.float32)
    tile = product_tile_of(query.dtype, width)
    query_tiles, item_tiles = triton.cdiv(num_queries, tile["ROWS"]), triton.cdiv(num_items, tile["COLUMNS"])
    tiles_per_part = triton.cdiv(item_tiles, max(1, PROGRAMS // query_tiles))
    num_parts = triton.cdiv(item_tiles, tiles_per_part)
    largest, total = query.new_empty(2, num_parts, num_queries, dtype=torch.float32)
    log_sum_exp_tile[(query_tiles, num_parts)](
        query,
        items,
        largest,
        total,
        num_queries=num_queries,
        num_items=num_items,
        width=width,
        items_per_part=tiles_per_part * tile["COLUMNS"],
        **tile,
    )
    return (largest + total.log()).logsumexp(dim=0)
