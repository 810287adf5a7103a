"""A slow twin of `megarec-make-shards`: plain Python over rows that are known to be good, and a reader of shards."""

from collections import Counter
from pathlib import Path
from typing import Any

from megarec.data.block import decode_block
from megarec.data.dataset import Dataset
from megarec.data.tar import index_shard

Event = dict[str, Any]


def split_user(
    events: list[Event], *, rule: str, held_out: bool, cut: int, gap: int
) -> tuple[list[Event], list[Event]]:
    """History and targets of one user; `events` are in the order of the log."""
    events = sorted(events, key=lambda e: e["time"])  # stable
    if rule == "global_time":
        return [e for e in events if e["time"] < cut - gap], [e for e in events if e["time"] >= cut]
    if len(events) >= 2 and (rule == "leave_last_out" or held_out):
        return events[:-1], events[-1:]
    return events, []


def rank_values(train: list[Any], catalog: list[Any]) -> dict[Any, int]:
    """Ids from 1 by falling train count, then by value."""
    counts = Counter(train)
    return {v: i + 1 for i, v in enumerate(sorted(set(catalog), key=lambda v: (-counts[v], v)))}


def read_users(dataset: Dataset, split: str) -> dict[int, dict[str, Any]]:
    """Every user of a split by index: `columns`, and `targets` and `query_time` in eval."""
    users: dict[int, dict[str, Any]] = {}
    for shard in dataset.shards_of(split):  # type: ignore[arg-type]
        data = (Path(dataset.path) / shard.file).read_bytes()
        members = index_shard(Path(dataset.path) / shard.file)
        assert len(members) == shard.blocks
        num_users = num_events = num_targets = 0
        for offset, size in members:
            block = decode_block(data[offset : offset + size], where=shard.file)
            num_users += len(block.user)
            for at, user in enumerate(block.user.tolist()):
                a, b = block.offsets[at : at + 2]
                entry = {"columns": {name: column[a:b].tolist() for name, column in block.columns.items()}}
                num_events += int(b - a)
                if block.query_time is not None and block.target_offsets is not None:
                    a, b = block.target_offsets[at : at + 2]
                    num_targets += int(b - a)
                    entry["targets"] = {name: column[a:b].tolist() for name, column in block.target_columns.items()}
                    entry["query_time"] = int(block.query_time[at])
                assert user not in users
                users[user] = entry
        assert (num_users, num_events, num_targets) == (shard.users, shard.events, shard.targets)
    return users
