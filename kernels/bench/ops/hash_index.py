"""The rows of 64-bit keys."""

from collections.abc import Iterator
from functools import partial

import torch
from megarec_kernels.hash_index import find_rows, insert_keys, make_index
from megarec_kernels.hash_index.reference import find_rows_reference
from megarec_kernels.hashing import hash_torch
from torch import Tensor

from kernels.bench.cases import Case, Draw, Inputs, Work
from kernels.bench.zipf import draw_ids

SHAPES = {
    "500 keys": ("small", 500, 300),
    "1m keys": ("cpu", 1_000_000, 65_536),
    "16m keys": ("h200", 16_000_000, 1 << 20),
}


def cases() -> Iterator[Case]:
    """Zipf lookups in a full index."""
    for name, (group, num_keys, num_lookups) in SHAPES.items():
        yield Case(
            name=f"find {name} zipf1.05",
            sets=frozenset({group}),
            make_inputs=partial(_make_inputs, num_keys=num_keys, num_lookups=num_lookups),
            truth=_searched,
            ours={"ours": lambda x: find_rows(x["hash_index"], x["keys"])},
            baselines={
                "torch searchsorted": _searched,
                "torch, slot by slot": lambda x: find_rows_reference(x["hash_index"], x["keys"]),
            },
            gradients=(),
            work=_work,
        )


def _make_inputs(draw: Draw, *, num_keys: int, num_lookups: int) -> Inputs:
    known = hash_torch(7, torch.arange(num_keys, device=draw.device))
    ids = draw_ids(draw, num_tables=1, num_rows=num_keys, num_lookups=num_lookups)[:, 0]
    index = make_index(num_keys, device=draw.device)
    insert_keys(index, known)
    return {"hash_index": index, "keys": known[ids]}


def _searched(x: Inputs) -> Tensor:
    """Rows of one batch are numbered in the order of keys."""
    return torch.searchsorted(x["hash_index"].key_of_row, x["keys"])


def _work(x: Inputs) -> tuple[Work, Work]:
    """Keys in and rows out; one slot and its key for each."""
    return Work(flops=0.0, bytes=float(len(x["keys"]) * (8 + 8 + 4 + 8))), Work(flops=0.0, bytes=0.0)
