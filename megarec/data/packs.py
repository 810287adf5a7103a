"""Packs: a fixed number of events that hold several windows of histories end to end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megarec.base.jagged import Int64, gather_indices, lengths_to_offsets, segment_positions
from megarec.data.block import Array, Block

Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Pack:
    """The unit of training work: T events, always the same T, of B windows end to end and a dead tail.

    What happens next is made here, before anything is sliced over ranks: `next_fields[name][t]` is what
    `fields[name]` is for the same user's next event, wherever that event is.

    Attributes:
        lane: the lane that served it.
        number: how many packs the lane served before, since the start of training: with `lane` it keys all randomness.
        epoch: the lane's epoch.
        cu_seqlens: where each window begins, in events, `[B + 1]`; everything from `cu_seqlens[-1]` on is dead.
        user: user index of each window, `[B]`.
        num_candidates: how many events at the end of each window are candidates, `[B]`.
        position: the event's place in its window, from 0, `[T]`; 0 when dead. All candidates of a window have the place
            behind its history.
        timestamp: the event's time in seconds, `[T]`; 0 when dead or without timestamps.
        next_timestamp: the next event's time, which is when the question about it is asked, `[T]`; a live event without
            a target has its own.
        fields: ids of the item and of each context and feedback field, `[T]` or `[T, slots]`; -1 when dead, and in
            unused slots. Item-side ids follow from the item: `Dataset.item_side`.
        next_fields: the same of the next event; -1 without a target.
        has_target: whether the next event is to be predicted, `[T]`.
    """

    lane: int
    number: int
    epoch: int
    cu_seqlens: Int64
    user: Int64
    num_candidates: Int64
    position: Int32
    timestamp: Int64
    next_timestamp: Int64
    fields: dict[str, Int32]
    next_fields: dict[str, Int32]
    has_target: Bool


@dataclass(frozen=True, kw_only=True)
class PackRule:
    """How histories become windows and windows packs.

    Attributes:
        num_events: events of a pack.
        max_targets: the most targets of a window.
        stride: 0: one window per history, its newest events. N: windows whose ends are N targets apart, the newest at
            the history's end; together they hold every target.
        keep_last_event: whether a window's last event, which has no target, takes part.
        prefix_events: room that a window needs besides its events.
        candidates: how many events at the end of a window are candidates, or all but its first in a shorter one; a
            stride of as many makes a candidate of each target.
    """

    num_events: int
    max_targets: int
    stride: int
    keep_last_event: bool
    prefix_events: int = 0
    candidates: int = 0


@dataclass(frozen=True, kw_only=True)
class Windows:
    """n windows onto the rows of `columns`; a window with k targets covers k + 1 rows.

    Attributes:
        reference: (epoch, block, user within the block, window of that user counted from the newest), `[n, 4]`.
        user: user index, `[n]`.
        start: first row, `[n]`.
        num_targets: at least 1, `[n]`.
        columns: ids per field and `timestamp`, in the types they are stored in.
    """

    reference: Int64
    user: Int64
    start: Int64
    num_targets: Int64
    columns: dict[str, Array]

    def take(self, index: Int64) -> "Windows":
        """The windows `index`, in that order, with a copy of their rows alone."""
        num_rows = self.num_targets[index] + 1
        rows = gather_indices(self.start[index], num_rows)
        return Windows(
            reference=self.reference[index],
            user=self.user[index],
            start=lengths_to_offsets(num_rows)[:-1],
            num_targets=self.num_targets[index],
            columns={name: column[rows] for name, column in self.columns.items()},
        )


def concatenate_windows(parts: Sequence[Windows]) -> Windows:
    """The windows of all `parts`, in order."""
    first_row = lengths_to_offsets(np.array([len(part.columns["item"]) for part in parts]))
    return Windows(
        reference=np.concatenate([part.reference for part in parts]),
        user=np.concatenate([part.user for part in parts]),
        start=np.concatenate([part.start + row for part, row in zip(parts, first_row[:-1], strict=True)]),
        num_targets=np.concatenate([part.num_targets for part in parts]),
        columns={name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
    )


def cut_windows(block: Block, *, epoch: int, number: int, rule: PackRule) -> tuple[Windows, dict[str, int]]:
    """The windows of block `number`, by user and then from the newest, and what was counted on the way.

    Args:
        block: as `epoch` reads it.
        epoch: part of the windows' references, as `number` is.
        number: of the block.
        rule: how long windows are.

    Returns:
        The windows, and the numbers of `histories`, `short_histories` (fewer than two events: nothing to predict),
        `events`, `dropped_events` (older than what the windows hold) and `windows`.
    """
    num_events = np.diff(block.offsets)
    num_targets = np.maximum(num_events - 1, 0)
    older = np.maximum(num_targets - rule.max_targets, 0)
    num_windows = np.minimum(num_targets, 1)
    if rule.stride:
        asked_by_newest = max(rule.candidates, rule.stride) if rule.candidates else rule.max_targets
        num_left = np.maximum(num_targets - asked_by_newest, 0)
        num_windows += -(-num_left // rule.stride)
    owner = np.repeat(np.arange(len(num_events)), num_windows)
    window = segment_positions(num_windows)
    end = num_targets[owner] - window * rule.stride
    begin = np.maximum(end - rule.max_targets, 0)
    windows = Windows(
        reference=np.stack([np.full_like(owner, epoch), np.full_like(owner, number), owner, window], axis=1),
        user=block.user[owner],
        start=block.offsets[owner] + begin,
        num_targets=end - begin,
        columns=block.columns,
    )
    counts = {
        "histories": len(num_events),
        "short_histories": int((num_events < 2).sum()),
        "events": int(block.offsets[-1]),
        "dropped_events": 0 if rule.stride else int(older.sum()),
        "windows": len(owner),
    }
    return windows, counts


def make_pack(windows: Windows, members: Int64, *, rule: PackRule, lane: int, number: int, epoch: int) -> Pack:
    """The pack that holds the windows `members`, in that order."""
    num_targets = windows.num_targets[members]
    lengths = num_targets + rule.keep_last_event
    cu_seqlens = lengths_to_offsets(lengths)
    place = segment_positions(lengths)
    row = place + np.repeat(windows.start[members], lengths)
    num_candidates = np.minimum(rule.candidates, num_targets)
    position = np.minimum(place, np.repeat(lengths - num_candidates, lengths))
    last = cu_seqlens[1:] - 1
    has_target = np.ones(len(row), dtype=np.bool_)
    has_target[last] = not rule.keep_last_event
    fields, next_fields = {}, {}
    for name, column in windows.columns.items():
        if name != "timestamp":
            fields[name] = _padded(column.take(row, axis=0), num_events=rule.num_events, dtype=np.int32, dead=-1)
            after = -1 if rule.keep_last_event else column[row[last] + 1]
            next_fields[name] = _shifted(fields[name], last=last, after=after)
    time = windows.columns["timestamp"]
    timestamp = _padded(time[row], num_events=rule.num_events, dtype=np.int64, dead=0)
    return Pack(
        lane=lane,
        number=number,
        epoch=epoch,
        cu_seqlens=cu_seqlens,
        user=windows.user[members],
        num_candidates=num_candidates,
        position=_padded(position, num_events=rule.num_events, dtype=np.int32, dead=0),
        timestamp=timestamp,
        next_timestamp=_shifted(timestamp, last=last, after=time[row[last] + (not rule.keep_last_event)]),
        fields=fields,
        next_fields=next_fields,
        has_target=_padded(has_target, num_events=rule.num_events, dtype=np.bool_, dead=False),
    )


def _padded(values: Array, *, num_events: int, dtype: npt.DTypeLike, dead: int) -> Array:
    padded = np.full((num_events, *values.shape[1:]), dead, dtype=dtype)
    padded[: len(values)] = values
    return padded


def _shifted(values: Array, *, last: Int64, after: Array | int) -> Array:
    """Each event's `values` one place earlier; `after` for the `last` event of each window; the tail stays dead."""
    shifted = np.empty_like(values)
    shifted[:-1] = values[1:]
    shifted[-1] = values[-1]
    shifted[last] = after
    return shifted
