"""Datasets written block by block, for the tests of what reads them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megarec.base.files import sha256_of
from megarec.base.jagged import lengths_to_offsets
from megarec.data.block import Array, Block, Compression, encode_block
from megarec.data.dataset import Dataset, FieldInfo, ShardInfo, Split
from megarec.data.schema import Schema
from megarec.data.tar import write_shard

FIELDS = {
    "item": FieldInfo(name="item", role="item", kind="id", num_ids=5000),
    "surface": FieldInfo(name="surface", role="context", kind="categorical", num_ids=7),
    "tags": FieldInfo(name="tags", role="context", kind="categorical", num_ids=300, slots=3),
    "artist": FieldInfo(name="artist", role="item_side", kind="id", num_ids=50),
    "played": FieldInfo(name="played", role="feedback", kind="numeric", num_ids=6, edges=(1.0, 2.0, 3.0, 4.0)),
}


def random_columns(num_events: int, seed: int, fields: dict[str, FieldInfo] = FIELDS) -> dict[str, Array]:
    """Random ids for every field an event has, and rising times."""
    draw = np.random.default_rng(seed)
    columns: dict[str, Array] = {}
    for name, info in fields.items():
        if info.role != "item_side":
            shape = num_events if info.slots == 1 else (num_events, info.slots)
            columns[name] = draw.integers(0 if info.slots == 1 else -1, info.num_ids, shape)
    return columns | {"timestamp": 1_700_000_000 + np.cumsum(draw.integers(0, 100, num_events))}


def make_block(
    lengths: Sequence[int], *, first_user: int, seed: int = 0, num_targets: Sequence[int] | None = None
) -> Block:
    """A block of users with histories of the given `lengths`, and in evaluation blocks `num_targets` of them."""
    offsets = lengths_to_offsets(np.array(lengths, dtype=np.int64))
    block = Block(
        user=first_user + np.arange(len(lengths)),
        offsets=offsets,
        columns=random_columns(int(offsets[-1]), seed),
    )
    if num_targets is None:
        return block
    target_offsets = lengths_to_offsets(np.array(num_targets, dtype=np.int64))
    return Block(
        user=block.user,
        offsets=offsets,
        columns=block.columns,
        query_time=1_800_000_000 + np.arange(len(lengths)),
        target_offsets=target_offsets,
        target_columns=random_columns(int(target_offsets[-1]), seed + 1),
    )


def write_dataset_of(
    path: Path,
    *,
    train: Sequence[Sequence[Block]] = (),
    evaluation: Sequence[Sequence[Block]] = (),
    fields: dict[str, FieldInfo] = FIELDS,
    compression: Compression = "none",
    has_timestamps: bool = True,
) -> Dataset:
    """Writes shards of blocks and returns the dataset as `open_dataset` would."""
    shards = []
    splits: list[tuple[Split, Sequence[Sequence[Block]]]] = [("train", train), ("eval", evaluation)]
    for split, shards_of_blocks in splits:
        (path / split).mkdir(parents=True)
        for number, blocks in enumerate(shards_of_blocks):
            file = path / split / f"shard-{number:06d}.tar"
            num_blocks, num_bytes = write_shard(file, [encode_block(b, compression=compression) for b in blocks])
            shards.append(
                ShardInfo(
                    file=f"{split}/{file.name}",
                    split=split,
                    users=sum(len(b.user) for b in blocks),
                    events=sum(int(b.offsets[-1]) for b in blocks),
                    targets=sum(0 if b.target_offsets is None else int(b.target_offsets[-1]) for b in blocks),
                    blocks=num_blocks,
                    bytes=num_bytes,
                    sha256=sha256_of(file),
                )
            )
    return Dataset(
        path=path,
        schema=Schema(name="test", user="user", item="item", timestamp="timestamp"),
        fields=fields,
        split={"rule": "test"},
        counts={},
        shards=shards,
        has_timestamps=has_timestamps,
    )


def write_histories(
    path: Path, lengths: Sequence[int], *, users_per_block: int, blocks_per_shard: int = 3, seed: int = 0
) -> Dataset:
    """A train split of users 0, 1, ... with histories of the given `lengths`."""
    blocks = [
        make_block(lengths[first : first + users_per_block], first_user=first, seed=seed + first)
        for first in range(0, len(lengths), users_per_block)
    ]
    shards = [blocks[first : first + blocks_per_shard] for first in range(0, len(blocks), blocks_per_shard)]
    return write_dataset_of(path, train=shards)
