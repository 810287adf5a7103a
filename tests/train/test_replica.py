"""What one rank of a replica read arrives whole on the others."""

from pathlib import Path

import pytest
import torch

from megarec.data.dataset import open_dataset
from megarec.data.stream import TrainStream
from megarec.models.rows import RowMap
from megarec.models.shape import input_shape
from megarec.parallel.groups import ProcessInfo, start, stop
from megarec.parallel.layout import LayoutConfig
from megarec.train.batches import BatchMaker, PackFeed, StepBatch
from megarec.train.config import TrainConfig
from megarec.train.replica import share_step
from megarec.train.trainer import stream_config
from tests.inference.synthetic import write_world
from tests.ranks import run_ranks
from tests.train.runs import make_config


def read_step(config: TrainConfig) -> StepBatch:
    dataset = open_dataset(config.data)
    shape = input_shape(dataset.fields, config.model)
    first_row = {name: 1000 * number for number, name in enumerate(shape.tables)}
    maker = BatchMaker(
        RowMap(shape, first_row, dataset.item_side()), dataset.item_counts(), config.objective, seed=config.seed
    )
    feed = PackFeed(TrainStream(dataset, stream_config(config), lanes=[0, 1]), maker, depth=0)
    return feed.take()


def share(process: ProcessInfo, config: TrainConfig, layout: LayoutConfig) -> tuple[list[int], StepBatch]:
    groups = start(layout, process)
    batch = share_step(read_step(config) if groups.replica.rank == 0 else None, groups.replica)
    members = torch.distributed.get_process_group_ranks(groups.replica.process_group)
    stop()
    return members, batch


@pytest.mark.parametrize(
    ("layout", "num_ranks", "members"),
    [
        (LayoutConfig(), 2, [[0], [1]]),
        (LayoutConfig(tensor=2), 2, [[0, 1], [0, 1]]),
        (LayoutConfig(context=2), 4, [[0, 1], [0, 1], [2, 3], [2, 3]]),
        (LayoutConfig(pipeline=2), 4, [[0, 2], [1, 3], [0, 2], [1, 3]]),
    ],
    ids=["one rank", "tensor", "context", "pipeline"],
)
def test_every_rank_of_a_replica_has_the_step(
    tmp_path: Path, layout: LayoutConfig, num_ranks: int, members: list[list[int]]
) -> None:
    write_world(tmp_path / "data", num_users=30)
    config = make_config(tmp_path / "data", tmp_path / "run")
    expected = read_step(config)
    for rank, (ranks, batch) in enumerate(run_ranks(share, num_ranks, config, layout)):
        assert ranks == members[rank]
        assert batch.position == expected.position and batch.epochs == expected.epochs > 0
        assert len(batch.packs) == len(expected.packs) == 4
        for pack, original in zip(batch.packs, expected.packs, strict=True):
            assert pack.key == original.key
            for part in ("columns", "rows"):
                mine, theirs = getattr(pack, part), getattr(original, part)
                assert list(mine) == list(theirs)
                for name in mine:
                    assert mine[name].dtype == theirs[name].dtype
                    assert torch.equal(mine[name], theirs[name]), name
