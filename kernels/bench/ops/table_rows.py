"""Embedding tables: the lookup, and the update of every row that it used."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from megarec_kernels.table_rows import Kind, RowUpdate, add_by_row, make_state, sum_bags, update_bags, update_rows
from megarec_kernels.table_rows.reference import sort_slots, sum_by_row_reference, update_rows_reference
from megarec_kernels.unique_ids import find_unique
from torch import Tensor

from kernels.bench.cases import Case, Draw, Inputs, Method, Work
from kernels.bench.zipf import draw_ids

SHAPES = {  # tables, rows of each, lookups of all, width
    "3x50 width 8": ("small", 3, 50, 300, 8),
    "1x1m width 128": ("cpu", 1, 1_000_000, 65_536, 128),
    "10x1.6m width 128": ("h200", 10, 1_600_000, 1_048_570, 128),
}
SHOWN = 1 << 15  # rows that are compared: the first table's most popular ones; looking at all of them takes longer


def cases() -> Iterator[Case]:
    """The stream of the public benchmarks: Zipf 1.05, a third of the lookups are of distinct rows."""
    for name, (group, *shape) in SHAPES.items():
        yield Case(
            name=f"lookup {name}",
            sets=frozenset({group}),
            make_inputs=partial(_make_inputs, shape=tuple(shape), kind="sgd"),
            truth=lambda x: x["padded"][x["index"][:, 0]],
            ours={"ours": lambda x: sum_bags(x["padded"], x["index"])},
            baselines={
                "torch index_select": lambda x: x["padded"].index_select(0, x["index"][:, 0]),
                "torch embedding_bag": lambda x: F.embedding_bag(x["index"], x["padded"], mode="sum"),
            },
            gradients=(),
            work=_lookup_work,
        )
        kinds: tuple[Kind, ...] = ("rowwise_adagrad", "adam")
        for kind in kinds:
            yield _update_case(f"{kind} {name}", {group}, tuple(shape), kind)


def _update_case(name: str, sets: set[str], shape: tuple[int, ...], kind: Kind) -> Case:
    torch_case = Case(
        name=name,
        sets=frozenset(sets),
        make_inputs=partial(_make_inputs, shape=shape, kind="sgd"),
        truth=_sparse_torch(kind),
        ours={"torch": _sparse_torch(kind)},
        gradients=(),
        work=lambda x: _update_work(x, kind),
    )
    return Case(
        name=name,
        sets=frozenset(sets),
        make_inputs=partial(_make_inputs, shape=shape, kind=kind),
        truth=partial(_sorted_torch, kind=kind),
        ours={"ours": partial(_one_pass, kind=kind), "ours in two passes": partial(_two_passes, kind=kind)},
        baselines={
            "torch by sorted rows": partial(_sorted_torch, kind=kind),
            "torch index_add": partial(_added_torch, kind=kind),
        },
        beside={"torch sparse Adagrad" if kind == "rowwise_adagrad" else "torch SparseAdam": torch_case},
        gradients=(),
        work=lambda x: _update_work(x, kind),
    )


def _make_inputs(draw: Draw, *, shape: tuple[int, ...], kind: Kind) -> Inputs:
    num_tables, num_rows, num_lookups, width = shape
    index = draw_ids(draw, num_tables=num_tables, num_rows=num_rows, num_lookups=num_lookups)
    padded = draw.normal(num_tables * num_rows + 1, width, scale=0.02)
    padded[-1] = 0
    grad = draw.normal(len(index), width)
    sum_dtype = torch.float64 if draw.dtype == torch.float64 else torch.float32
    return {"index": index, "padded": padded, "grad": grad.to(sum_dtype), **make_state(kind, padded[:-1], sum_dtype)}


def _update(kind: Kind) -> RowUpdate:
    return RowUpdate(kind=kind, lr=0.01, step=1, key=1)


def _values(x: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    return x["padded"][:-1], {name: x[name] for name in ("mean", "square") if name in x}


def _shown(x: Inputs) -> tuple[Tensor, ...]:
    values, state = _values(x)
    return (values[:SHOWN], *(tensor[:SHOWN] for tensor in state.values()))


def _one_pass(x: Inputs, *, kind: Kind) -> tuple[Tensor, ...]:
    values, state = _values(x)
    update_bags(values, state, index=x["index"], grad=x["grad"], update=_update(kind))
    return _shown(x)


def _two_passes(x: Inputs, *, kind: Kind) -> tuple[Tensor, ...]:
    """As a training step does, which needs the norm in between; the distinct rows are those of its lookup."""
    values, state = _values(x)
    if "distinct" not in x:
        x["distinct"], x["place"] = find_unique(x["index"], num_ids=len(values))
    total = x["grad"].new_zeros(len(x["distinct"]), values.shape[1])
    add_by_row(total, x["grad"], x["place"])
    update_rows(values, state, rows=x["distinct"], grad=total, update=_update(kind))
    return _shown(x)


def _sorted_torch(x: Inputs, *, kind: Kind) -> tuple[Tensor, ...]:
    values, state = _values(x)
    rows, sums = sum_by_row_reference(x["grad"], *sort_slots(x["index"]))
    update_rows_reference(values, state, rows=rows, grad=sums, update=_update(kind))
    return _shown(x)


def _added_torch(x: Inputs, *, kind: Kind) -> tuple[Tensor, ...]:
    values, state = _values(x)
    rows, place = torch.unique(x["index"][:, 0], return_inverse=True)
    sums = x["grad"].new_zeros(len(rows), values.shape[1]).index_add_(0, place, x["grad"])
    update_rows_reference(values, state, rows=rows, grad=sums, update=_update(kind))
    return _shown(x)


def _sparse_torch(kind: Kind) -> Method:
    """What follows `nn.EmbeddingBag(sparse=True)`: its gradient is the given vectors, unsummed. State per value."""

    def method(x: Inputs) -> tuple[Tensor, ...]:
        if "optimizer" not in x:
            x["weight"], x["grad"] = torch.nn.Parameter(x["padded"][:-1]), x["grad"].to(x["padded"].dtype)
            make = torch.optim.Adagrad if kind == "rowwise_adagrad" else torch.optim.SparseAdam
            x["optimizer"] = make([x["weight"]], lr=0.01)
        x["weight"].grad = torch.sparse_coo_tensor(x["index"].T, x["grad"], x["weight"].shape, check_invariants=False)
        x["optimizer"].step()
        return (x["padded"][:SHOWN],)

    return method


def _num_distinct(x: Inputs) -> int:
    if "num_distinct" not in x:
        x["num_distinct"] = len(x["index"].unique())
    return int(x["num_distinct"])


def _lookup_work(x: Inputs) -> tuple[Work, Work]:
    """Each distinct row read once, every vector written."""
    row_bytes = x["padded"][0].nbytes
    moved = x["index"].nbytes + (_num_distinct(x) + len(x["index"])) * row_bytes
    return Work(flops=0.0, bytes=float(moved)), Work(flops=0.0, bytes=0.0)


def _update_work(x: Inputs, kind: Kind) -> tuple[Work, Work]:
    """Every gradient read once; each distinct row and its state read and written."""
    state = make_state(kind, x["padded"][:1], x["grad"].dtype)
    row_bytes = x["padded"][0].nbytes + sum(tensor.nbytes for tensor in state.values())
    moved = x["index"].nbytes + x["grad"].nbytes + 2 * _num_distinct(x) * row_bytes
    return Work(flops=2.0 * x["grad"].numel(), bytes=float(moved)), Work(flops=0.0, bytes=0.0)
