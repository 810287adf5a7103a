"""How far a stream has come, in epochs."""

from pathlib import Path

import numpy as np
import pytest

from megarec.data.reader import BlockReader
from megarec.data.stream import StreamConfig, TrainStream
from tests.data.small_datasets import write_histories


@pytest.mark.parametrize(("lane", "lanes"), [(0, 1), (0, 3), (2, 3)])
def test_epochs_grow_evenly_and_are_whole_at_the_end_of_one(tmp_path: Path, lane: int, lanes: int) -> None:
    lengths = np.random.default_rng(3).integers(0, 40, 150).tolist()
    dataset = write_histories(tmp_path, lengths, users_per_block=7)
    config = StreamConfig(tokens_per_pack=64, max_history_events=24, lanes=lanes, pool_blocks=2, seed=5)
    stream = TrainStream(dataset, config, lanes=[lane])
    num_blocks = len(range(lane, BlockReader(dataset, "train").num_blocks, lanes))
    before, pool = 0.0, (0, 0)
    while before < 3:
        assert stream.epochs() == before
        stream.next_step()
        place, epochs = stream.state()[str(lane)], stream.epochs()
        assert before < epochs <= before + 2 / num_blocks
        assert place["epoch"] <= epochs <= place["epoch"] + 1
        if (place["epoch"], place["pool"]) != pool:  # into the next pool, from the very end of the last one
            start = place["epoch"] + 2 * place["pool"] / num_blocks
            assert before == pytest.approx(start) and epochs > start
        before, pool = epochs, (place["epoch"], place["pool"])
    stream.close()
