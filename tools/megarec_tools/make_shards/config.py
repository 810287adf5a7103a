"""The settings of `megarec-make-shards`."""

from dataclasses import dataclass, field
from typing import Literal

from megarec.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Which events are trained on and which are asked for.

    Attributes:
        rule: `leave_last_out`: the last event of every user of two or more is the target.
            `global_time`: trained on what lies before `cut - gap`; what a user does at `cut` or later is the target.
            `user_holdout`: a share of the users is never trained on; the last event of each is the target.
        cut: global_time: seconds since 1970, or text such as 2024-05-01T00:00:00Z.
        gap: global_time: seconds before the cut that belong to neither side.
        fraction: user_holdout: the share of users held out.
        validation_users: leave_last_out: so many users, chosen by a hash, have a second target to tune on: their
            second-to-last event, which is not trained on.
        validation: global_time: a window of so many seconds to tune on, which ends at `cut - gap`; trained on is what
            lies a gap before it.
    """

    rule: Literal["leave_last_out", "global_time", "user_holdout"] = "leave_last_out"
    cut: str | None = None
    gap: float = 0.0
    fraction: float = 0.1
    validation_users: int = 0
    validation: float = 0.0

    def __post_init__(self) -> None:
        if (self.rule == "global_time") != (self.cut is not None):
            fix = "Give split.cut=2024-05-01" if self.cut is None else "Only split.rule=global_time has a cut"
            raise UserError("cut and rule do not fit together", fix=fix)
        for key in ("gap", "validation"):
            if not 0 <= getattr(self, key) < 1e11:
                raise UserError(f"{getattr(self, key)} is not a number of seconds from 0 up", where=key)
            if getattr(self, key) and self.rule != "global_time":
                raise UserError("is set", where=key, fix=f"Only split.rule=global_time has a {key}")
        if self.validation_users < 0:
            raise UserError(f"{self.validation_users} is below 0", where="validation_users")
        if self.validation_users and self.rule != "leave_last_out":
            fix = "Only split.rule=leave_last_out chooses users"
            raise UserError("is set", where="validation_users", fix=fix)
        if not 0 < self.fraction < 1:
            raise UserError(f"{self.fraction} is not between 0 and 1", where="fraction")
        if self.fraction != SplitConfig.fraction and self.rule != "user_holdout":
            raise UserError("is set", where="fraction", fix="Only split.rule=user_holdout has a fraction")


@dataclass(frozen=True, kw_only=True)
class MakeShardsConfig:
    """From a log to a dataset directory.

    Attributes:
        input: a file, a glob, a directory, or a list of them.
        items: files that describe items, named as `input` is; the schema says how to read them.
        users: files that describe users, as `items`; what they say is context in every event of a user.
        output: the directory to make; it must not exist or be empty.
        schema: the name of a ready schema, a yaml file, or `infer`.
        approve: go on with an inferred schema; without it the schema is printed and nothing is made.
        split: which events are trained on and which are asked for.
        users_per_block: users in one tar member.
        blocks_per_shard: tar members in one shard.
        compression: of the blocks.
        max_rejects: the share of rows that may be unusable.
        duplicates: what to do with a row that repeats another in every column that is read.
        equal_times: whether a user's events of the same time keep the order of the log, or are shuffled.
        min_item_count: items with fewer events are rare (train events with global_time, otherwise all).
        rare_items: whether a rare item becomes unknown, or its events are dropped.
        min_user_events: users with fewer events are dropped, before and after the events of rare items.
        num_processes: 0 takes one per core, or none beside this one for a small log. The result is the same.
        seed: of the order of the users, of who is held out, and of shuffled events.
    """

    input: str | list[str]
    output: str
    schema: str
    items: str | list[str] = ""
    users: str | list[str] = ""
    approve: bool = False
    split: SplitConfig = field(default_factory=SplitConfig)
    users_per_block: int = 512
    blocks_per_shard: int = 128
    compression: Literal["none", "zstd"] = "none"
    max_rejects: float = 0.001
    duplicates: Literal["keep", "drop"] = "keep"
    equal_times: Literal["keep", "shuffle"] = "keep"
    min_item_count: int = 1
    rare_items: Literal["unknown", "drop"] = "unknown"
    min_user_events: int = 1
    num_processes: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("users_per_block", 1, 1 << 20),
            ("blocks_per_shard", 1, 1_000_000),
            ("max_rejects", 0, 1),
            ("min_item_count", 1, 1 << 62),
            ("min_user_events", 1, 1 << 62),
            ("num_processes", 0, 1024),
        ):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name}={getattr(self, name)} is not between {low} and {high}")
        if self.rare_items == "drop" and self.min_item_count == 1 and self.split.rule != "global_time":
            raise UserError("rare_items=drop drops nothing: min_item_count is 1", fix="Set min_item_count=5")
        if self.split.rule == "global_time" and (self.rare_items == "drop" or self.min_user_events > 1):
            key = "min_user_events" if self.min_user_events > 1 else "rare_items=drop"
            raise UserError(f"{key} would count events after the cut", fix="split.rule=global_time takes neither")
        if not self.input:
            raise UserError("input is empty", fix="Give input=<file, glob or directory>")
