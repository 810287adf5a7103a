"""How fast `megarec-make-shards` turns a log into shards: events per second and peak memory.

    python tests/benchmarks/bench_make_shards.py [--events 10000000] [--processes 0] [--split leave_last_out] [LOG ...]

Without a log it writes one of its own in the schema `yambda`: user activity lognormal, item popularity Zipf.
"""

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
from pyarrow import parquet

EVENTS_PER_FILE = 1_000_000


def write_log(folder: Path, *, num_events: int) -> None:
    """Parquet files in time order, as a collector would leave them."""
    random = np.random.default_rng(0)
    num_users, num_items = max(1, num_events // 100), max(1, num_events // 20)
    activity = random.lognormal(0.0, 1.3, num_users)
    popularity = (np.arange(num_items) + 10.0) ** -1.05
    users = np.searchsorted(np.cumsum(activity / activity.sum()), random.random(num_events)).clip(0, num_users - 1)
    items = np.searchsorted(np.cumsum(popularity / popularity.sum()), random.random(num_events)).clip(0, num_items - 1)
    names = random.permutation(num_items)
    ratio = np.where(
        random.random(num_events) < 0.6, random.integers(50, 101, num_events), random.integers(0, 50, num_events)
    )
    table = pa.table(
        {
            "uid": (users * 10).astype(np.uint32),
            "item_id": names[items].astype(np.uint32),
            "timestamp": (np.sort(random.integers(0, 26_000_000, num_events)) // 5 * 5).astype(np.uint32),
            "is_organic": random.integers(0, 2, num_events).astype(np.uint8),
            "played_ratio_pct": ratio.astype(np.uint16),
            "track_length_seconds": random.integers(60, 400, num_events).astype(np.uint32),
        }
    )
    for number, start in enumerate(range(0, num_events, EVENTS_PER_FILE)):
        part = table.slice(start, EVENTS_PER_FILE)
        parquet.write_table(part, folder / f"part-{number:04d}.parquet", compression="zstd")


class PeakMemory:
    """The largest sum of resident bytes of this process and its children, looked at ten times a second."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.num_bytes

    def _watch(self) -> None:
        this = psutil.Process()
        while not self._stop.wait(0.1):
            total = 0
            for process in [this, *this.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.num_bytes = max(self.num_bytes, total)


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", nargs="*")
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--split", default="leave_last_out")
    parser.add_argument("--schema", default="yambda")
    parser.add_argument("--compression", default="none")
    arguments = parser.parse_args()
    from megarec_tools.make_shards.config import MakeShardsConfig, SplitConfig
    from megarec_tools.make_shards.pipeline import make_shards

    with tempfile.TemporaryDirectory() as folder:
        logs = arguments.log
        if not logs:
            (Path(folder) / "log").mkdir()
            write_log(Path(folder) / "log", num_events=arguments.events)
            logs = [str(Path(folder) / "log")]
        cut = "25000000" if arguments.split == "global_time" else None
        config = MakeShardsConfig(
            input=logs,
            output=str(Path(folder) / "dataset"),
            schema=arguments.schema,
            split=SplitConfig(rule=arguments.split, cut=cut),
            num_processes=arguments.processes,
            compression=arguments.compression,
        )
        memory = PeakMemory()
        begin, cpu_before = time.perf_counter(), cpu_seconds()
        dataset = make_shards(config)
        seconds = time.perf_counter() - begin
        peak = memory.stop()
        cpu = cpu_seconds() - cpu_before
    events = dataset.counts["events"]
    print(f"{'events':>12} {'seconds':>8} {'events/s':>10} {'peak RSS MB':>12} {'dataset MB':>11} {'CPU seconds':>13}")
    num_mb = sum(shard.bytes for shard in dataset.shards) / 1e6
    print(
        f"{events:>12,} {seconds:>8.1f} {events / seconds:>10,.0f} {peak / 1e6:>12,.0f} {num_mb:>11,.0f} {cpu:>13.1f}"
    )


if __name__ == "__main__":
    main()
