"""The first pass: a piece of the log is read, cleaned, cut by user into buckets, and laid aside."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from megarec.base.random import derive_key, hash_numpy
from megarec_tools.make_shards.log.cleaning import clean, keep_rows
from megarec_tools.make_shards.log.layout import Layout
from megarec_tools.make_shards.log.pieces import Piece
from megarec_tools.make_shards.log.reading import explode_rows, list_columns_of, read_piece

UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class PartitionTask:
    """One piece to partition into `2 ** bucket_bits` buckets; the result goes to `spill`. The items may be counted."""

    piece: Piece
    layout: Layout
    bucket_bits: int
    seed: int
    count_items: bool
    spill: Path


@dataclass(frozen=True, kw_only=True)
class PartitionResult:
    """What was found in one piece.

    Attributes:
        num_file_rows: rows of the file.
        num_rows: what was read: these rows, or the elements of their lists.
        num_filtered: what the schema's `keep` left out of it.
        num_events: what was laid aside.
        rejects: `row` (from 1, within the piece), `reason`, and `value` for the first row of each reason.
        signs: see `Rejects.signs`.
        items: each `item` and its events, as `catalog`; None when they are not counted.
    """

    num_file_rows: int
    num_rows: int
    num_filtered: int
    num_events: int
    rejects: pl.DataFrame
    signs: set[tuple[str, str]]
    items: pl.DataFrame | None


def partition_piece(task: PartitionTask) -> PartitionResult:
    """Runs one task."""
    schema = task.layout.schema
    raw, broken = read_piece(task.piece, schema.columns(), list_columns=list_columns_of(schema.log_fields().values()))
    num_file_rows = len(raw) + len(broken)
    if task.layout.exploded:
        raw, unequal = explode_rows(raw)
        broken = pl.concat([broken, unequal])
    kept = keep_rows(raw, schema.keep)
    frame, rejects = clean(kept, task.layout)
    write_buckets(task.spill, frame, bits=task.bucket_bits, seed=task.seed)
    rejected = pl.concat([broken, rejects.frame(kept["#row"])]).with_columns(pl.col("row") + 1)
    return PartitionResult(
        num_file_rows=num_file_rows,
        num_rows=len(raw) + len(broken),
        num_filtered=len(raw) - len(kept),
        num_events=len(frame),
        rejects=rejected,
        signs=rejects.signs,
        items=frame.group_by("item").agg(pl.len().cast(pl.Int64).alias("catalog")) if task.count_items else None,
    )


def hash_users(users: pl.Series, *, seed: int) -> UInt64:
    """64 bits per user that decide the order of users; the same for the same id wherever it stands."""
    key = derive_key(seed, "user order")
    if users.dtype != pl.String:
        return hash_numpy(key, users.to_numpy())
    coded = pa.array(users.to_arrow()).dictionary_encode()
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in coded.dictionary.to_pylist()]
    distinct = np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
    return hash_numpy(key, distinct)[coded.indices.to_numpy()]


def write_buckets(path: Path, frame: pl.DataFrame, *, bits: int, seed: int) -> None:
    """Writes the rows of `frame`, with the `hash` of their `user`, as `2 ** bits` batches, in each as they stand."""
    hashes = hash_users(frame["user"], seed=seed)
    bucket = (hashes >> np.uint64(64 - bits)) if bits else np.zeros(len(hashes), np.uint64)
    counts = np.bincount(bucket.astype(np.int64), minlength=1 << bits)
    order = np.argsort(bucket.astype(np.uint16), kind="stable")
    write_batches(path, frame.insert_column(0, pl.Series("hash", hashes))[order].to_arrow(), counts)


def write_batches(path: Path, table: pa.Table, counts: npt.NDArray[np.int64]) -> None:
    """Writes consecutive rows of `table` as record batches of `counts` rows."""
    whole = table.combine_chunks().to_batches()
    batch = whole[0] if whole else pa.RecordBatch.from_pylist([], schema=table.schema)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
        start = 0
        for count in counts.tolist():
            writer.write_batch(batch.slice(start, count))
            start += count


def read_batch(path: Path, number: int) -> pa.RecordBatch:
    """One record batch of a file of `write_batches`."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(number)
