"""A dataset directory: `dataset.json` as dataclasses, and the tables that lie beside it.

Ids: 0 is a missing or unknown value, 1 and up are real ones; -1 fills the unused slots of a field of several values.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megarec.base.config import build, plain
from megarec.base.errors import UserError
from megarec.base.files import read_json, sha256_of, write_json
from megarec.base.progress import track
from megarec.data.schema import FieldKind, Schema

FORMAT = "megarec-dataset-1"

Split = Literal["train", "valid", "eval"]
AskedSplit = Literal["valid", "eval"]

SPLITS: tuple[Split, ...] = ("train", "valid", "eval")


@dataclass(frozen=True, kw_only=True)
class FieldInfo:
    """One field as it lies in the shards.

    Attributes:
        name: of the field.
        role: of the field; `item` is the item itself.
        kind: of the field.
        num_ids: ids are below this; id 0 is counted.
        slots: values per event; unused slots are -1.
        edges: numeric: the bin edges. A value with k edges below or at it has id k + 1.
    """

    name: str
    role: Literal["item", "item_side", "context", "feedback"]
    kind: FieldKind
    num_ids: int
    slots: int = 1
    edges: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One tar file: its path below the dataset, how much of what it holds, its size and SHA-256."""

    file: str
    split: Split
    users: int
    events: int
    targets: int
    blocks: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """An opened dataset directory.

    Attributes:
        path: the directory.
        schema: what the log was read by.
        fields: every field, the item first.
        split: the rule of the split and its numbers.
        counts: what was counted when the shards were made.
        shards: every tar file.
        has_timestamps: whether the log had times; if not, every timestamp is 0.
    """

    path: Path
    schema: Schema
    fields: dict[str, FieldInfo]
    split: dict[str, Any]
    counts: dict[str, int]
    shards: list[ShardInfo]
    has_timestamps: bool

    def shards_of(self, split: Split) -> list[ShardInfo]:
        """The shards of one split, in order."""
        return [shard for shard in self.shards if shard.split == split]

    def shard_path(self, shard: ShardInfo) -> Path:
        """Where a shard lies."""
        return self.path / shard.file

    @property
    def num_items(self) -> int:
        """Items with an id of their own; ids run from 1 to this."""
        return self.fields["item"].num_ids - 1

    def item_counts(self) -> npt.NDArray[np.int64]:
        """Train events by item id, `[num_items + 1]`; 0 for id 0."""
        counts = np.zeros(self.num_items + 1, np.int64)
        counts[1:] = self._items(["count"])["count"].to_numpy()
        return counts

    def item_side(self) -> dict[str, npt.NDArray[np.int32]]:
        """Item-side ids by item id: `[num_items + 1]`, or `[num_items + 1, slots]`. Item 0 has none of them."""
        infos = [info for info in self.fields.values() if info.role == "item_side"]
        columns = self._items([info.name for info in infos]) if infos else {}
        side = {}
        for info in infos:
            values = columns[info.name].combine_chunks()
            if info.slots == 1:
                side[info.name] = np.concatenate([np.zeros(1, np.int32), values.to_numpy()])
            else:
                rows = values.flatten().to_numpy().reshape(-1, info.slots)
                side[info.name] = np.concatenate([np.full((1, info.slots), -1, np.int32), rows])
            if side[info.name].size and int(side[info.name].max()) >= info.num_ids:
                raise UserError(f"an id of '{info.name}' is out of range", where=str(self.path / "items.parquet"))
        return side

    def item_raw(self) -> list[int | str | None]:
        """The log's own value of each item by id; None for id 0."""
        return [None, *self._items(["raw"])["raw"].to_pylist()]

    def verify(self) -> None:
        """Reads every shard and compares its SHA-256.

        Raises:
            UserError: a shard is missing or was changed.
        """
        for shard in track(self.shards, title="verify", unit="shards"):
            path = self.shard_path(shard)
            if not path.is_file():
                raise UserError("the shard is missing", where=str(path), fix="Copy the dataset again")
            if path.stat().st_size != shard.bytes or sha256_of(path) != shard.sha256:
                raise UserError("the shard is not what dataset.json says", where=str(path), fix="Copy it again")

    def _items(self, columns: list[str]) -> Mapping[str, Any]:
        from pyarrow import ArrowException, parquet  # half a second that `--help` does not need

        path = self.path / "items.parquet"
        try:
            table = parquet.read_table(path, columns=["id", *columns], memory_map=True)
        except (OSError, ArrowException) as error:
            raise UserError(f"not a readable Parquet file ({error})", where=str(path)) from None
        if table.num_rows != self.num_items or table.column_names != ["id", *columns]:
            raise UserError("does not belong to this dataset.json", where=str(path), fix="Copy the dataset again")
        return {name: table[name] for name in columns}


def open_dataset(path: str | Path) -> Dataset:
    """Reads `dataset.json`; the shards themselves are read later, by whoever streams or verifies them.

    Raises:
        UserError: no dataset lies here, or `dataset.json` is broken or of another format.
    """
    directory = Path(path)
    file = directory / "dataset.json"
    content = read_json(file, what="dataset")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"not of the format {FORMAT}", where=str(file), fix="Make the shards again")
    values = {key: value for key, value in content.items() if key != "format"}
    try:
        dataset = build(Dataset, {**values, "path": directory})
        _check(dataset)
    except UserError as error:
        raise UserError(str(error), where=str(file)) from None
    return dataset


def write_dataset(dataset: Dataset) -> None:
    """Writes `dataset.json` into the directory of `dataset`."""
    content = plain(dataset)
    del content["path"]
    write_json(dataset.path / "dataset.json", {"format": FORMAT, **content})


def _check(dataset: Dataset) -> None:
    if next(iter(dataset.fields), None) != "item" or dataset.fields["item"].role != "item":
        raise UserError("the first field is not the item")
    for name, info in dataset.fields.items():
        if info.name != name or info.num_ids < 1 or info.slots < 1:
            raise UserError(f"the field '{name}' is broken")
    for shard in dataset.shards:
        if not re.fullmatch(rf"{shard.split}/shard-\d{{6,}}\.tar", shard.file):  # nothing outside the directory
            raise UserError(f"'{shard.file}' is no shard of '{shard.split}'")
