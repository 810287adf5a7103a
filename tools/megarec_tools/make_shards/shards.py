"""The third pass: the users of one shard become blocks of ids in a tar file."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from megarec.base.files import sha256_of
from megarec.base.jagged import Int64, gather_indices, lengths_to_offsets
from megarec.data.block import Block, Compression, encode_block
from megarec.data.dataset import FieldInfo, ShardInfo, Split
from megarec.data.tar import write_shard
from megarec_tools.make_shards.histories import read_columns
from megarec_tools.make_shards.vocabularies import bin_ids, map_raw

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class BucketUsers:
    """Some users of a bucket.

    Attributes:
        bucket: the folder of the bucket.
        first, last: of the bucket's users of this split, those from `first` up to before `last`.
        trained_before: users that are trained on in the buckets before.
        untrained_before: users that only have targets in the buckets before, and all that are trained on.
    """

    bucket: Path
    first: int
    last: int
    trained_before: int
    untrained_before: int


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to write at `path`."""

    path: Path
    split: Split
    parts: tuple[BucketUsers, ...]
    users_per_block: int
    compression: Compression
    fields: dict[str, FieldInfo]
    vocabularies: Path
    query_time: int | None


def vocabulary_path(folder: Path, name: str) -> Path:
    """Where the passes keep the vocabulary of a field."""
    return folder / f"{name}.arrow"


def build_shard(task: ShardTask) -> ShardInfo:
    """Runs one task."""
    writer = _ShardWriter(task)
    num_blocks, num_bytes = write_shard(task.path, writer.blocks())
    return ShardInfo(
        file=f"{task.split}/{task.path.name}",
        split=task.split,
        users=writer.num_users,
        events=writer.num_events,
        targets=writer.num_targets,
        blocks=num_blocks,
        bytes=num_bytes,
        sha256=sha256_of(task.path),
    )


class _ShardWriter:
    def __init__(self, task: ShardTask) -> None:
        self.task = task
        self.num_users = self.num_events = self.num_targets = 0

    def blocks(self) -> Iterator[bytes]:
        """Blocks of `users_per_block` users, the last one fewer; a block may span buckets."""
        waiting: list[_Histories] = []
        size = self.task.users_per_block
        for part in self.task.parts:
            histories = _Bucket(part, self.task).histories()
            while len(histories):
                room = size - sum(len(h) for h in waiting)
                waiting.append(histories[:room])
                histories = histories[room:]
                if sum(len(h) for h in waiting) == size:
                    yield self._encode(waiting)
                    waiting = []
        if waiting:
            yield self._encode(waiting)

    def _encode(self, parts: list["_Histories"]) -> bytes:
        offsets = lengths_to_offsets(np.concatenate([p.num_history for p in parts]))
        columns = _concatenate([p.bucket.columns(p.start, p.num_history) for p in parts])
        user = np.concatenate([p.user for p in parts])
        self.num_users += len(user)
        self.num_events += int(offsets[-1])
        if self.task.split == "train":
            block = Block(user=user, offsets=offsets, columns=columns)
        else:
            target_offsets = lengths_to_offsets(np.concatenate([p.num_targets for p in parts]))
            targets = _concatenate([p.bucket.columns(p.start + p.first_target, p.num_targets) for p in parts])
            first_time = targets["timestamp"][target_offsets[:-1]]
            fixed = self.task.query_time
            block = Block(
                user=user,
                offsets=offsets,
                columns=columns,
                query_time=first_time if fixed is None else np.full(len(user), fixed, np.int64),
                target_offsets=target_offsets,
                target_columns=targets,
            )
            self.num_targets += int(target_offsets[-1])
        return encode_block(block, compression=self.task.compression)


@dataclass(frozen=True, kw_only=True)
class _Histories:
    """Users of one bucket: where their events lie."""

    bucket: "_Bucket"
    user: Int64
    start: Int64
    num_history: Int64
    first_target: Int64
    num_targets: Int64

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, part: slice) -> "_Histories":
        return _Histories(
            bucket=self.bucket,
            user=self.user[part],
            start=self.start[part],
            num_history=self.num_history[part],
            first_target=self.first_target[part],
            num_targets=self.num_targets[part],
        )


class _Bucket:
    """The columns of one bucket, as ids."""

    def __init__(self, part: BucketUsers, task: ShardTask) -> None:
        self.part = part
        self.task = task
        self._events = read_columns(part.bucket / "events.arrow")

    def histories(self) -> _Histories:
        """The users of the part, numbered over the whole dataset."""
        users = {name: column.to_numpy() for name, column in _columns(read_columns(self.part.bucket / "users.arrow"))}
        trained_on = users["trained_on"].astype(np.bool_)
        numbers = np.where(
            trained_on,
            self.part.trained_before + np.cumsum(trained_on) - 1,
            self.part.untrained_before + np.cumsum(users["only_asked"]) - 1,
        )
        mine = {key: users[f"{self.task.split}/{key}"] for key in ("num_history", "first_target", "num_targets")}
        chosen = trained_on if self.task.split == "train" else mine["num_targets"] > 0
        at = np.flatnonzero(chosen)[self.part.first : self.part.last]
        return _Histories(
            bucket=self,
            user=numbers[at],
            start=users["start"][at],
            num_history=mine["num_history"][at],
            first_target=mine["first_target"][at],
            num_targets=mine["num_targets"][at],
        )

    def columns(self, start: Int64, length: Int64) -> dict[str, Array]:
        """The events of the slices `[start, start + length)` end to end, as ids by field, and `timestamp`."""
        at = gather_indices(start, length)
        found: dict[str, Array] = {"timestamp": self._arrays["timestamp"][at]}
        for name, info in self.task.fields.items():
            if info.role == "item_side":
                continue
            slots = [self._ids(name, info, raw=self._arrays[f"{name}/{slot}"][at]) for slot in range(info.slots)]
            found[name] = slots[0] if info.slots == 1 else np.stack(slots, axis=1)
        return found

    @cached_property
    def _arrays(self) -> dict[str, Array]:
        return {name: column.to_numpy() for name, column in _columns(self._events)}

    @cached_property
    def _ids_of_codes(self) -> dict[str, npt.NDArray[np.int32]]:
        tables = {}
        for name, info in self.task.fields.items():
            if info.kind not in ("id", "categorical") or info.role == "item_side":
                continue
            raw = pl.DataFrame(pl.from_arrow(read_columns(self.part.bucket / f"raw_{name}.arrow")))["raw"]
            vocabulary = pl.DataFrame(pl.from_arrow(read_columns(vocabulary_path(self.task.vocabularies, name))))
            nothing = np.array([-1 if info.slots > 1 else 0], np.int32)  # code -1 reads the last entry
            tables[name] = np.concatenate([map_raw(raw, vocabulary), nothing])
        return tables

    def _ids(self, name: str, info: FieldInfo, *, raw: Array) -> Array:
        if name in self._ids_of_codes:
            return self._ids_of_codes[name][raw]
        return bin_ids(raw, info.edges) if info.kind == "numeric" else raw.astype(np.int32)


def _columns(table: Any) -> list[tuple[str, Any]]:
    return list(zip(table.column_names, table.columns, strict=True))


def _concatenate(parts: list[dict[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
