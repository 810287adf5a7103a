"""Sharded tables against one dense matrix in plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megarec.embedding.config import TableConfig, TableSpec
from megarec.embedding.lookup import lookup
from megarec.embedding.tables import TableGroup
from megarec.parallel.groups import ParallelGroups, ProcessInfo, start
from megarec.parallel.layout import LayoutConfig
from tests.ranks import run_ranks

WIDTH = 6
SPECS = [
    TableSpec(name="item", num_rows=29, init_std=0.5),
    TableSpec(name="artist", num_rows=7),
    TableSpec(name="hour", num_rows=1),
]
NUM_ROWS = sum(spec.num_rows for spec in SPECS)
STEPS = 4
CPU = torch.device("cpu")
KINDS = ["sgd", "rowwise_adagrad", "adam", "rowwise_adam"]


def config_of(kind: str) -> TableConfig:
    return TableConfig(kind=kind, lr_scale=2.0, beta2=0.97, weight_decay=0.1)


def make(groups: ParallelGroups | None, kind: str = "sgd", dtype: torch.dtype = torch.float64) -> TableGroup:
    group = groups.world if groups else None
    return TableGroup(SPECS, width=WIDTH, group=group, seed=5, device=CPU, dtype=dtype, optimizer=config_of(kind))


def requests_of(step: int) -> list[tuple[Tensor, Tensor]]:
    """Four packs of a step: rows `[T, S]` with duplicates and empty slots, and a weight for every output value."""
    generator = torch.Generator().manual_seed(step)
    packs = []
    for tokens, slots in ((6, 3), (9, 1), (0, 3), (5, 2)):
        rows = torch.randint(-1, NUM_ROWS, (tokens, slots), generator=generator)
        rows[rows > 20] = 3  # one popular row
        packs.append((rows, torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)))
    return packs


def run_steps(tables: TableGroup, groups: ParallelGroups | None, steps: range) -> list[float]:
    """Every rank takes its packs; with more than two ranks the last one asks for nothing. Gradient norms."""
    rank, world = (groups.world.rank, groups.world.size) if groups else (0, 1)
    active = world if world <= 2 else world - 1
    norms = []
    for step in steps:
        mine = requests_of(step)[rank::active] if rank < active else []
        flat = torch.cat([rows.reshape(-1) for rows, _ in mine]) if mine else torch.empty(0, dtype=torch.int64)
        fetched = tables.fetch(flat)
        start_of = 0
        for rows, weight in mine:
            index = fetched.index[start_of : start_of + rows.numel()].view(rows.shape)
            start_of += rows.numel()
            output = lookup(fetched, index)
            if output.requires_grad:
                (output.sin() * weight).sum().backward()
        owned = tables.collect_gradients(fetched)
        norms.append(tables.square_norm(owned).item())
        tables.update(owned, lr=0.05, scale=0.7)
    return norms


def train(groups: ParallelGroups | None, kind: str, steps: range = range(STEPS)) -> tuple[TableGroup, list[float]]:
    tables = make(groups, kind)
    return tables, run_steps(tables, groups, steps)


def job(process: ProcessInfo, kind: str):
    tables, norms = train(start(LayoutConfig(), process), kind)
    return {name: tables.whole(name) for name in tables.specs}, norms, tables.state_pieces()


def dense_twin(kind: str) -> tuple[Tensor, list[float]]:
    """The same steps on one dense matrix; optimizers written out element by element."""
    config = config_of(kind)
    table = torch.cat([make(None).whole(spec.name) for spec in SPECS])
    mean, square = torch.zeros_like(table), torch.zeros_like(table)
    norms = []
    for step in range(STEPS):
        weight = table.clone().requires_grad_()
        loss = torch.zeros((), dtype=torch.float64)
        touched = set()
        for rows, factor in requests_of(step):
            slots = F.embedding(rows.clamp(min=0), weight) * (rows >= 0).unsqueeze(-1)
            loss = loss + (slots.sum(1).sin() * factor).sum()
            touched |= set(rows.flatten().tolist())
        loss.backward()
        norms.append(weight.grad.square().sum().item())
        for row in sorted(touched - {-1}):
            gradient = 0.7 * weight.grad[row]
            power = gradient.square() if kind == "adam" else gradient.square().mean()
            if kind == "sgd":
                direction = gradient
            elif kind == "rowwise_adagrad":
                square[row] += power
                direction = gradient / (square[row].sqrt() + config.eps)
            else:
                mean[row] = config.beta1 * mean[row] + (1 - config.beta1) * gradient
                square[row] = config.beta2 * square[row] + (1 - config.beta2) * power
                unbiased = square[row] / (1 - config.beta2 ** (step + 1))
                direction = mean[row] / (1 - config.beta1 ** (step + 1)) / (unbiased.sqrt() + config.eps)
            table[row] = table[row] - 0.1 * (direction + config.weight_decay * table[row])
    return table, norms


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_equals_the_dense_twin(kind: str) -> None:
    tables, norms = train(None, kind)
    want, want_norms = dense_twin(kind)
    got = torch.cat([tables.whole(spec.name) for spec in SPECS])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert norms == pytest.approx(want_norms, rel=1e-12)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_ranks_is_the_same(kind: str, world: int) -> None:
    tables, norms = train(None, kind)
    for whole, rank_norms, _ in run_ranks(job, world, kind):
        assert rank_norms == pytest.approx(norms, rel=1e-12)
        for name, values in whole.items():
            torch.testing.assert_close(values, tables.whole(name), rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_every_nth_row_of_the_one_matrix(kind: str) -> None:
    whole, _ = train(None, kind)
    for world in (2, 3):
        for rank, (_, _, pieces) in enumerate(run_ranks(job, world, kind)):
            assert pieces.keys() == whole.state_pieces().keys()
            for name, tensor in whole.state_pieces().items():
                torch.testing.assert_close(pieces[name], tensor[rank::world], rtol=0, atol=1e-12, msg=name)


def resume(process: ProcessInfo, kind: str) -> None:
    """Fills fresh tables from the pieces of one rank after two steps and goes on."""
    groups = start(LayoutConfig(), process)
    done, _ = train(None, kind, steps=range(2))
    tables = make(groups, kind)
    for name, piece in tables.state_pieces().items():
        piece.copy_(done.state_pieces()[name][groups.world.rank :: groups.world.size])
    tables.step = done.step
    run_steps(tables, groups, range(2, STEPS))
    want, _ = train(None, kind)
    torch.testing.assert_close(tables.whole("item"), want.whole("item"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_filled_pieces_continue_on_another_number_of_ranks(kind: str) -> None:
    run_ranks(resume, 3, kind)


def test_first_values_do_not_depend_on_the_order_of_tables() -> None:
    forward = make(None)
    backward = TableGroup(SPECS[::-1], width=WIDTH, group=None, seed=5, device=CPU, dtype=torch.float64)
    for spec in SPECS:
        assert torch.equal(forward.whole(spec.name), backward.whole(spec.name))
    assert forward.whole("item").std().item() == pytest.approx(0.5, rel=0.2)


def test_a_row_that_does_not_exist_is_refused() -> None:
    tables = make(None)
    for row in (NUM_ROWS, -2):
        with pytest.raises(IndexError, match="row numbers"):
            tables.fetch(torch.tensor([0, row]))


def test_untouched_rows_do_not_move() -> None:
    tables = make(None, "adam")
    before = tables.whole("item")
    fetched = tables.fetch(torch.tensor([[2, -1]]))
    lookup(fetched, fetched.index).sum().backward()
    tables.update(tables.collect_gradients(fetched), lr=0.1)
    moved = (tables.whole("item") != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == [2]


def test_bf16_rows_move_by_small_steps_on_average() -> None:
    """A step of a 64th of the distance between two bf16 numbers would be lost by rounding to nearest."""
    specs = [TableSpec(name="item", num_rows=2000, init_std=1.0)]
    settings = TableConfig(kind="sgd")
    tables = TableGroup(specs, width=4, group=None, seed=1, device=CPU, dtype=torch.bfloat16, optimizer=settings)
    tables.state_pieces()["values"].fill_(1.0)
    for _ in range(16):
        fetched = tables.fetch(torch.arange(2000))
        fetched.grad.fill_(-(2.0**-7) / 64)
        tables.update(tables.collect_gradients(fetched), lr=1.0)
    moved = tables.whole("item").double().mean().item() - 1.0
    standard_error = 2.0**-7 * math.sqrt(0.25 * 0.75 / 8000)
    assert moved == pytest.approx(2.0**-7 / 4, abs=5 * standard_error)
