"""The distinct ones of many ids."""

from collections.abc import Iterator
from functools import partial

import torch
from megarec_kernels.unique_ids import find_unique
from megarec_kernels.unique_ids.reference import sort_unique

from kernels.bench.cases import Case, Draw, Inputs, Work
from kernels.bench.zipf import draw_ids

SHAPES = {  # tables, rows of each, lookups of all
    "3x50": ("small", 3, 50, 300),
    "1x1m": ("cpu", 1, 1_000_000, 65_536),
    "10x1.6m": ("h200", 10, 1_600_000, 1_048_570),
    "10x100m": ("h200", 10, 100_000_000, 1_048_570),
}


def cases() -> Iterator[Case]:
    """The ids of the lookups of `table_rows`, and those of far larger tables."""
    for name, (group, *shape) in SHAPES.items():
        yield Case(
            name=f"{name} zipf1.05",
            sets=frozenset({group}),
            make_inputs=partial(_make_inputs, shape=tuple(shape)),
            truth=lambda x: torch.unique(x["ids"], return_inverse=True),
            ours={"ours": lambda x: find_unique(x["ids"], num_ids=x["num_ids"])},
            baselines={
                "torch.unique": lambda x: torch.unique(x["ids"], return_inverse=True),
                "torch.unique, 32-bit keys": lambda x: sort_unique(x["ids"], x["num_ids"]),
            },
            gradients=(),
            work=_work,
        )


def _make_inputs(draw: Draw, *, shape: tuple[int, ...]) -> Inputs:
    num_tables, num_rows, num_lookups = shape
    ids = draw_ids(draw, num_tables=num_tables, num_rows=num_rows, num_lookups=num_lookups)
    return {"ids": ids, "num_ids": num_tables * num_rows}


def _work(x: Inputs) -> tuple[Work, Work]:
    """Ids in, places and distinct ids out."""
    moved = 2 * x["ids"].nbytes + 8 * len(x["ids"].unique())
    return Work(flops=0.0, bytes=float(moved)), Work(flops=0.0, bytes=0.0)
