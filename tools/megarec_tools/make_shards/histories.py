"""The second pass: the events of a bucket of users are sorted, split, counted, and laid aside as plain columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from megarec.base.jagged import Int64, segment_positions
from megarec.base.random import hash_numpy
from megarec.data.dataset import Split
from megarec_tools.make_shards.log.layout import Layout, slot_columns
from megarec_tools.make_shards.partition import read_batch
from megarec_tools.make_shards.split import SplitRule, UserSplit, may_be_validated
from megarec_tools.make_shards.vocabularies import coarse_numbers

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class BucketTask:
    """One bucket of the partitions in `spills`; the sorted columns go to the folder `bucket`.

    What the bucket's rows of user files in `user_spills` say of a user stands in each of the user's events.
    Events of the items in the file `rare_items`, and users with fewer than `min_user_events`, are dropped. With a
    `shuffle_key`, the events of a user that have the same time are shuffled.
    """

    number: int
    spills: Sequence[Path]
    user_spills: Sequence[Path]
    layout: Layout
    rule: SplitRule
    drop_duplicates: bool
    shuffle_key: int | None
    min_user_events: int
    rare_items: Path | None
    bucket: Path


@dataclass(frozen=True, kw_only=True)
class BucketResult:
    """What was counted in one bucket.

    Attributes:
        counts: by name: events, users, targets and so on; buckets add up.
        num_users: of each split.
        num_untrained_users: users with a target that are not trained on.
        values: per vocabulary: `raw`, and its events in `train`, `catalog` and `target`; the item's also
            `first_seen` and `last_seen` in seconds.
        item_side: per item-side field: `raw` item, the field's ids in `slot0`..., and the `time` of the first event.
        numbers: per field with quantiles: `value` and its number of train events.
        time_range: first and last time in seconds.
    """

    counts: dict[str, int]
    num_users: dict[Split, int]
    num_untrained_users: int
    values: dict[str, pl.DataFrame]
    item_side: dict[str, pl.DataFrame]
    numbers: dict[str, pl.DataFrame]
    time_range: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class _Users:
    """The events of a bucket by user and time, and what is no longer among them.

    Users whose events are too few without rare items are `short`: of them only the items count, as in Meta's public
    preprocessing of Amazon Books, whose catalog they are part of (generative_recommenders, AmazonDataProcessor).
    """

    frame: pl.DataFrame
    starts: Int64
    lengths: Int64
    short: Mask
    dropped: dict[str, int]


def validation_candidates(task: BucketTask) -> npt.NDArray[np.uint64]:
    """The hashes of the bucket's users who can have a second target, ascending."""
    users = _read_users(task)
    return users.frame["hash"].to_numpy()[users.starts[may_be_validated(users.lengths) & ~users.short]]


def build_bucket(task: BucketTask) -> BucketResult:
    """Runs one task."""
    users = _read_users(task)
    lengths = users.lengths
    frame, num_rows, num_conflicts = _describe_users(users, task)
    times = frame["time"].to_numpy()
    split = task.rule.apply(frame["hash"].to_numpy()[users.starts], lengths, times)
    for part in split.values():
        part.num_history[users.short] = 0
        part.num_targets[users.short] = 0
    history = {name: _mask(lengths, part.num_history) for name, part in split.items()}
    targets = {name: _mask(lengths, part.num_targets, first=part.first_target) for name, part in split.items()}
    train = history["train"]
    marks = {
        "train": train,
        "target": targets["eval"],
        "catalog": train if task.rule.catalog_is_train_only else np.ones_like(train),
    }
    kept = np.repeat(~users.short, lengths)
    used = np.logical_or.reduce([*history.values(), *targets.values()])
    asked = {name: part.num_targets > 0 for name, part in split.items()}
    only_asked = np.logical_or.reduce(list(asked.values())) & (split["train"].num_history == 0)
    counted = only_asked | (split["train"].num_history > 0)
    codes, dictionaries = _encode(frame, task.layout.vocabulary_slots)
    _write_bucket(
        task, frame, codes=codes, dictionaries=dictionaries, starts=users.starts, split=split, only_asked=only_asked
    )
    valid = split.get("valid")
    return BucketResult(
        counts={
            **users.dropped,
            "events": int(kept.sum()),
            "tied_events": int((kept & _tied(frame)).sum()) if task.layout.schema.timestamp is not None else 0,
            "one_event_users": int(((lengths == 1) & ~users.short).sum()),
            "users_undescribed": int((counted & (num_rows == 0)).sum()) if task.layout.schema.users else 0,
            "user_conflicts": int(num_conflicts[counted].sum()),
            "train_events": int(train.sum()),
            "valid_targets": int(valid.num_targets.sum()) if valid else 0,
            "targets": int(targets["eval"].sum()),
            "eval_history_events": int(split["eval"].num_history[asked["eval"]].sum()),
            "gap_events": int((kept & ~used).sum()),
            "users_without_target": int((~asked["eval"] & ~users.short).sum()),
            "eval_users_without_history": int((asked["eval"] & (split["eval"].num_history == 0)).sum()),
        },
        num_users={
            name: int((asked[name] if name != "train" else part.num_history > 0).sum()) for name, part in split.items()
        },
        num_untrained_users=int(only_asked.sum()),
        values={
            name: _count_values(name, dictionaries[name], codes=codes[name], marks=marks, times=times) for name in codes
        },
        item_side=_item_side(
            task.layout, frame, codes=codes, dictionaries=dictionaries, catalog=marks["catalog"], times=times
        ),
        numbers=_numbers(task.layout, frame, train=train),
        time_range=(int(times.min()) // 1_000_000, int(times.max()) // 1_000_000) if len(times) else None,
    )


def _read_users(task: BucketTask) -> _Users:
    batches = [read_batch(path, task.number) for path in task.spills]
    frame = pl.DataFrame(pl.from_arrow(pa.Table.from_batches(batches)))
    frame = frame.sort("hash", "user", "time", maintain_order=True)  # the order of the log decides between equals
    repeated = _find_duplicates(frame) if task.layout.schema.timestamp is not None else np.zeros(len(frame), np.bool_)
    if task.drop_duplicates:
        frame = frame.filter(~repeated)
    dropped = {"duplicates": int(repeated.sum())}
    starts, lengths = _user_slices(frame)
    if task.shuffle_key is not None:
        frame = _shuffle_equal_times(frame, lengths, key=task.shuffle_key)
    num_users, num_events = len(starts), len(frame)
    if task.min_user_events > 1:
        frame = frame.filter(np.repeat(lengths >= task.min_user_events, lengths))
    of_short_users = num_events - len(frame)
    if task.rare_items is not None:
        rare = pl.DataFrame(pl.from_arrow(read_columns(task.rare_items)))
        before = len(frame)
        frame = frame.join(rare, on="item", how="anti", maintain_order="left")
        dropped["rare_events"] = before - len(frame)
    starts, lengths = _user_slices(frame)
    short = lengths < task.min_user_events
    dropped["short_events"] = of_short_users + int(lengths[short].sum())
    dropped["dropped_users"] = num_users - int((~short).sum())
    return _Users(frame=frame, starts=starts, lengths=lengths, short=short, dropped=dropped)


def _describe_users(users: _Users, task: BucketTask) -> tuple[pl.DataFrame, Int64, Int64]:
    """The events with the fields of user files; per user, the rows these have and how many fields have several values.

    A user's value of a field is the first one of the files.
    """
    spilled = [pl.DataFrame(pl.from_arrow(read_batch(path, task.number))) for path in task.user_spills]
    table = users.frame[users.starts].select("user")
    num_rows, num_conflicts = np.zeros(len(table), np.int64), np.zeros(len(table), np.int64)
    for rows in spilled:
        num_rows += _look_up(table, rows.group_by("user").len())
    for name, field in task.layout.schema.fields_of("user").items():
        slots = slot_columns(name, field)
        given = pl.concat([rows.select("user", *slots) for rows in spilled if slots[0] in rows.columns])
        given = given.filter(pl.col(slots[0]).is_not_null())
        num_conflicts += _look_up(table, given.unique().group_by("user").len()) > 1
        first = given.unique("user", keep="first", maintain_order=True)
        table = table.join(first, on="user", how="left", maintain_order="left")
    of_user = np.repeat(np.arange(len(table)), users.lengths)
    return users.frame.hstack(table.drop("user")[of_user]), num_rows, num_conflicts


def _look_up(users: pl.DataFrame, counts: pl.DataFrame) -> Int64:
    """The count `len` of each user; 0 of those without."""
    joined = users.select("user").join(counts, on="user", how="left", maintain_order="left")
    return joined["len"].fill_null(0).to_numpy().astype(np.int64)


def _mask(lengths: Int64, num_events: Int64, *, first: Int64 | None = None) -> Mask:
    """Of every user the `num_events` events from `first` on."""
    position = segment_positions(lengths)
    if first is not None:
        position = position - np.repeat(first, lengths)
    return (position >= 0) & (position < np.repeat(num_events, lengths))


def _user_slices(frame: pl.DataFrame) -> tuple[Int64, Int64]:
    """Where each user's events begin, and how many they are."""
    user = frame["user"]
    starts = np.flatnonzero((user != user.shift(1)).fill_null(True).to_numpy())
    return starts, np.diff(np.append(starts, len(frame)))


def _shuffle_equal_times(frame: pl.DataFrame, lengths: Int64, *, key: int) -> pl.DataFrame:
    """Sorted events with those of one user and time in random order, a function of the key, the user and the log."""
    of_user = hash_numpy(key, frame["hash"].to_numpy())
    draw = pl.Series("#draw", hash_numpy(key, of_user + segment_positions(lengths).astype(np.uint64)))
    return frame.with_columns(draw).sort("hash", "user", "time", "#draw").drop("#draw")


def _tied(frame: pl.DataFrame) -> Mask:
    """Events that have the time of the user's event before."""
    user, time = frame["user"], frame["time"]
    return ((user == user.shift(1)) & (time == time.shift(1))).fill_null(False).to_numpy()


def _find_duplicates(frame: pl.DataFrame) -> Mask:
    """Rows that repeat an earlier one in every column."""
    tied = _tied(frame).copy()
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
            values = _slots(codes[name])
            slots = {f"slot{slot}": pl.Series(ids) for slot, ids in enumerate(values)}
            present = catalog & (values[0] >= 0)
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


def _slots(codes: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int32]]:
    return [codes] if codes.ndim == 1 else list(codes.T)


def _decode(dictionary: pl.Series, codes: pl.Series) -> pl.Series:
    return dictionary.gather(codes.set(codes < 0, None).cast(pl.Int64))  # type: ignore[arg-type]


def _numbers(layout: Layout, frame: pl.DataFrame, *, train: Mask) -> dict[str, pl.DataFrame]:
    numbers = {}
    for name, field in layout.schema.event_fields().items():
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
    starts: Int64,
    split: UserSplit,
    only_asked: Mask,
) -> None:
    task.bucket.mkdir()
    events: dict[str, Array] = {"timestamp": frame["time"].to_numpy() // 1_000_000}
    for name, code in codes.items():
        if name == "item" or task.layout.schema.fields[name].role != "item_side":
            events |= {f"{name}/{slot}": np.ascontiguousarray(values) for slot, values in enumerate(_slots(code))}
    for name, field in task.layout.schema.event_fields().items():
        if name not in codes and field.role != "item_side":
            events[f"{name}/0"] = frame[name].fill_null(np.nan if field.kind == "numeric" else 0).to_numpy()
    write_columns(task.bucket / "events.arrow", pa.table(events))
    users = {
        "start": starts,
        "trained_on": (split["train"].num_history > 0).astype(np.uint8),
        "only_asked": only_asked.astype(np.uint8),
    }
    for name, part in split.items():
        users |= {f"{name}/{key}": numbers for key, numbers in vars(part).items()}
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
