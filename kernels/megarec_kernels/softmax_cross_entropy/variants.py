"""What the kernels of the losses are compiled for ahead of time: every choice that their heuristics have."""

from collections.abc import Iterator

import torch

from megarec_kernels.softmax_cross_entropy import Correction
from megarec_kernels.softmax_cross_entropy.gpu import (
    EXPONENTIALS,
    MANY_ROWS,
    product_tile_of,
    rows_tile_of,
)
from megarec_kernels.softmax_cross_entropy.programs import exponentials_tile, log_sum_exp_tile, row_losses
from megarec_kernels.variants import Variant

CORRECTIONS: tuple[Correction, ...] = ("none", "standard", "negatives_only")


def variants() -> Iterator[Variant]:
    """Each correction for many rows, few rows and rows with candidates of their own; products of fp32 and bf16."""
    for correction in CORRECTIONS:
        for rows in ("many", "few", "own"):
            yield _losses(correction, rows)
    for dtype, width in ((torch.float32, 256), (torch.float32, 100), (torch.bfloat16, 256), (torch.bfloat16, 100)):
        yield _log_sum_exp(dtype, width)
    tile = dict(EXPONENTIALS)
    yield Variant(
        name="softmax_cross_entropy.exponentials",
        kernel=exponentials_tile,
        num_warps=tile.pop("num_warps"),
        types={"products": "*fp32", "log_sum": "*fp32", "num_rows": "i32", "num_columns": "i32"},
        constants=tile,
        aligned=frozenset({"products", "log_sum"}),
    )


def _losses(correction: Correction, rows: str) -> Variant:
    tile = rows_tile_of(MANY_ROWS if rows == "many" else 1, per_row=rows == "own")
    warps = tile.pop("num_warps")
    pointers = {"products": "*fp32", "ids": "*i64", "inverse_temperature": "*fp32", "loss": "*fp32"}
    pointers |= {} if rows == "own" else {"target": "*i64"}
    pointers |= {} if correction == "none" else {"log_q": "*fp32"}
    absent = dict.fromkeys({"target", "log_q"} - pointers.keys())
    return Variant(
        name=f"softmax_cross_entropy.losses {rows} {correction}",
        kernel=row_losses,
        types=pointers | {"num_rows": "i32", "num_columns": "i32"},
        constants={"PER_ROW": rows == "own", "CORRECTION": correction, **absent, **tile},
        aligned=frozenset(pointers),
        num_warps=warps,
    )


def _log_sum_exp(dtype: torch.dtype, width: int) -> Variant:
    tile = product_tile_of(dtype, width)
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    name = "fp32" if dtype == torch.float32 else "bf16"
    pointers = {"query": f"*{name}", "items": f"*{name}", "largest_out": "*fp32", "total_out": "*fp32"}
    sizes = ("num_queries", "num_items", "width", "items_per_part")
    return Variant(
        name=f"softmax_cross_entropy.log_sum_exp {name}{'' if tile['EVEN'] else ' uneven'}",
        kernel=log_sum_exp_tile,
        types=pointers | dict.fromkeys(sizes, "i32"),
        constants=tile,
        aligned=frozenset({*pointers, *(("width",) if tile["EVEN"] else ())}),
        num_warps=warps,
        num_stages=stages,
    )
