"""Between the passes: what the buckets counted becomes vocabularies, bins and the table of items."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from megarec.base.errors import UserError
from megarec.data.dataset import FieldInfo
from megarec.data.schema import FieldSchema

MERGE_ROWS = 4_000_000
MAX_IDS = 1 << 31
_SUMS = ("train", "catalog", "target")

# Quantiles are found from numbers cut to 16 bits behind the point: exact for integers below 131,072, five digits else.
_KEY_MASK = np.uint64(0xFFFF_FFFF_FFFF_FFFF << 36 & 0xFFFF_FFFF_FFFF_FFFF)


class Totals:
    """Adds up frames of distinct values, holding little more than the distinct values of all of them.

    Args:
        keys: the columns that tell values apart; the others are added up, or the least or greatest is kept.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = list(keys)
        self._frames: list[pl.DataFrame] = []
        self._num_rows = 0

    def add(self, frame: pl.DataFrame) -> None:
        """Adds the rows of `frame`."""
        self._frames.append(frame)
        self._num_rows += len(frame)
        if self._num_rows > MERGE_ROWS and len(self._frames) > 1:
            self._frames = [self.result()]
            self._num_rows = len(self._frames[0]) // 2  # doubles before the next merge

    def result(self) -> pl.DataFrame:
        """One row per value, in no particular order."""
        frame = pl.concat(self._frames)
        least = [pl.col(c).min() for c in ("first_seen", "time") if c in frame.columns]
        greatest = [pl.col(c).max() for c in ("last_seen",) if c in frame.columns]
        sums = [pl.col(c).sum() for c in _SUMS if c in frame.columns]
        return frame.group_by(self._keys).agg(*sums, *least, *greatest)


def make_vocabulary(totals: pl.DataFrame, *, min_count: int, unsigned: bool, name: str) -> pl.DataFrame:
    """`id` from 1 by falling number of train events, equal ones by value; `raw`, `count` and what else was counted.

    Args:
        totals: `raw`, `train`, `catalog` and more, one row per value.
        min_count: values with fewer catalog events get no id.
        unsigned: whether negative values stand for those of 2^63 and more.
        name: of the field, for messages.
    """
    known = totals.filter(pl.col("raw").is_not_null() & (pl.col("catalog") >= max(1, min_count)))
    if len(known) >= MAX_IDS - 1:
        raise UserError(f"'{name}' has {len(known)} values, more than 32-bit ids", fix="Raise min_item_count")
    value = pl.col("raw").reinterpret(signed=False) if unsigned else pl.col("raw")
    ordered = known.sort(pl.col("train"), value, descending=[True, False])
    ids = pl.Series("id", np.arange(1, len(ordered) + 1, dtype=np.int32))
    return ordered.insert_column(0, ids).rename({"train": "count"}).drop("catalog", "target")


def coarse_numbers(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The numbers that quantiles are found from: few enough to count, five digits of each."""
    return (values.view(np.uint64) & _KEY_MASK).view(np.float64)


def find_edges(totals: pl.DataFrame, num_quantiles: int) -> tuple[float, ...]:
    """The values at rank floor(j n / num_quantiles) of n sorted train values, each once, without the smallest."""
    ordered = totals.filter(pl.col("train") > 0).sort("value")
    values, ends = ordered["value"].to_numpy(), np.cumsum(ordered["train"].to_numpy())
    if not len(values):
        return ()
    ranks = np.arange(1, num_quantiles, dtype=np.int64) * int(ends[-1]) // num_quantiles
    edges = np.unique(values[np.searchsorted(ends, ranks, side="right")])
    return tuple(float(edge) for edge in edges if edge > values[0])


def bin_ids(values: npt.NDArray[np.floating], edges: Sequence[float]) -> npt.NDArray[np.int32]:
    """1 + the number of edges below or at each value; 0 for a missing value."""
    ids = np.searchsorted(np.asarray(edges, np.float64), values, side="right").astype(np.int32) + 1
    ids[np.isnan(values)] = 0
    return ids


def map_raw(raw: pl.Series, vocabulary: pl.DataFrame) -> npt.NDArray[np.int32]:
    """The id of each raw value; 0 of one that the vocabulary lacks."""
    joined = pl.DataFrame([raw.alias("raw")]).join(
        vocabulary.select("raw", "id"), on="raw", how="left", maintain_order="left"
    )
    return joined["id"].fill_null(0).to_numpy().astype(np.int32, copy=False)


def first_values(totals: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """One row per item: its earliest value, of equal times the lowest. And how many items had more than one value."""
    slots = [c for c in totals.columns if c.startswith("slot")]
    ordered = totals.sort("item", "time", *slots, nulls_last=True)
    first = ordered.unique("item", keep="first", maintain_order=True)
    return first, int((ordered.group_by("item").len()["len"] > 1).sum())


def count_values(first: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """The values of one item-side field as if each event of an item had them: `raw`, `train`, `catalog`, `target`.

    Args:
        first: the values of each item, of `first_values`.
        items: the vocabulary of the items; every one of them counts once in `catalog`.
    """
    joined = first.join(items.select("raw", "count"), left_on="item", right_on="raw")
    slots = [joined.select(pl.col(c).alias("raw"), train="count") for c in joined.columns if c.startswith("slot")]
    counted = pl.concat(slots).drop_nulls("raw").group_by("raw")
    return counted.agg(pl.col("train").sum(), pl.len().cast(pl.Int64).alias("catalog"), pl.lit(0).alias("target"))


def item_side_ids(
    first: pl.DataFrame, field: FieldSchema, *, info: FieldInfo, items: pl.DataFrame, vocabulary: pl.DataFrame | None
) -> pa.Array:
    """The ids of one item-side field in the order of the items, from the value of each item (`first_values`)."""
    joined = items.select("raw").join(first, left_on="raw", right_on="item", how="left", maintain_order="left")
    columns = []
    for slot in (c for c in first.columns if c.startswith("slot")):
        values = joined[slot]
        if vocabulary is not None:
            ids = map_raw(values, vocabulary)
        elif field.kind == "numeric":
            ids = bin_ids(values.fill_null(np.nan).to_numpy(), info.edges)
        else:
            ids = values.fill_null(0).to_numpy().astype(np.int32)
        if info.slots > 1:
            ids = np.where(values.is_null().to_numpy(), np.int32(-1), ids)
        columns.append(ids)
    if info.slots == 1:
        return pa.array(columns[0], pa.int32())
    flat = pa.array(np.stack(columns, axis=1).ravel().astype(np.int32))
    return pa.FixedSizeListArray.from_arrays(flat, info.slots)
