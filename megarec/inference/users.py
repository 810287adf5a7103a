"""The history of one user of a dataset."""

from typing import Any

import numpy as np

from megarec.base.errors import UserError
from megarec.data.block import Block
from megarec.data.dataset import Dataset
from megarec.data.reader import BlockReader
from megarec.inference.histories import Histories


def find_user(dataset: Dataset, raw: Any) -> Histories:
    """What the dataset knows of the user whose raw id is `raw` before the split's question, in its latest context.

    Reads blocks until the user turns up: the eval split first, then train.

    Raises:
        UserError: the dataset has no such user.
    """
    import polars as pl

    path = dataset.path / "vocab" / "user.parquet"
    try:
        frame = pl.read_parquet(path, columns=["user", "raw"])
        same = frame.filter(pl.col("raw").cast(pl.String) == str(raw))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"not a readable vocabulary ({error})", where=str(path)) from None
    if same.is_empty():
        raise UserError(f"no user '{raw}'", where=str(path), fix="Give the id as the log has it")
    user = int(same["user"][0])
    for split in ("eval", "train"):
        reader = BlockReader(dataset, split)
        for number in range(reader.num_blocks):
            block = reader.read(number)
            at = np.flatnonzero(block.user == user)
            if len(at):
                return _history(block, int(at[0]), dataset)
    raise UserError(f"the user '{raw}' has no events in the shards", where=str(dataset.path))


def _history(block: Block, row: int, dataset: Dataset) -> Histories:
    events = slice(int(block.offsets[row]), int(block.offsets[row + 1]))
    columns = {name: column for name, column in block.columns.items() if name != "timestamp"}
    fields = {name: column[events].astype(np.int32) for name, column in columns.items()}
    timestamp = block.columns["timestamp"][events].copy()  # torch wants arrays that can be written to
    newest = timestamp[-1:] if len(timestamp) else np.zeros(1, np.int64)
    context = [name for name, info in dataset.fields.items() if info.role == "context"]
    return Histories(
        user=block.user[row : row + 1],
        cu_seqlens=np.array([0, len(timestamp)]),
        timestamp=timestamp,
        fields=fields,
        query_time=newest if block.query_time is None else block.query_time[row : row + 1],
        query_fields={name: fields[name][-1:] for name in context} if len(timestamp) else {},
    )
