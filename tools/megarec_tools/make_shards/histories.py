"""The second pass: the events of a bucket of users are sorted, split, counted, and laid aside as plain columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from megarec.base.jagged import segment_positions
from megarec_tools.make_shards.log.layout import Layout
from megarec_tools.make_shards.partition import read_batch
from megarec_tools.make_shards.split import SplitRule, UserSplit
from megarec_tools.make_shards.vocabularies import coarse_numbers

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class BucketTask:
    """One bucket of the partitions in `spills`; the sorted columns go to the folder `bucket`."""

    number: int
    spills: Sequence[Path]
    layout: Layout
    rule: SplitRule
    drop_duplicates: bool
    bucket: Path


@dataclass(frozen=True, kw_only=True)
class BucketResult:
    """What was counted in one bucket.

    Attributes:
        counts: by name: events, users, targets and so on; buckets add up.
        num_train_users: users that are trained on.
        num_eval_users: users with a target.
        num_eval_only_users: users with a target that are not trained on.
        values: per vocabulary: `raw`, and its events in `train`, `catalog` and `target`; the item's also
            `first_seen` and `last_seen` in seconds.
        item_side: per item-side field: `raw` item, the field's ids in `slot0`..., and the `time` of the first event.
        numbers: per field with quantiles: `value` and its number of train events.
        time_range: first and last time in seconds.
    """

    counts: dict[str, int]
    num_train_users: int
    num_eval_users: int
    num_eval_only_users: int
    values: dict[str, pl.DataFrame]
    item_side: dict[str, pl.DataFrame]
    numbers: dict[str, pl.DataFrame]
    time_range: tuple[int, int] | None


def build_bucket(task: BucketTask) -> BucketResult:
    """Runs one task."""
    batches = [read_batch(path, task.number) for path in task.spills]
    frame = pl.DataFrame(pl.from_arrow(pa.Table.from_batches(batches)))
    frame = frame.sort("hash", "user", "time", maintain_order=True)  # the order of the log decides between equals
    repeated = _find_duplicates(frame) if task.layout.schema.timestamp is not None else np.zeros(len(frame), np.bool_)
    if task.drop_duplicates:
        frame = frame.filter(~repeated)
    starts = _user_starts(frame)
    lengths = np.diff(np.append(starts, len(frame)))
    times = frame["time"].to_numpy()
    split = task.rule.apply(frame["hash"].to_numpy()[starts], lengths, times)
    position = segment_positions(lengths)
    history = position < np.repeat(split.num_history, lengths)
    train = history & np.repeat(split.trained_on, lengths)
    target = position >= np.repeat(lengths - split.num_targets, lengths)
    marks = {
        "train": train,
        "target": target,
        "catalog": train if task.rule.catalog_is_train_only else np.ones_like(train),
    }
    codes, dictionaries = _encode(frame, task.layout.vocabulary_slots)
    _write_bucket(task, frame, codes=codes, dictionaries=dictionaries, starts=starts, split=split)
    return BucketResult(
        counts={
            "events": len(frame),
            "duplicates": int(repeated.sum()),
            "one_event_users": int((lengths == 1).sum()),
            "train_events": int(train.sum()),
            "targets": int(target.sum()),
            "eval_history_events": int(split.num_history[split.num_targets > 0].sum()),
            "gap_events": int((~history & ~target).sum()),
            "users_without_target": int((split.num_targets == 0).sum()),
            "eval_users_without_history": int(((split.num_targets > 0) & (split.num_history == 0)).sum()),
        },
        num_train_users=int(split.trained_on.sum()),
        num_eval_users=int((split.num_targets > 0).sum()),
        num_eval_only_users=int(((split.num_targets > 0) & ~split.trained_on).sum()),
        values={
            name: _count_values(name, dictionaries[name], codes=codes[name], marks=marks, times=times) for name in codes
        },
        item_side=_item_side(
            task.layout, frame, codes=codes, dictionaries=dictionaries, catalog=marks["catalog"], times=times
        ),
        numbers=_numbers(task.layout, frame, train=train),
        time_range=(int(times.min()) // 1_000_000, int(times.max()) // 1_000_000) if len(times) else None,
    )


def _user_starts(frame: pl.DataFrame) -> npt.NDArray[np.int64]:
    user = frame["user"]
    return np.flatnonzero((user != user.shift(1)).fill_null(True).to_numpy())


def _find_duplicates(frame: pl.DataFrame) -> Mask:
    """Rows that repeat an earlier one in every column."""
    user, time = frame["user"], frame["time"]
    tied = ((user == user.shift(1)) & (time == time.shift(1))).fill_null(False).to_numpy()
    if not tied.any():
        return tied
    tied[:-1] |= tied[1:].copy()
    repeated = np.zeros(len(frame), np.bool_)
    at = np.flatnonzero(tied)
    repeated[at] = ~frame[at].select(pl.struct(pl.all()).is_first_distinct()).to_series().to_numpy()
    return repeated


def _encode(
    frame: pl.DataFrame, slots: dict[str, list[str]]
) -> tuple[dict[str, npt.NDArray[np.int32]], dict[str, pl.Series]]:
    """Codes `[T]` or `[T, slots]` into the distinct values of each vocabulary; -1 where nothing is."""
    codes, dictionaries = {}, {}
    for name, columns in slots.items():
        joined = (
            pl.concat([frame[column].alias("raw") for column in columns]) if len(columns) > 1 else frame[columns[0]]
        )
        coded = pa.array(joined.to_arrow()).dictionary_encode()
        flat = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
        codes[name] = flat if len(columns) == 1 else np.ascontiguousarray(flat.reshape(len(columns), -1).T)
        dictionaries[name] = pl.Series("raw", pl.from_arrow(coded.dictionary), dtype=joined.dtype)
    return codes, dictionaries


def _count_values(
    name: str, dictionary: pl.Series, *, codes: Array, marks: dict[str, Mask], times: npt.NDArray[np.int64]
) -> pl.DataFrame:
    columns = [dictionary]
    for mark, mask in marks.items():
        marked = codes[mask].ravel()
        columns.append(pl.Series(mark, np.bincount(marked[marked >= 0], minlength=len(dictionary))))
    if name == "item":
        first = np.full(len(dictionary), np.iinfo(np.int64).max)
        last = np.full(len(dictionary), np.iinfo(np.int64).min)
        at, seconds = codes[marks["catalog"]], times[marks["catalog"]] // 1_000_000
        np.minimum.at(first, at, seconds)
        np.maximum.at(last, at, seconds)
        columns += [pl.Series("first_seen", first), pl.Series("last_seen", last)]
    return pl.DataFrame(columns)


def _item_side(
    layout: Layout,
    frame: pl.DataFrame,
    *,
    codes: dict[str, npt.NDArray[np.int32]],
    dictionaries: dict[str, pl.Series],
    catalog: Mask,
    times: npt.NDArray[np.int64],
) -> dict[str, pl.DataFrame]:
    """The distinct values of every item in each item-side field; of vocabularies the raw value."""
    side = {}
    for name, field in layout.schema.log_fields().items():
        if field.role != "item_side":
            continue
        if name in codes:
            matrix = codes[name].reshape(len(times), -1)
            slots = {f"slot{slot}": pl.Series(matrix[:, slot]) for slot in range(matrix.shape[1])}
            present = catalog & (matrix[:, 0] >= 0)
        else:
            slots = {"slot0": frame[name]}
            present = catalog & frame[name].is_not_null().to_numpy()
        pairs = pl.DataFrame({"item": codes["item"], "time": times, **slots}).filter(pl.Series(present))
        pairs = pairs.group_by("item", *slots).agg(pl.col("time").min())
        decoded = {"item": _decode(dictionaries["item"], pairs["item"])}
        if name in codes:
            decoded |= {slot: _decode(dictionaries[name], pairs[slot]) for slot in slots}
        side[name] = pairs.with_columns(**decoded)
    return side


def _decode(dictionary: pl.Series, codes: pl.Series) -> pl.Series:
    return dictionary.gather(codes.set(codes < 0, None).cast(pl.Int64))  # type: ignore[arg-type]


def _numbers(layout: Layout, frame: pl.DataFrame, *, train: Mask) -> dict[str, pl.DataFrame]:
    numbers = {}
    for name, field in layout.schema.log_fields().items():
        if field.num_quantiles:
            values = frame[name].filter(pl.Series(train)).drop_nulls().to_numpy()
            distinct, counts = np.unique(coarse_numbers(values), return_counts=True)
            numbers[name] = pl.DataFrame({"value": distinct, "train": counts})
    return numbers


def _write_bucket(
    task: BucketTask,
    frame: pl.DataFrame,
    *,
    codes: dict[str, npt.NDArray[np.int32]],
    dictionaries: dict[str, pl.Series],
    starts: npt.NDArray[np.int64],
    split: UserSplit,
) -> None:
    task.bucket.mkdir()
    events: dict[str, Array] = {"timestamp": frame["time"].to_numpy() // 1_000_000}
    for name, code in codes.items():
        if name == "item" or task.layout.schema.fields[name].role != "item_side":
            matrix = code.reshape(len(frame), -1)
            events |= {f"{name}/{slot}": np.ascontiguousarray(matrix[:, slot]) for slot in range(matrix.shape[1])}
    for name, field in task.layout.schema.log_fields().items():
        if name not in codes and field.role != "item_side":
            events[f"{name}/0"] = frame[name].fill_null(np.nan if field.kind == "numeric" else 0).to_numpy()
    write_columns(task.bucket / "events.arrow", pa.table(events))
    users = {
        "start": starts,
        "num_history": split.num_history,
        "num_targets": split.num_targets,
        "length": np.diff(np.append(starts, len(frame))),
        "trained_on": split.trained_on.astype(np.uint8),
    }
    write_columns(task.bucket / "users.arrow", pa.table(users))
    write_columns(task.bucket / "raw_users.arrow", frame[starts].select("user").to_arrow())
    for name, dictionary in dictionaries.items():
        write_columns(task.bucket / f"raw_{name}.arrow", pl.DataFrame([dictionary]).to_arrow())


def write_columns(path: Path, table: pa.Table) -> None:
    """Writes a table such that `read_columns` maps it without a copy."""
    whole = table.combine_chunks()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, whole.schema) as writer:
        writer.write_table(whole)


def read_columns(path: Path) -> pa.Table:
    """The table of a file of `write_columns`, mapped into memory."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all().combine_chunks()
