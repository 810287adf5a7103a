import time

import pytest
import torch
import torch.distributed as dist

from megarec.parallel.groups import ProcessInfo, start
from megarec.parallel.layout import LayoutConfig
from tests.ranks import run_ranks


def add_ranks(process: ProcessInfo) -> float:
    groups = start(LayoutConfig(), process)
    total = torch.tensor(float(groups.world.rank))
    dist.all_reduce(total, group=groups.data.process_group)
    return float(total)


def fail_on_one(process: ProcessInfo) -> None:
    start(LayoutConfig(), process)
    if process.rank == 1:
        raise ValueError("broken on purpose")
    dist.barrier()


def hang_on_one(process: ProcessInfo) -> None:
    if process.rank == 1:
        time.sleep(600)


def test_ranks_meet_and_return() -> None:
    assert run_ranks(add_ranks, 3) == [3.0] * 3
    assert run_ranks(add_ranks, 1) == [0.0]


def test_an_error_of_any_rank_surfaces() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2.*broken on purpose"):
        run_ranks(fail_on_one, 2)


def test_hung_ranks_are_killed() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[1\] of 2 still ran"):
        run_ranks(hang_on_one, 2, timeout=1.0)
