"""Events of many users to a few files in time order."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megarec_tools.make_log.catalog import Catalog, raw_ids
from megarec_tools.make_log.draws import Draws, Ints

LISTEN, LIKE, DISLIKE, UNLIKE, UNDISLIKE = range(5)
EVENT_TYPES = ("listen", "like", "dislike", "unlike", "undislike")
ROW_GROUP = 1 << 17
TIMESTAMP_STEP_SECONDS = 5
ROW = np.dtype(
    [("user", "<u4"), ("item", "<u4"), ("timestamp", "<u4"), ("ratio", "u1"), ("is_organic", "u1"), ("kind", "u1")]
)
EVENT_SCHEMA = pa.schema(
    [
        ("uid", pa.uint32()),
        ("item_id", pa.uint32()),
        ("timestamp", pa.uint32()),
        ("is_organic", pa.uint8()),
        ("played_ratio_pct", pa.uint16()),
        ("track_length_seconds", pa.uint32()),
        ("event_type", pa.dictionary(pa.int8(), pa.string())),
        ("artist_id", pa.uint32()),
        ("album_id", pa.uint32()),
    ]
)


def open_parquet(path: Path, schema: pa.Schema, *, repetitive: bool) -> pq.ParquetWriter:
    """A Parquet file whose bytes depend on the rows alone; text columns read back as plain text.

    Args:
        path: the file to make.
        schema: its columns.
        repetitive: columns hold few distinct values, so that dictionaries pay.
    """
    fixed = {"version": "2.6", "compression": "zstd", "compression_level": 1, "store_schema": False}
    return pq.ParquetWriter(path, schema, use_dictionary=repetitive, write_statistics=repetitive, **fixed)


def to_timestamp(time: Ints) -> Ints:
    """Seconds as the log shows them: floored, so that the order in time is only partial."""
    return time // TIMESTAMP_STEP_SECONDS * TIMESTAMP_STEP_SECONDS


class TimeBuckets:
    """Takes rows in any order of time and writes one sorted file per interval of time.

    Rows wait on disk, as bytes, in one file per interval; memory holds one interval at a time.

    Args:
        folder: where the files go.
        num_files: intervals of equal length.
        duration_seconds: what the intervals cover; later rows go to the last one.
    """

    def __init__(self, folder: Path, *, num_files: int, duration_seconds: int) -> None:
        self._waiting = [folder / f".waiting-{number:05d}" for number in range(num_files)]
        self._files = [folder / f"events-{number:05d}.parquet" for number in range(num_files)]
        self._duration_seconds = duration_seconds

    def add(self, rows: npt.NDArray[np.void]) -> None:
        """Appends rows of dtype `ROW`; rows of equal time keep the order in which they are added."""
        last = len(self._files) - 1
        bucket = np.minimum(rows["timestamp"].astype(np.int64) * len(self._files) // self._duration_seconds, last)
        order = np.argsort(bucket, kind="stable")
        ends = np.searchsorted(bucket[order], np.arange(len(self._files) + 1))
        for path, first, end in zip(self._waiting, ends[:-1], ends[1:], strict=True):
            with path.open("ab") as file:
                file.write(rows[order[first:end]].tobytes())

    def finish(self, number: int, catalog: Catalog, draws: Draws) -> tuple[Path, Ints]:
        """Writes file `number`; returns its path and how many events of each type it has."""
        rows = np.fromfile(self._waiting[number], dtype=ROW)
        rows = rows[np.argsort(rows["timestamp"], kind="stable")]
        item = rows["item"].astype(np.int64)
        explicit = rows["kind"] != LISTEN
        columns = {
            "uid": raw_ids("user", rows["user"].astype(np.int64), draws),
            "item_id": catalog.raw_item[item],
            "timestamp": rows["timestamp"],
            "is_organic": rows["is_organic"],
            "played_ratio_pct": pa.array(rows["ratio"].astype(np.uint16), mask=explicit),
            "track_length_seconds": pa.array(catalog.seconds[item].astype(np.uint32), mask=explicit),
            "event_type": pa.DictionaryArray.from_arrays(rows["kind"].astype(np.int8), list(EVENT_TYPES)),
            "artist_id": catalog.raw_artist[catalog.artist[item]],
            "album_id": catalog.raw_album[catalog.album[item]],
        }
        with open_parquet(self._files[number], EVENT_SCHEMA, repetitive=True) as file:
            file.write_table(pa.table(columns, schema=EVENT_SCHEMA), row_group_size=ROW_GROUP)
        self._waiting[number].unlink()
        return self._files[number], np.bincount(rows["kind"], minlength=len(EVENT_TYPES))
