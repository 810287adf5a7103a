"""Which events of a user are history and which are targets."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megarec.base.errors import UserError
from megarec.base.jagged import Int64, lengths_to_offsets
from megarec.base.random import derive_key, uniform_numpy
from megarec.data.values import parse_time
from megarec_tools.make_shards.config import SplitConfig


@dataclass(frozen=True, kw_only=True)
class UserSplit:
    """Per user: the first `num_history` events are history, the last `num_targets` are targets, others are neither."""

    num_history: Int64
    num_targets: Int64
    trained_on: npt.NDArray[np.bool_]


class SplitRule:
    """A split with its numbers resolved.

    Args:
        config: the settings.
        seed: of who is held out.

    Raises:
        UserError: the cut is not a time.
    """

    def __init__(self, config: SplitConfig, *, seed: int) -> None:
        self.config = config
        self.cut_us = _parse_cut(config.cut) if config.cut is not None else None
        self._key = derive_key(seed, "user holdout")

    @property
    def catalog_is_train_only(self) -> bool:
        """Whether vocabularies come from train events alone; otherwise they hold every item of the log."""
        return self.config.rule == "global_time"

    @property
    def query_time(self) -> int | None:
        """The time of every question in seconds; None when it is that of the user's first target."""
        return None if self.cut_us is None else self.cut_us // 1_000_000

    def apply(self, hashes: npt.NDArray[np.uint64], lengths: Int64, times: Int64) -> UserSplit:
        """Splits users whose sorted events lie end to end.

        Args:
            hashes: of each user, `[B]`.
            lengths: events of each user, at least 1, `[B]`.
            times: of the events, in microseconds, `[T]`.
        """
        if self.cut_us is not None:
            starts = lengths_to_offsets(lengths)[:-1]
            before = times < self.cut_us - round(self.config.gap * 1_000_000)
            num_history = np.add.reduceat(before, starts, dtype=np.int64) if len(lengths) else lengths
            num_targets = np.add.reduceat(times >= self.cut_us, starts, dtype=np.int64) if len(lengths) else lengths
            return UserSplit(num_history=num_history, num_targets=num_targets, trained_on=num_history > 0)
        asked = lengths >= 2
        if self.config.rule == "user_holdout":
            asked &= uniform_numpy(self._key, hashes) < self.config.fraction  # type: ignore[arg-type]
        trained_on = ~asked if self.config.rule == "user_holdout" else np.ones(len(lengths), np.bool_)
        targets = asked.astype(np.int64)
        return UserSplit(num_history=lengths - targets, num_targets=targets, trained_on=trained_on)

    def describe(self) -> dict[str, Any]:
        """The rule and its numbers, for `dataset.json`."""
        if self.cut_us is not None:
            return {"rule": self.config.rule, "cut": self.cut_us / 1_000_000, "gap": self.config.gap}
        if self.config.rule == "user_holdout":
            return {"rule": self.config.rule, "fraction": self.config.fraction}
        return {"rule": self.config.rule}


def _parse_cut(text: str) -> int:
    try:
        cut = round(float(text) * 1_000_000)
    except (ValueError, OverflowError):
        moment = parse_time(text)
        if moment is None:
            fix = "Give seconds since 1970 or text such as 2024-05-01T00:00:00Z"
            raise UserError(f"'{text}' is not a time", where="split.cut", fix=fix) from None
        cut = moment
    return cut
