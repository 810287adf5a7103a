"""From the counts of the buckets to everything of a dataset but its blocks: ids, tables, and who is in which shard."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from pyarrow import parquet

from megarec.base.errors import UserError
from megarec.data.dataset import FieldInfo, Split
from megarec_tools.make_shards.config import MakeShardsConfig
from megarec_tools.make_shards.histories import BucketResult, read_columns, write_columns
from megarec_tools.make_shards.log.layout import Layout
from megarec_tools.make_shards.shards import BucketUsers, ShardTask, vocabulary_path
from megarec_tools.make_shards.side_files import ItemTables
from megarec_tools.make_shards.split import SplitRule
from megarec_tools.make_shards.vocabularies import (
    Totals,
    coarse_numbers,
    count_values,
    find_edges,
    first_values,
    item_side_ids,
    make_vocabulary,
)

USERS_PER_ROW_GROUP = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _BucketSize:
    """A bucket's folder and its users of each kind."""

    folder: Path
    users: dict[Split, int]
    untrained_users: int


class Assembly:
    """Collects the results of the buckets, then makes the tables and plans the shards.

    Args:
        config: the settings.
        layout: how the log was read.
        rule: the split.
        staging: the folder of the new dataset.
        work: the folder of the buckets.
        item_tables: what the item files say.
        unsigned: the fields (also `user` and `item`) whose negative ids stand for those of 2^63 and more.

    Attributes:
        fields: after `finish_tables`: what `dataset.json` says of every field.
        counts: after `finish_tables`: what was counted.
    """

    def __init__(
        self,
        config: MakeShardsConfig,
        *,
        layout: Layout,
        rule: SplitRule,
        staging: Path,
        work: Path,
        item_tables: ItemTables,
        unsigned: frozenset[str],
    ) -> None:
        self._config = config
        self._schema = layout.schema
        self._rule = rule
        self._staging = staging
        self._work = work
        self._item_tables = item_tables
        self._unsigned = unsigned
        self._buckets: list[_BucketSize] = []
        self._values = {name: Totals(["raw"]) for name in layout.vocabulary_slots}
        fields = self._schema.event_fields()
        self._numbers = {name: Totals(["value"]) for name, field in fields.items() if field.num_quantiles}
        self._side = {
            name: Totals(["item", *(f"slot{slot}" for slot in range(field.max_values))])
            for name, field in fields.items()
            if field.role == "item_side"
        }
        self._time_range: tuple[int, int] | None = None
        self.fields: dict[str, FieldInfo] = {}
        self.counts: Counter[str] = Counter()

    def add(self, folder: Path, result: BucketResult) -> None:
        """Adds the next bucket, in order."""
        self._buckets.append(
            _BucketSize(folder=folder, users=result.num_users, untrained_users=result.num_untrained_users)
        )
        self.counts.update(result.counts)
        for totals, frames in (
            (self._values, result.values),
            (self._numbers, result.numbers),
            (self._side, result.item_side),
        ):
            for name, frame in frames.items():
                totals[name].add(frame)
        if result.time_range:
            low, high = self._time_range or result.time_range
            self._time_range = (min(low, result.time_range[0]), max(high, result.time_range[1]))

    def finish_tables(self) -> None:
        """Numbers everything; writes `items.parquet` and `vocab/`.

        Raises:
            UserError: the split leaves nothing to train on, or nothing to ask.
        """
        for split in self._rule.splits:
            self.counts[f"{split}_users"] = sum(b.users[split] for b in self._buckets)
        self.counts["users"] = self.counts["train_users"] + sum(b.untrained_users for b in self._buckets)
        for side, key in (("train on", "train_events"), ("evaluate", "targets"), ("tune on", "valid_targets")):
            if not self.counts[key] and (key != "valid_targets" or "valid" in self._rule.splits):
                low, high = self._time_range or (0, 0)
                fix = f"The log has {self.counts['events']} events, with times from {low} to {high}"
                raise UserError(f"the split leaves nothing to {side}", where="split", fix=fix)
        (self._staging / "vocab").mkdir()
        (self._work / "vocabularies").mkdir()
        items = self._item_vocabulary()
        item_side = self._item_side(items)
        counted = {name: totals.result() for name, totals in self._values.items() if name != "item"}
        numbers = {name: totals.result() for name, totals in self._numbers.items()}
        for name, field in self._schema.fields_of("item").items():
            values = count_values(item_side[name], items)
            if field.kind in ("id", "categorical"):
                counted[name] = values
            elif field.num_quantiles:
                coarse = pl.Series("value", coarse_numbers(values["raw"].to_numpy()))
                numbers[name] = values.select(coarse, "train").group_by("value").agg(pl.col("train").sum())
        vocabularies = {name: self._vocabulary(name, values) for name, values in counted.items()}
        self.fields = {"item": FieldInfo(name="item", role="item", kind="id", num_ids=len(items) + 1)}
        for name, field in self._schema.fields.items():
            edges = find_edges(numbers[name], field.num_quantiles) if name in numbers else field.edges
            num_real = {"numeric": len(edges) + 1, "flag": 2}.get(field.kind) or len(vocabularies[name])
            self.fields[name] = FieldInfo(
                name=name, role=field.role, kind=field.kind, num_ids=num_real + 1, slots=field.max_values, edges=edges
            )
        self._write_items(items, item_side=item_side, vocabularies=vocabularies)
        self._write_users()

    def shard_tasks(self) -> Iterator[ShardTask]:
        """Every shard of the dataset, in order."""
        per_shard = self._config.users_per_block * self._config.blocks_per_shard
        trained = [0, *accumulate(b.users["train"] for b in self._buckets)]
        untrained = list(accumulate((b.untrained_users for b in self._buckets), initial=trained[-1]))
        for split in self._rule.splits:
            (self._staging / split).mkdir()
            sizes = [b.users[split] for b in self._buckets]
            starts = [0, *accumulate(sizes)]
            for number, first in enumerate(range(0, starts[-1], per_shard)):
                last = min(first + per_shard, starts[-1])
                parts = tuple(
                    BucketUsers(
                        bucket=bucket.folder,
                        first=max(first, start) - start,
                        last=min(last, start + size) - start,
                        trained_before=trained[index],
                        untrained_before=untrained[index],
                    )
                    for index, (bucket, start, size) in enumerate(zip(self._buckets, starts, sizes, strict=False))
                    if start < last and start + size > first
                )
                yield ShardTask(
                    path=self._staging / split / f"shard-{number:06d}.tar",
                    split=split,
                    parts=parts,
                    users_per_block=self._config.users_per_block,
                    compression=self._config.compression,
                    fields=self.fields,
                    vocabularies=self._work / "vocabularies",
                    query_time=self._rule.query_time(split),
                )

    def _item_vocabulary(self) -> pl.DataFrame:
        """The catalog: the items of the log that are frequent enough, and those that the item files add."""
        totals = self._values["item"].result()
        min_count = 1 if self._config.rare_items == "drop" else self._config.min_item_count
        unseen = totals.filter(pl.col("train") == 0)
        self.counts["items_unseen"] = int((unseen["catalog"] + unseen["target"] > 0).sum())
        self.counts["targets_unseen"] = int(unseen["target"].sum())
        if self._schema.items and self._schema.items.extends_catalog and self._config.min_item_count == 1:
            known = totals.filter(pl.col("catalog") > 0)
            added = self._item_tables.unseen(known["raw"]).alias("raw").to_frame()
            added = added.with_columns(pl.lit(0, pl.Int64).alias("train"), pl.lit(1, pl.Int64).alias("catalog"))
            totals = pl.concat([known, added], how="diagonal")
            self.counts["items_added"] = len(added)
        items = make_vocabulary(totals, min_count=min_count, unsigned="item" in self._unsigned, name="item")
        if items.is_empty():
            raise UserError(f"no item has min_item_count={min_count} events", fix="Lower it")
        self.counts["items"] = len(items)
        write_columns(vocabulary_path(self._work / "vocabularies", "item"), items.select("raw", "id").to_arrow())
        return items

    def _item_side(self, items: pl.DataFrame) -> dict[str, pl.DataFrame]:
        """The value of each item in every item-side field, see `first_values`."""
        if self._schema.items:
            self.counts["items_undescribed"] = len(items) - self._item_tables.num_described(items["raw"])
        found = {name: totals.result() for name, totals in self._side.items()} | self._item_tables.values(items["raw"])
        side = {}
        for name, totals in found.items():
            side[name], num_conflicts = first_values(totals)
            self.counts["item_side_conflicts"] += num_conflicts
        return side

    def _vocabulary(self, name: str, values: pl.DataFrame) -> pl.DataFrame:
        vocabulary = make_vocabulary(values, min_count=1, unsigned=name in self._unsigned, name=name)
        write_columns(vocabulary_path(self._work / "vocabularies", name), vocabulary.select("raw", "id").to_arrow())
        written = vocabulary.select("id", self._raw(vocabulary["raw"], name), "count")
        parquet.write_table(written.to_arrow(), self._staging / "vocab" / f"{name}.parquet")
        return vocabulary

    def _raw(self, values: pl.Series, name: str) -> pl.Series:
        return values.reinterpret(signed=False) if name in self._unsigned else values

    def _write_items(
        self, items: pl.DataFrame, *, item_side: dict[str, pl.DataFrame], vocabularies: dict[str, pl.DataFrame]
    ) -> None:
        table = items.with_columns(self._raw(items["raw"], "item")).to_arrow()
        for name, field in self._schema.fields.items():
            if field.role == "item_side":
                ids = item_side_ids(
                    item_side[name], field, info=self.fields[name], items=items, vocabulary=vocabularies.get(name)
                )
                table = table.append_column(name, ids)
        parquet.write_table(table, self._staging / "items.parquet")

    def _write_users(self) -> None:
        """`vocab/user.parquet`: the users that are trained on, then the others, each by number."""
        path = self._staging / "vocab" / "user.parquet"
        number, waiting = 0, self._raw_users(self._buckets[0], trained=True).clear()
        schema = pa.schema({"user": pa.int64(), "raw": waiting.to_arrow().type})
        with parquet.ParquetWriter(path, schema) as writer:
            for trained in (True, False):
                for bucket in self._buckets:
                    waiting = pl.concat([waiting, self._raw_users(bucket, trained=trained)])
                    last = not trained and bucket is self._buckets[-1]
                    while len(waiting) >= USERS_PER_ROW_GROUP or (last and len(waiting)):
                        raw, waiting = waiting.head(USERS_PER_ROW_GROUP), waiting.slice(USERS_PER_ROW_GROUP)
                        numbers = np.arange(number, number + len(raw))
                        number += len(raw)
                        writer.write_table(pa.table([numbers, raw.to_arrow()], schema=schema))

    def _raw_users(self, bucket: _BucketSize, *, trained: bool) -> pl.Series:
        """The ids of a bucket's users that are trained on, or of those that only have targets."""
        users = pl.DataFrame(pl.from_arrow(read_columns(bucket.folder / "users.arrow")))
        raw = pl.DataFrame(pl.from_arrow(read_columns(bucket.folder / "raw_users.arrow")))["user"].alias("raw")
        return self._raw(raw.filter(users["trained_on" if trained else "only_asked"].cast(pl.Boolean)), "user")
