"""What the user reads at the end, and what stops the work: rejected rows and the table of counts."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from megarec.base.errors import UserError

EARLY_ROWS = 100_000
COUNTS = {
    "rows": "rows read",
    "rows_filtered": "rows left out by the schema's keep",
    "rows_rejected": "rows rejected",
    "item_rows": "rows of item files read",
    "item_rows_rejected": "rows of item files rejected",
    "user_rows": "rows of user files read",
    "user_rows_rejected": "rows of user files rejected",
    "absent_fields": "item-side fields left out: in no file",
    "absent_user_fields": "user fields left out: in no file",
    "duplicates": "rows that repeat another",
    "rare_events": "events of rare items dropped",
    "short_events": "events of users with too few dropped",
    "dropped_users": "users dropped",
    "users": "users",
    "one_event_users": "users of one event",
    "users_undescribed": "users that no user file describes",
    "items": "items",
    "items_added": "items that only item files have",
    "items_undescribed": "items that no item file has",
    "events": "events",
    "tied_events": "events at the time of the user's event before",
    "train_users": "train users",
    "train_events": "train events",
    "gap_events": "events in the gap, unused",
    "valid_users": "valid users",
    "valid_targets": "valid targets",
    "eval_users": "eval users",
    "eval_history_events": "events in their histories",
    "eval_users_without_history": "eval users without history",
    "users_without_target": "users without a target",
    "targets": "eval targets",
    "targets_unseen": "eval targets whose item is unseen in train",
    "items_unseen": "items unseen in train",
    "item_side_conflicts": "items with several values of an item-side field",
    "user_conflicts": "users with several values of a user field",
}
_ALWAYS = ("rows", "rows_rejected", "duplicates", "users", "one_event_users", "items", "events", "items_unseen")


class RejectedRows:
    """Collects rejected rows over the pieces of a log, and stops when they are too many.

    Args:
        paths: the files of the log.
        max_share: the share of rows that may be rejected.
    """

    def __init__(self, paths: Sequence[Path], max_share: float) -> None:
        self._paths = [str(path) for path in paths]
        self._max_share = max_share
        self._frames: list[pl.DataFrame] = []
        self._first: tuple[int, int, str, str] | None = None
        self._rows_of_file: dict[int, int] = {}
        self.by_reason: dict[str, int] = {}
        self.num_rows = 0

    @property
    def num_rejected(self) -> int:
        """Rows rejected so far."""
        return sum(self.by_reason.values())

    def add(self, rejects: pl.DataFrame, *, file: int, num_rows: int, num_file_rows: int | None = None) -> None:
        """Adds the next piece of a file.

        Args:
            rejects: what of it was rejected, by the row of the piece.
            file: index of the file.
            num_rows: how much was read.
            num_file_rows: how many rows the piece has, if that is not the same.
        """
        before = self._rows_of_file.get(file, 0)
        self._rows_of_file[file] = before + (num_rows if num_file_rows is None else num_file_rows)
        self.num_rows += num_rows
        if len(rejects):
            ordered = rejects.sort("row").with_columns(pl.col("row") + before)
            for reason, count in ordered.group_by("reason").len().sort("reason").iter_rows():
                self.by_reason[reason] = self.by_reason.get(reason, 0) + count
            if self._first is None:
                row, reason, value = ordered.row(0)
                self._first = (file, row, reason, value or "")
            name = pl.lit(self._paths[file]).cast(pl.Categorical)
            self._frames.append(ordered.select(name.alias("file"), "row", pl.col("reason").cast(pl.Categorical)))
        if self.num_rows >= EARLY_ROWS and self.num_rejected > max(self._max_share, 0.5) * self.num_rows:
            self.refuse()  # more than half are bad: no need to read the rest

    def check(self) -> None:
        """Raises `UserError` when too many of all rows were rejected."""
        if self.num_rejected > self._max_share * self.num_rows:
            self.refuse()

    def refuse(self) -> None:
        """Raises `UserError` with the counts by reason and the first example."""
        assert self._first is not None
        file, row, reason, value = self._first
        counts = ", ".join(f"{count} x {why}" for why, count in sorted(self.by_reason.items(), key=lambda x: -x[1]))
        what = (
            f"{self.num_rejected} of {self.num_rows} rows cannot be used ({counts}). "
            f"First: row {row} of {self._paths[file]}, {reason}: {value!r}"
        )
        raise UserError(what, fix=f"Mend the file, or allow more than max_rejects={self._max_share:g}")

    def frame(self) -> pl.DataFrame:
        """`file`, `row` (from 1, the header not counted) and `reason` of every rejected row."""
        empty = pl.DataFrame(schema={"file": pl.String, "row": pl.Int64, "reason": pl.String})
        texts = [f.with_columns(pl.col("file", "reason").cast(pl.String)) for f in self._frames]
        return pl.concat([empty, *texts])


def format_table(counts: dict[str, int], reasons: dict[str, dict[str, int]]) -> str:
    """The counts as aligned lines; zeros that say nothing are left out.

    Args:
        counts: by the keys of `COUNTS`.
        reasons: by the key of a count: the parts of it, which stand below it.
    """
    lines: list[tuple[str, int]] = []
    for key, title in COUNTS.items():
        if counts[key] or key in _ALWAYS:
            lines.append((title, counts[key]))
        parts = sorted(reasons.get(key, {}).items(), key=lambda x: -x[1])
        lines += [(f"  {reason}", count) for reason, count in parts]
    width = max(len(title) for title, _ in lines)
    return "\n".join(f"{title:<{width}}  {count:>14,}" for title, count in lines)
