"""Empty slots on both ways of finding distinct rows; the random bits that round bf16 rows."""

import pytest
import torch
from megarec_kernels.unique_ids import find_unique
from megarec_kernels.unique_ids.reference import FLAGS_PER_ID
from torch import Tensor

from megarec.embedding.config import TableConfig, TableSpec
from megarec.embedding.lookup import lookup
from megarec.embedding.tables import TableGroup
from megarec.parallel.groups import ProcessInfo, start
from megarec.parallel.layout import LayoutConfig
from tests.ranks import run_ranks

ADDRESSES = torch.tensor([[7, -1, 3], [-1, 7, -1]])


@pytest.mark.parametrize("num_ids", [8, FLAGS_PER_ID * ADDRESSES.numel() + 1])
def test_an_empty_slot_stays_empty(num_ids: int) -> None:
    unique, index = find_unique(ADDRESSES, num_ids=num_ids)
    assert unique.tolist() == [3, 7]
    assert index.tolist() == [[1, -1, 0], [-1, 1, -1]]


def train_bf16(process: ProcessInfo, steps: int) -> Tensor:
    """Every row gets the same small gradient in every step, from rank 0 alone."""
    groups = start(LayoutConfig(), process)
    tables = TableGroup(
        [TableSpec(name="item", num_rows=64)],
        width=16,
        group=groups.world,
        seed=1,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        optimizer=TableConfig(kind="sgd"),
    )
    tables.state_pieces()["values"].fill_(1.0)
    for _ in range(steps):
        rows = torch.arange(64) if groups.world.rank == 0 else torch.empty(0, dtype=torch.int64)
        fetched = tables.fetch(rows)
        if len(rows):
            lookup(fetched, fetched.index[:, None]).sum().backward()
        tables.update(tables.collect_gradients(fetched), lr=2.0**-10)
    return tables.whole("item").float()


def test_rounding_draws_anew_in_every_step_and_not_by_rank() -> None:
    (once,) = run_ranks(train_bf16, 1, 1)
    (twice,) = run_ranks(train_bf16, 1, 2)
    fallen = once < 1.0  # a quarter of the spacing below 1: a quarter of the values fall
    assert 0.15 < fallen.float().mean() < 0.35
    assert len(fallen.unique(dim=0)) > 32  # rows draw their own bits
    others = (twice < 1.0) & ~fallen  # with the same bits nobody else would fall
    assert others.any()
    for part in run_ranks(train_bf16, 2, 2):
        assert torch.equal(part, twice)
