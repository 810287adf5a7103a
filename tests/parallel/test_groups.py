import pytest
import torch.distributed as dist

from megarec.base.errors import UserError
from megarec.parallel.broadcast import broadcast_object, gather_objects
from megarec.parallel.groups import Group, ProcessInfo, start, stop
from megarec.parallel.layout import LayoutConfig
from tests.ranks import run_ranks


def describe(process: ProcessInfo) -> dict[str, tuple[int, int]]:
    groups = start(LayoutConfig(tensor=2), process)
    return {name: (value.rank, value.size) for name, value in vars(groups).items() if isinstance(value, Group)}


def test_tensor_ranks_are_neighbours_and_replicas_come_after() -> None:
    for rank, groups in enumerate(run_ranks(describe, 4)):
        assert groups["world"] == (rank, 4)
        assert groups["tensor"] == groups["model"] == (rank % 2, 2)
        assert groups["data"] == (rank // 2, 2)
        assert groups["pipeline"] == groups["context"] == (0, 1)


def alone(_: ProcessInfo) -> None:
    for _ in range(2):  # a process may leave and join again
        groups = start(LayoutConfig(), ProcessInfo())
        assert groups.world.size == groups.data.size == 1
        stop()
        assert not dist.is_initialized()


def test_one_process_needs_no_launcher() -> None:
    run_ranks(alone, 1)


def test_a_layout_that_does_not_fit_is_refused_before_anybody_waits() -> None:
    with pytest.raises(UserError, match="does not divide 3"):
        start(LayoutConfig(tensor=2), ProcessInfo(world=3, rendezvous="file:///nowhere"))


def talk(process: ProcessInfo) -> tuple[str, list[int]]:
    world = start(LayoutConfig(), process).world
    return broadcast_object(f"from {world.rank}", world), gather_objects(world.rank, world)


@pytest.mark.parametrize("size", [1, 3])
def test_objects_reach_every_rank(size: int) -> None:
    assert run_ranks(talk, size) == [("from 0", list(range(size)))] * size
