"""Events per second from shards on disk to packs, one process: `python -m tests.benchmarks.bench_stream`.

Makes its own dataset (lognormal histories of about 100 events, 8 columns) and prints the best of a few runs of each
part of the way, with a warm file cache. "Per core second" divides by the processor time of both threads.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megarec.base.jagged import lengths_to_offsets
from megarec.data.block import Array, Block, Compression
from megarec.data.dataset import Dataset, FieldInfo
from megarec.data.packs import cut_windows
from megarec.data.pools import fill_pool
from megarec.data.reader import BlockReader
from megarec.data.stream import StreamConfig, TrainStream
from tests.data.small_datasets import write_dataset_of

FIELDS = {
    info.name: info
    for info in (
        FieldInfo(name="item", role="item", kind="id", num_ids=1_000_000),
        FieldInfo(name="surface", role="context", kind="categorical", num_ids=20),
        FieldInfo(name="device", role="context", kind="categorical", num_ids=8),
        FieldInfo(name="organic", role="context", kind="flag", num_ids=3),
        FieldInfo(name="hour", role="context", kind="categorical", num_ids=25),
        FieldInfo(name="played", role="feedback", kind="numeric", num_ids=12),
        FieldInfo(name="action", role="feedback", kind="categorical", num_ids=300),
    )
}


def write(path: Path, *, num_users: int, users_per_block: int, compression: Compression) -> Dataset:
    draw = np.random.default_rng(0)
    blocks = []
    for first in range(0, num_users, users_per_block):
        size = min(users_per_block, num_users - first)
        offsets = lengths_to_offsets(np.clip(draw.lognormal(np.log(50), 1.2, size), 1, 5000).astype(np.int64))
        num_events = int(offsets[-1])
        columns: dict[str, Array] = {n: draw.integers(0, info.num_ids, num_events) for n, info in FIELDS.items()}
        columns["timestamp"] = 1_700_000_000 + np.cumsum(draw.integers(0, 60, num_events))
        blocks.append(Block(user=first + np.arange(size), offsets=offsets, columns=columns))
    shards = [blocks[first : first + 16] for first in range(0, len(blocks), 16)]
    return write_dataset_of(path, train=shards, fields=FIELDS, compression=compression)


def rates(body: Callable[[Dataset], int], dataset: Dataset) -> tuple[float, float]:
    """Millions of events per second, and per second of the process's cores; `body` returns how many events it did."""
    wall, cores = time.perf_counter(), time.process_time()
    num_events = body(dataset) / 1e6
    return num_events / (time.perf_counter() - wall), num_events / (time.process_time() - cores)


def decode(dataset: Dataset) -> int:
    """Reads every block."""
    reader = BlockReader(dataset, "train")
    return sum(int(reader.read(number).offsets[-1]) for number in range(reader.num_blocks))


def pool(dataset: Dataset, config: StreamConfig) -> int:
    """Reads, packs and counts the events in the packs, and makes none of them."""
    reader = BlockReader(dataset, "train")
    num_events = 0
    for first in range(0, reader.num_blocks, config.pool_blocks):
        numbers = range(first, min(first + config.pool_blocks, reader.num_blocks))
        parts = [cut_windows(reader.read(n), epoch=0, number=n, rule=config.pack_rule)[0] for n in numbers]
        filled = fill_pool(parts, carried=None, rule=config.pack_rule, key=first)
        num_events += int(sum(filled.windows.num_targets[members].sum() for members in filled.packs))
    return num_events


def serve(dataset: Dataset, config: StreamConfig) -> int:
    """Serves every lane for two epochs and counts the events in the packs."""
    stream = TrainStream(dataset, config, lanes=range(config.lanes))
    num_events = 0
    while (packs := stream.next_step())[0].epoch < 2:
        num_events += sum(int(pack.cu_seqlens[-1]) for pack in packs)
    stream.close()
    return num_events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=60_000)
    parser.add_argument("--users-per-block", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    parts: dict[str, Callable[[Dataset], int]] = {
        "decode blocks": decode,
        "and deal pools": lambda dataset: pool(dataset, StreamConfig()),
        "and make packs (the stream)": lambda dataset: serve(dataset, StreamConfig()),
        "the same, 32 lanes": lambda dataset: serve(dataset, StreamConfig(lanes=32)),
        "the same, 8192 events a pack, none dropped": lambda dataset: serve(
            dataset, StreamConfig(tokens_per_pack=8192, max_history_events=5000)
        ),
        "the same, stochastic length 1.6 of 512": lambda dataset: serve(
            dataset, StreamConfig(stochastic_length_alpha=1.6)
        ),
        "the same, stride:256": lambda dataset: serve(dataset, StreamConfig(window="stride:256")),
    }
    for compression in ("none", "zstd"):
        with tempfile.TemporaryDirectory() as folder:
            dataset = write(
                Path(folder), num_users=options.users, users_per_block=options.users_per_block, compression=compression
            )
            events, size = (sum(getattr(shard, name) for shard in dataset.shards) for name in ("events", "bytes"))
            about = f"{compression}: {events / 1e6:.1f} M events, {size / events:.1f} bytes each"
            print(f"{about:45}{'M events/s':>12}{'per core second':>18}")
            for name, body in parts.items():
                runs = [rates(body, dataset) for _ in range(options.repeats)]
                print(f"  {name:43}{max(wall for wall, _ in runs):12.1f}{max(cores for _, cores in runs):18.1f}")


if __name__ == "__main__":
    main()
