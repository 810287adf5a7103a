"""Reads single blocks of a split, by number, out of its shards."""

import os
from dataclasses import replace

import numpy as np

from megarec.base.errors import UserError
from megarec.base.jagged import lengths_to_offsets
from megarec.data.block import Array, Block, decode_block, read_num_users
from megarec.data.dataset import Dataset, FieldInfo, Split
from megarec.data.tar import index_shard

_PREFIX_BYTES = 128


class BlockReader:
    """The blocks of a split, numbered from 0 in the order of its shards; any of them can be read at any time.

    A shard is indexed when its first block is read. What the dataset says about a shard and a column is held against
    what is found there.

    Raises:
        UserError: on construction, a shard is missing or has another size than `dataset.json` says; later, a shard or
            a block is damaged or holds ids its vocabulary lacks.
    """

    def __init__(self, dataset: Dataset, split: Split) -> None:
        self._dataset = dataset
        self._split = split
        self._shards = dataset.shards_of(split)
        self._first_block = lengths_to_offsets(np.array([shard.blocks for shard in self._shards], dtype=np.int64))
        self._index: dict[int, list[tuple[int, int]]] = {}
        self.num_blocks = int(self._first_block[-1])
        for shard in self._shards:
            path = dataset.shard_path(shard)
            num_bytes = path.stat().st_size if path.is_file() else None
            if num_bytes != shard.bytes:
                found = "the shard is missing" if num_bytes is None else f"the shard has {num_bytes} bytes"
                what = f"{found}, dataset.json says {shard.bytes}"
                raise UserError(what, where=str(path), fix="Copy it again or make the dataset anew")

    def read(self, number: int) -> Block:
        """Block `number` with the item, the context and feedback fields, and `timestamp`, 0 if there is none.

        Item-side fields are no part of it: they are `Dataset.item_side` by the item.
        """
        data, where = self._bytes(number)
        block = decode_block(data, where=where)
        if (block.target_offsets is not None) != (self._split != "train"):
            raise UserError(f"not a block of the {self._split} split", where=where)
        targets = self._event_columns(block.target_columns, where=where) if block.target_columns else {}
        return replace(block, columns=self._event_columns(block.columns, where=where), target_columns=targets)

    def num_users(self, number: int) -> int:
        """The number of users in block `number`, read from its first bytes."""
        data, where = self._bytes(number, at_most=_PREFIX_BYTES)
        return read_num_users(data, where=where)

    def _bytes(self, number: int, *, at_most: int | None = None) -> tuple[bytes, str]:
        shard_number = int(np.searchsorted(self._first_block, number, side="right")) - 1
        shard = self._shards[shard_number]
        path = self._dataset.shard_path(shard)
        within = number - int(self._first_block[shard_number])
        where = f"{path}, block {within}"
        if shard_number not in self._index:
            index = index_shard(path)
            if len(index) != shard.blocks:
                what = f"the shard holds {len(index)} blocks, dataset.json says {shard.blocks}"
                raise UserError(what, where=str(path), fix="Copy it again or make the dataset anew")
            self._index[shard_number] = index
        offset, size = self._index[shard_number][within]
        wanted = size if at_most is None else min(size, at_most)
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), wanted, offset)
        if len(data) != wanted:
            raise UserError("the shard became shorter while it was read", where=where)
        return data, where

    def _event_columns(self, columns: dict[str, Array], *, where: str) -> dict[str, Array]:
        fields = {name: info for name, info in self._dataset.fields.items() if info.role != "item_side"}
        wanted = [*fields, *(["timestamp"] if self._dataset.has_timestamps else [])]
        missing = [name for name in wanted if name not in columns]
        if missing:
            raise UserError(f"the block lacks the column {missing[0]!r}", where=where)
        for name, info in fields.items():
            _check_ids(columns[name], info, where=where)
        timed = self._dataset.has_timestamps
        timestamp = columns["timestamp"] if timed else np.zeros(len(columns["item"]), dtype=np.int64)
        return {name: columns[name] for name in fields} | {"timestamp": timestamp}


def _check_ids(ids: Array, info: FieldInfo, *, where: str) -> None:
    shape = ids.shape[1:]
    if shape != (() if info.slots == 1 else (info.slots,)):
        what = f"column {info.name!r} has {shape[0] if shape else 1} slots, dataset.json says {info.slots}"
        raise UserError(what, where=where)
    if ids.size == 0:
        return
    lowest, highest = int(ids.min()), int(ids.max())
    # Only a multi-valued column has empty slots.
    if lowest < (0 if info.slots == 1 else -1) or highest >= info.num_ids:
        what = f"column {info.name!r} holds ids from {lowest} to {highest}, its vocabulary ends at {info.num_ids - 1}"
        raise UserError(what, where=where, fix="The shard belongs to another dataset or is damaged")
