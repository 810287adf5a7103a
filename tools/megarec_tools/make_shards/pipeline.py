"""From a log to a dataset directory, in three passes over data that never has to fit into memory.

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
from dataclasses import replace
from pathlib import Path

from pyarrow import parquet

from megarec.base.errors import UserError
from megarec.base.files import new_directory, refuse_occupied
from megarec.base.progress import bar, say
from megarec.data.dataset import Dataset, write_dataset
from megarec.data.schema import Schema, infer_schema, load_schema, schema_text
from megarec_tools.make_shards.assembly import Assembly
from megarec_tools.make_shards.config import MakeShardsConfig
from megarec_tools.make_shards.histories import BucketTask, build_bucket
from megarec_tools.make_shards.log.files import LogFiles, find_files
from megarec_tools.make_shards.log.layout import Layout, decide_layout, narrow_schema
from megarec_tools.make_shards.log.pieces import Piece, columns_of, cut_pieces, estimate_rows, require_columns
from megarec_tools.make_shards.log.reading import read_sample
from megarec_tools.make_shards.partition import PartitionTask, partition_piece
from megarec_tools.make_shards.processes import OrderedMap, workers
from megarec_tools.make_shards.shards import build_shard
from megarec_tools.make_shards.split import SplitRule
from megarec_tools.make_shards.summary import COUNTS, RejectedRows, format_table

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
    files, schema = _open_log(config)
    if schema.timestamp is None and (rule.cut_us is not None or config.duplicates == "drop"):
        key = "split.rule=global_time" if rule.cut_us is not None else "duplicates=drop"
        raise UserError(f"{key} needs times, and the schema '{schema.name}' has no timestamp")
    layout = decide_layout(read_sample(files, schema.columns(), schema=schema), schema)
    with new_directory(output) as staging, workers(_num_processes(config, files)) as ordered_map:
        maker = _Maker(config, files=files, layout=layout, rule=rule, staging=staging, ordered_map=ordered_map)
        dataset, rejected = maker.run()
    say(format_table(dataset.counts, rejected.by_reason))
    return replace(dataset, path=output)


def _open_log(config: MakeShardsConfig) -> tuple[LogFiles, Schema]:
    inputs = [config.input] if isinstance(config.input, str) else config.input
    schema = None if config.schema == "infer" else load_schema(config.schema)
    files = find_files(inputs, file_format=schema.file_format if schema else "auto")
    first = files.paths[0]
    if schema is None:
        present = columns_of(first, files.format, schema=None)
        schema = infer_schema(read_sample(files, present, schema=None).to_dict(as_series=False), where=str(first))
        say(schema_text(schema).rstrip())
        if not config.approve:
            fix = "Save it as a yaml file and name that, or add approve=true"
            raise UserError("the schema above was inferred and is not approved yet", fix=fix)
    schema = narrow_schema(schema, columns_of(first, files.format, schema=schema))
    for path in files.paths if files.format != "jsonl" else [first]:  # a key may be missing from a line
        require_columns(columns_of(path, files.format, schema=schema), schema.columns(), path=path)
    return files, schema


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
        rule: SplitRule,
        staging: Path,
        ordered_map: OrderedMap,
    ) -> None:
        self.config = config
        self.files = files
        self.layout = layout
        self.rule = rule
        self.staging = staging
        self.ordered_map = ordered_map
        self.work = staging / "unfinished"
        self.counts: Counter[str] = Counter()

    def run(self) -> tuple[Dataset, RejectedRows]:
        """Makes every file of the dataset; `dataset.json` comes last."""
        self.work.mkdir()
        num_rows = estimate_rows(self.files, schema=self.layout.schema)
        bits = min(MAX_BUCKET_BITS, max(0, -(-num_rows // EVENTS_PER_BUCKET) - 1).bit_length())
        spills, rejected, unsigned = self._partition(num_rows, bucket_bits=bits)
        assembly = Assembly(
            self.config,
            layout=self.layout,
            rule=self.rule,
            staging=self.staging,
            work=self.work,
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
        parquet.write_table(rejected.frame().to_arrow(), self.staging / "rejects.parquet")
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
        """The first pass: the spill files in the order of the log, the rejected rows, the columns of unsigned ids."""
        rejected = RejectedRows(self.files.paths, self.config.max_rejects)
        spills: list[Path] = []
        pieces: list[Piece] = []

        def tasks() -> Iterator[PartitionTask]:
            for piece in cut_pieces(self.files, schema=self.layout.schema):
                pieces.append(replace(piece, text=b""))
                spills.append(self.work / f"piece-{piece.number:06d}.arrow")
                yield PartitionTask(
                    piece=piece, layout=self.layout, bucket_bits=bucket_bits, seed=self.config.seed, spill=spills[-1]
                )

        signs: set[tuple[str, str]] = set()
        read_bytes = 0
        with bar(title="read", total=num_rows, unit=" rows") as progress:
            for number, result in enumerate(self.ordered_map(partition_piece, tasks())):
                rejected.add(result.rejects, file=pieces[number].file, num_rows=result.num_rows)
                self.counts["rows_filtered"] += result.num_filtered
                signs |= result.signs
                read_bytes += pieces[number].read_bytes
                if read_bytes:  # the rows of a text log are known when it is read
                    progress.total = round(rejected.num_rows * self.files.num_bytes / read_bytes)
                progress.update(result.num_rows)
        rejected.check()
        self.counts["rows"], self.counts["rows_rejected"] = rejected.num_rows, rejected.num_rejected
        if rejected.num_rows == rejected.num_rejected + self.counts["rows_filtered"]:
            raise UserError("the log has no rows to use", where=str(self.files.paths[0]), fix="Check input and keep")
        unsigned = {column for column, sign in signs if sign == "big"}
        both = sorted(unsigned & {column for column, sign in signs if sign == "negative"})
        if both:
            what = f"the column '{both[0]}' has ids below 0 and ids of 2^63 and more"
            raise UserError(what, fix=f"List '{both[0]}' in the schema's text_columns")
        return spills, rejected, frozenset(unsigned)

    def _build_buckets(self, spills: list[Path], assembly: Assembly, *, num_buckets: int) -> None:
        """The second pass."""
        tasks = (
            BucketTask(
                number=number,
                spills=spills,
                layout=self.layout,
                rule=self.rule,
                drop_duplicates=self.config.duplicates == "drop",
                bucket=self.work / f"bucket-{number:05d}",
            )
            for number in range(num_buckets)
        )
        total = self.counts["rows"] - self.counts["rows_rejected"] - self.counts["rows_filtered"]
        with bar(title="sort", total=total, unit=" rows") as progress:
            for number, result in enumerate(self.ordered_map(build_bucket, tasks)):
                assembly.add(self.work / f"bucket-{number:05d}", result)
                progress.update(result.counts["events"])
        for spill in spills:
            spill.unlink()
