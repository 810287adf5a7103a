"""Which events of a user are history and which are targets."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megarec.base.errors import UserError
from megarec.base.jagged import Int64, lengths_to_offsets
from megarec.base.random import derive_key, uniform_numpy
from megarec.data.dataset import SPLITS, Split
from megarec.data.values import parse_time
from megarec_tools.make_shards.config import SplitConfig


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one split takes of each user's events: the first `num_history`, and from `first_target` on the targets."""

    num_history: Int64
    first_target: Int64
    num_targets: Int64


UserSplit = dict[Split, Part]


class SplitRule:
    """A split with its numbers resolved.

    Args:
        config: the settings.
        seed: of who is held out.

    Attributes:
        splits: those that there are.
        last_validation_hash: leave_last_out: users up to this hash are validated; it is found from the log.

    Raises:
        UserError: the cut is not a time.
    """

    def __init__(self, config: SplitConfig, *, seed: int) -> None:
        self.config = config
        self.cut_us = _parse_cut(config.cut) if config.cut is not None else None
        self.last_validation_hash = np.uint64(0)
        validated = config.validation_users or config.validation
        self.splits: tuple[Split, ...] = SPLITS if validated else ("train", "eval")
        self._key = derive_key(seed, "user holdout")

    @property
    def catalog_is_train_only(self) -> bool:
        """Whether vocabularies come from train events alone; otherwise they hold every item of the log."""
        return self.config.rule == "global_time"

    def query_time(self, split: Split) -> int | None:
        """The time of every question in seconds; None when it is that of the user's first target."""
        if self.cut_us is None:
            return None
        return (self.cut_us if split == "eval" else self._validation_us) // 1_000_000

    @property
    def _gap_us(self) -> int:
        return round(self.config.gap * 1_000_000)

    @property
    def _validation_us(self) -> int:
        """global_time: where the window to tune on begins."""
        assert self.cut_us is not None
        return self.cut_us - self._gap_us - round(self.config.validation * 1_000_000)

    def apply(self, hashes: npt.NDArray[np.uint64], lengths: Int64, times: Int64) -> UserSplit:
        """Splits users whose sorted events lie end to end.

        Args:
            hashes: of each user, `[B]`.
            lengths: events of each user, at least 1, `[B]`.
            times: of the events, in microseconds, `[T]`.
        """
        if self.cut_us is not None:
            return self._by_time(lengths, times, cut_us=self.cut_us)
        asked = lengths >= 2
        if self.config.rule == "user_holdout":
            asked &= uniform_numpy(self._key, hashes) < self.config.fraction  # type: ignore[arg-type]
        history = lengths - asked
        split: UserSplit = {"eval": Part(num_history=history, first_target=history, num_targets=asked.astype(np.int64))}
        trained = history * ~asked if self.config.rule == "user_holdout" else history
        if "valid" in self.splits:
            validated = (hashes <= self.last_validation_hash) & may_be_validated(lengths)
            trained = history - validated
            split["valid"] = Part(num_history=trained, first_target=trained, num_targets=validated.astype(np.int64))
        return {"train": _only_history(trained), **split}

    def _by_time(self, lengths: Int64, times: Int64, *, cut_us: int) -> UserSplit:
        starts = lengths_to_offsets(lengths)[:-1]

        def num_before(moment_us: int) -> Int64:
            before = times < moment_us
            return np.add.reduceat(before, starts, dtype=np.int64) if len(lengths) else lengths

        history, first_target = num_before(cut_us - self._gap_us), num_before(cut_us)
        split: UserSplit = {
            "eval": Part(num_history=history, first_target=first_target, num_targets=lengths - first_target)
        }
        trained = history
        if "valid" in self.splits:
            trained, first_target = num_before(self._validation_us - self._gap_us), num_before(self._validation_us)
            split["valid"] = Part(num_history=trained, first_target=first_target, num_targets=history - first_target)
        return {"train": _only_history(trained), **split}

    def describe(self) -> dict[str, Any]:
        """The rule and its numbers, for `dataset.json`."""
        described: dict[str, Any] = {"rule": self.config.rule}
        if self.cut_us is not None:
            described |= {"cut": self.cut_us / 1_000_000, "gap": self.config.gap}
        if self.config.rule == "user_holdout":
            described["fraction"] = self.config.fraction
        for key in ("validation_users", "validation"):
            if getattr(self.config, key):
                described[key] = getattr(self.config, key)
        return described


def may_be_validated(lengths: Int64) -> npt.NDArray[np.bool_]:
    """leave_last_out: who has an event to train on beside the two targets."""
    return lengths >= 3


def _only_history(num_events: Int64) -> Part:
    nothing = np.zeros_like(num_events)
    return Part(num_history=num_events, first_target=nothing, num_targets=nothing)


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
