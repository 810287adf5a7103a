"""From a log to a dataset directory, in three passes over data that never has to fit into memory.

0. Item and user files are read and laid aside (`side_files`).
1. Pieces of the log are read, cleaned and cut into buckets of users (`partition`).
2. Each bucket is sorted, split and counted (`histories`); the counts become vocabularies (`vocabularies`).
3. The users of each shard become blocks of ids (`shards`).

Users stand in the order of a hash of their id. Buckets are ranges of that hash, so that neither their number nor
that of the processes shows in the result.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from pyarrow import parquet

from megarec.base.errors import UserError
from megarec.base.files import new_directory, refuse_occupied
from megarec.base.progress import bar, say
from megarec.base.random import derive_key
from megarec.data.dataset import Dataset, write_dataset
from megarec.data.schema import Described, FieldSchema, Schema, infer_schema, load_schema, schema_text
from megarec_tools.make_shards.assembly import Assembly
from megarec_tools.make_shards.config import MakeShardsConfig
from megarec_tools.make_shards.histories import BucketTask, build_bucket, validation_candidates, write_columns
from megarec_tools.make_shards.log.files import LogFiles, find_files
from megarec_tools.make_shards.log.layout import Layout, decide_layout, narrow_schema
from megarec_tools.make_shards.log.pieces import Piece, columns_of, cut_pieces, estimate_events, require_columns
from megarec_tools.make_shards.log.reading import list_columns_of, read_sample
from megarec_tools.make_shards.partition import PartitionTask, partition_piece
from megarec_tools.make_shards.processes import OrderedMap, workers
from megarec_tools.make_shards.shards import build_shard
from megarec_tools.make_shards.side_files import (
    Buckets,
    FoundFiles,
    ItemTables,
    SideRows,
    decide_side_layouts,
    find_side_files,
)
from megarec_tools.make_shards.split import SplitRule
from megarec_tools.make_shards.summary import COUNTS, RejectedRows, format_table
from megarec_tools.make_shards.vocabularies import Totals

EVENTS_PER_BUCKET = 1 << 20
MAX_BUCKET_BITS = 12
SMALL_LOG_BYTES = 64 << 20


def make_shards(config: MakeShardsConfig) -> Dataset:
    """Makes the dataset directory `config.output` and prints what was counted.

    Raises:
        UserError: whatever is wrong with the settings, the schema or the log.
        OSError: the disk is full; nothing half-written is left.
    """
    output = Path(config.output)
    refuse_occupied(output)
    rule = SplitRule(config.split, seed=config.seed)
    inputs = _open_inputs(config)
    files, schema = inputs.log, inputs.schema
    _check_times_are_known(config, schema)
    lists = list_columns_of(schema.log_fields().values())
    layout = decide_layout(read_sample(files, schema.columns(), written=schema, list_columns=lists), schema)
    item_layouts, user_layouts = (
        decide_side_layouts(inputs.beside.get(described, {}), layout, described=described)
        for described in ("item", "user")
    )
    with new_directory(output) as staging, workers(_num_processes(config, files)) as ordered_map:
        work = staging / "unfinished"
        work.mkdir()
        items = ItemTables(item_layouts, work=work, max_rejects=config.max_rejects)
        users = SideRows(user_layouts, work=work, max_rejects=config.max_rejects)
        maker = _Maker(
            config,
            files=files,
            layout=layout,
            items=items,
            users=users,
            rule=rule,
            staging=staging,
            ordered_map=ordered_map,
        )
        maker.counts["absent_fields"] = len(inputs.absent["item"])
        maker.counts["absent_user_fields"] = len(inputs.absent["user"])
        dataset, rejected = maker.run()
    reasons = {"rows_rejected": rejected, "item_rows_rejected": items.rejected, "user_rows_rejected": users.rejected}
    say(format_table(dataset.counts, {key: rows.by_reason for key, rows in reasons.items()}))
    return replace(dataset, path=output)


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The log, the files beside it with their columns, the schema without the fields that all these lack, and those."""

    log: LogFiles
    beside: dict[Described, FoundFiles]
    schema: Schema
    absent: dict[Described, set[str]]


def _open_inputs(config: MakeShardsConfig) -> _Inputs:
    inputs = [config.input] if isinstance(config.input, str) else config.input
    schema = None if config.schema == "infer" else load_schema(config.schema)
    files = find_files(inputs, file_format=schema.file_format if schema else "auto")
    first = files.paths[0]
    if schema is None:
        present = columns_of(first, files.format, written=None)
        sample = read_sample(files, present, written=None).drop("#row")
        schema = infer_schema(sample.to_dict(as_series=False), where=str(first))
        say(schema_text(schema).rstrip())
        if not config.approve:
            fix = "Save it as a yaml file and name that, or add approve=true"
            raise UserError("the schema above was inferred and is not approved yet", fix=fix)
    named: dict[Described, str | list[str]] = {"item": config.items, "user": config.users}
    beside = {
        described: find_side_files([names] if isinstance(names, str) else names, schema, described=described)
        for described, names in named.items()
        if names
    }
    present_beside = {d: {column for _, columns in found.values() for column in columns} for d, found in beside.items()}
    present = columns_of(first, files.format, written=schema)
    narrow = narrow_schema(schema, present, present_beside=present_beside)
    for path in files.paths if files.format != "jsonl" else [first]:  # a key may be missing from a line
        require_columns(columns_of(path, files.format, written=narrow), narrow.columns(), path=path)
    absent = {described: schema.fields_of(described).keys() - narrow.fields.keys() for described in named}
    return _Inputs(log=files, beside=beside, schema=narrow, absent=absent)


def _columns_of(fields: dict[str, FieldSchema]) -> dict[str, str]:
    return {name: field.column for name, field in fields.items()}


def _check_times_are_known(config: MakeShardsConfig, schema: Schema) -> None:
    settings = {
        "split.rule=global_time": config.split.rule == "global_time",
        "duplicates=drop": config.duplicates == "drop",
        "equal_times=shuffle": config.equal_times == "shuffle",
    }
    for setting, is_set in settings.items():
        if is_set and schema.timestamp is None:
            raise UserError(f"{setting} needs times, and the schema '{schema.name}' has no timestamp")


def _num_processes(config: MakeShardsConfig, files: LogFiles) -> int:
    if config.num_processes:
        return config.num_processes
    if files.num_bytes < SMALL_LOG_BYTES:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Maker:
    """The three passes over one log, into the folder `staging`."""

    def __init__(
        self,
        config: MakeShardsConfig,
        *,
        files: LogFiles,
        layout: Layout,
        items: ItemTables,
        users: SideRows,
        rule: SplitRule,
        staging: Path,
        ordered_map: OrderedMap,
    ) -> None:
        self.config = config
        self.files = files
        self.layout = layout
        self.items = items
        self.users = users
        self.rule = rule
        self.staging = staging
        self.ordered_map = ordered_map
        self.work = staging / "unfinished"
        self.counts: Counter[str] = Counter()
        self.item_events = Totals(["item"])

    def run(self) -> tuple[Dataset, RejectedRows]:
        """Makes every file of the dataset; `dataset.json` comes last."""
        schema = self.layout.schema
        num_rows = estimate_events(self.files, written=schema, item=schema.item)
        bits = min(MAX_BUCKET_BITS, max(0, -(-num_rows // EVENTS_PER_BUCKET) - 1).bit_length())
        self.items.read(self.ordered_map)
        self.users.read(self.ordered_map, buckets=Buckets(bits=bits, seed=self.config.seed))
        for described, side in (("item", self.items), ("user", self.users)):
            self.counts[f"{described}_rows"] = side.rejected.num_rows
            self.counts[f"{described}_rows_rejected"] = side.rejected.num_rejected
        spills, rejected, unsigned = self._partition(num_rows, bucket_bits=bits)
        assembly = Assembly(
            self.config,
            layout=self.layout,
            rule=self.rule,
            staging=self.staging,
            work=self.work,
            item_tables=self.items,
            unsigned=unsigned,
        )
        self._build_buckets(spills, assembly, num_buckets=1 << bits)
        assembly.finish_tables()
        counts = self.counts + assembly.counts
        num_rows = sum(counts[key] for key in ("train_events", "eval_history_events", "targets"))
        shards = []
        with bar(title="write", total=num_rows, unit=" rows") as progress:
            for shard in self.ordered_map(build_shard, assembly.shard_tasks()):
                shards.append(shard)
                progress.update(shard.events + shard.targets)
        shutil.rmtree(self.work)
        rejects = pl.concat([rows.frame() for rows in (rejected, self.items.rejected, self.users.rejected)])
        parquet.write_table(rejects.to_arrow(), self.staging / "rejects.parquet")
        dataset = Dataset(
            path=self.staging,
            schema=self.layout.schema,
            fields=assembly.fields,
            split=self.rule.describe(),
            counts={key: counts[key] for key in COUNTS},
            shards=shards,
            has_timestamps=self.layout.schema.timestamp is not None,
        )
        write_dataset(dataset)
        return dataset, rejected

    def _partition(self, num_rows: int, *, bucket_bits: int) -> tuple[list[Path], RejectedRows, frozenset[str]]:
        """The first pass: the spill files in the order of the log, the rejected rows, the fields of unsigned ids."""
        schema = self.layout.schema
        rejected = RejectedRows(self.files.paths, self.config.max_rejects)
        spills: list[Path] = []
        pieces: list[Piece] = []

        def tasks() -> Iterator[PartitionTask]:
            lists = schema.columns() if self.layout.exploded else ()
            for piece in cut_pieces(self.files, written=schema, list_columns=lists, item=schema.item):
                pieces.append(replace(piece, text=b"", batch=None))
                spills.append(self.work / f"piece-{piece.number:06d}.arrow")
                yield PartitionTask(
                    piece=piece,
                    layout=self.layout,
                    bucket_bits=bucket_bits,
                    seed=self.config.seed,
                    count_items=self.config.rare_items == "drop",
                    spill=spills[-1],
                )

        signs: set[tuple[str, str]] = set()
        read_bytes = 0
        with bar(title="read", total=num_rows, unit=" rows") as progress:
            for number, result in enumerate(self.ordered_map(partition_piece, tasks())):
                rejected.add(
                    result.rejects,
                    file=pieces[number].file,
                    num_rows=result.num_rows,
                    num_file_rows=result.num_file_rows,
                )
                self.counts["rows_filtered"] += result.num_filtered
                signs |= result.signs
                if result.items is not None:
                    self.item_events.add(result.items)
                read_bytes += pieces[number].read_bytes
                if read_bytes:  # the rows of a text log are known when it is read
                    progress.total = round(rejected.num_rows * self.files.num_bytes / read_bytes)
                progress.update(result.num_rows)
        rejected.check()
        self.counts["rows"], self.counts["rows_rejected"] = rejected.num_rows, rejected.num_rejected
        if rejected.num_rows == rejected.num_rejected + self.counts["rows_filtered"]:
            raise UserError("the log has no rows to use", where=str(self.files.paths[0]), fix="Check input and keep")
        return spills, rejected, self._unsigned_fields(signs)

    def _unsigned_fields(self, signs: set[tuple[str, str]]) -> frozenset[str]:
        """The fields whose ids reach 2^63, from the signs of the columns of the log and of the files beside it."""
        schema = self.layout.schema
        columns = [{"user": schema.user, "item": schema.item, **_columns_of(schema.log_fields())}]
        for described, files in schema.side_files().items():
            columns.append({described: files.key, **_columns_of(schema.fields_of(described))})
        seen = [signs, *({"item": self.items, "user": self.users}[d].signs for d in schema.side_files())]
        found: dict[str, set[str]] = {"big": set(), "negative": set()}
        for of_files, signs_of_files in zip(columns, seen, strict=True):
            for name, column in of_files.items():
                for sign in found:
                    found[sign] |= {name} if (column, sign) in signs_of_files else set()
        both = sorted(found["big"] & found["negative"])
        if both:
            column = next(of_files[both[0]] for of_files in columns if both[0] in of_files)
            what = f"the column '{column}' has ids below 0 and ids of 2^63 and more"
            raise UserError(what, fix=f"List '{column}' in the schema's text_columns")
        return frozenset(found["big"])

    def _build_buckets(self, spills: list[Path], assembly: Assembly, *, num_buckets: int) -> None:
        """The second pass."""
        rare_items = self._write_rare_items() if self.config.rare_items == "drop" else None
        tasks = [
            BucketTask(
                number=number,
                spills=spills,
                user_spills=[path for path, _ in self.users.pieces],
                layout=self.layout,
                rule=self.rule,
                drop_duplicates=self.config.duplicates == "drop",
                shuffle_key=derive_key(self.config.seed, "equal times")
                if self.config.equal_times == "shuffle"
                else None,
                min_user_events=self.config.min_user_events,
                rare_items=rare_items,
                bucket=self.work / f"bucket-{number:05d}",
            )
            for number in range(num_buckets)
        ]
        if self.config.split.validation_users:
            self.rule.last_validation_hash = self._last_validation_hash(tasks)
        total = self.counts["rows"] - self.counts["rows_rejected"] - self.counts["rows_filtered"]
        with bar(title="sort", total=total, unit=" rows") as progress:
            for number, result in enumerate(self.ordered_map(build_bucket, tasks)):
                assembly.add(self.work / f"bucket-{number:05d}", result)
                progress.update(result.counts["events"])
        for spill in spills:
            spill.unlink()

    def _write_rare_items(self) -> Path:
        totals = self.item_events.result()
        rare = totals.filter(pl.col("catalog") < self.config.min_item_count)
        if len(rare) == len(totals):
            raise UserError(f"no item has min_item_count={self.config.min_item_count} events", fix="Lower it")
        path = self.work / "rare_items.arrow"
        write_columns(path, rare.select("item").to_arrow())
        return path

    def _last_validation_hash(self, tasks: list[BucketTask]) -> np.uint64:
        """The hash up to which there are as many users with three events as are to be validated."""
        wanted = found = self.config.split.validation_users
        for task in tasks:
            hashes = validation_candidates(task)
            if len(hashes) >= wanted:
                return np.uint64(hashes[wanted - 1])
            wanted -= len(hashes)
        what = f"validation_users={found}, but only {found - wanted} users have three events"
        raise UserError(what, where="split", fix="Lower it")
