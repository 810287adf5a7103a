"""Files beside the log that describe its items or its users: read and cleaned before it.

What item files say is joined to the items when those are known; what user files say, to the events of each bucket.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from megarec.base.errors import UserError
from megarec.data.schema import Described, ItemFiles, Schema
from megarec_tools.make_shards.histories import read_columns, write_columns
from megarec_tools.make_shards.log.cleaning import clean_side
from megarec_tools.make_shards.log.files import LogFiles, find_files
from megarec_tools.make_shards.log.layout import Layout, SideLayout, decide_side_layout, slot_columns
from megarec_tools.make_shards.log.pieces import Piece, columns_of, cut_pieces, require_columns
from megarec_tools.make_shards.log.reading import list_columns_of, read_piece
from megarec_tools.make_shards.partition import write_buckets
from megarec_tools.make_shards.processes import OrderedMap
from megarec_tools.make_shards.summary import RejectedRows
from megarec_tools.make_shards.vocabularies import Totals

FoundFiles = dict[Path, tuple[LogFiles, list[str]]]


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """How users are cut into `2 ** bits` buckets; as in `PartitionTask`."""

    bits: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class SideTask:
    """One piece of a side file to read; the result goes to `spill`, that of a user file in buckets of the users."""

    piece: Piece
    layout: SideLayout
    spill: Path
    buckets: Buckets | None


@dataclass(frozen=True, kw_only=True)
class SideResult:
    """What was found in one piece; as in `PartitionResult`."""

    num_rows: int
    rejects: pl.DataFrame
    signs: set[tuple[str, str]]


def find_side_files(inputs: list[str], schema: Schema, *, described: Described) -> FoundFiles:
    """The item files, or user files, that `inputs` name, in order, each as a log of one file, with its columns.

    Raises:
        UserError: the schema has no section for them; a file is not there, has no column of the id, or none that is
            wanted.
    """
    written = schema.side_files().get(described)
    if written is None:
        section = f"{described}s"
        fix = f"Name another schema, or add the section '{section}' of docs/data_format.md"
        raise UserError(
            f"the schema '{schema.name}' does not say how to read {described} files", where=section, fix=fix
        )
    wanted = [field.column for field in schema.fields_of(described).values()]
    must_describe = not (isinstance(written, ItemFiles) and written.extends_catalog)
    found: FoundFiles = {}
    for text in inputs:
        files = find_files([text], file_format=written.file_format)
        for path in files.paths:
            if path in found:
                raise UserError("the file is named twice", where=str(path))
            present = columns_of(path, files.format, written=written)
            require_columns(present, [written.key], path=path)
            if must_describe and not set(wanted) & set(present):
                fix = f"Does it describe {described}s?"
                raise UserError(f"none of the columns {', '.join(wanted)}", where=str(path), fix=fix)
            found[path] = (replace(files, paths=(path,)), present)
    return found


def decide_side_layouts(found: FoundFiles, log: Layout, *, described: Described) -> list[SideLayout]:
    """How each file is read: a column is of the type that it has in the first file that has it."""
    wanted = log.schema.fields_of(described)
    integers: dict[str, bool] = {}
    layouts = []
    for files, present in found.values():
        fields = {name: field for name, field in wanted.items() if field.column in present}
        layout = decide_side_layout(files, fields, described=described, log=log)
        for column in layout.columns():
            integers.setdefault(column, column in layout.integers)
        layouts.append(replace(layout, integers=frozenset(c for c in layout.columns() if integers[c])))
    return layouts


def read_side_piece(task: SideTask) -> SideResult:
    """Runs one task."""
    lists = list_columns_of(task.layout.fields.values())
    raw, broken = read_piece(task.piece, task.layout.columns(), list_columns=lists)
    frame, rejects = clean_side(raw, task.layout)
    if task.buckets is None:
        write_columns(task.spill, frame.to_arrow())
    else:
        write_buckets(task.spill, frame.drop("#row"), bits=task.buckets.bits, seed=task.buckets.seed)
    rejected = pl.concat([broken, rejects.frame(raw["#row"])]).with_columns(pl.col("row") + 1)
    return SideResult(num_rows=len(raw) + len(broken), rejects=rejected, signs=rejects.signs)


class SideRows:
    """The rows of side files, laid aside on the disk; one piece of a file is in memory at a time.

    Args:
        layouts: the files; none of them reads as no rows.
        work: the folder for what was read.
        max_rejects: the share of rows that may be unusable.

    Attributes:
        pieces: what was read, in order: a file for each piece of a side file, and how that was read.
        rejected: the rows that could not be used.
        signs: see `Rejects.signs`.
    """

    def __init__(self, layouts: list[SideLayout], *, work: Path, max_rejects: float) -> None:
        self._layouts = layouts
        self._work = work
        self.pieces: list[tuple[Path, SideLayout]] = []
        self.rejected = RejectedRows([layout.files.paths[0] for layout in layouts], max_rejects)
        self.signs: set[tuple[str, str]] = set()

    def read(self, ordered_map: OrderedMap, *, buckets: Buckets | None = None) -> None:
        """Reads all files; those of users into `buckets`.

        Raises:
            UserError: a file is damaged, or too many rows cannot be used.
        """
        file_of_piece: list[int] = []

        def tasks() -> Iterator[SideTask]:
            for file, layout in enumerate(self._layouts):
                for piece in cut_pieces(layout.files, written=layout.written):
                    spill = self._work / f"{layout.described}s-{len(self.pieces):06d}.arrow"
                    self.pieces.append((spill, layout))
                    file_of_piece.append(file)
                    yield SideTask(piece=piece, layout=layout, spill=spill, buckets=buckets)

        for number, result in enumerate(ordered_map(read_side_piece, tasks())):
            self.rejected.add(result.rejects, file=file_of_piece[number], num_rows=result.num_rows)
            self.signs |= result.signs
        self.rejected.check()


class ItemTables(SideRows):
    """What the item files say about items."""

    def unseen(self, seen: pl.Series) -> pl.Series:
        """The items of the files that are not among the `seen` ones, each once."""
        known = seen.alias("item").to_frame()
        new = [frame.select("item").unique().join(known, on="item", how="anti") for frame, _ in self._frames()]
        return pl.concat([known.clear(), *new]).unique()["item"]

    def num_described(self, items: pl.Series) -> int:
        """How many of the `items` some file has a row for."""
        known = items.alias("item").to_frame()
        found = [frame.select("item").unique().join(known, on="item", how="semi") for frame, _ in self._frames()]
        return pl.concat([known.clear(), *found])["item"].n_unique()

    def values(self, items: pl.Series) -> dict[str, pl.DataFrame]:
        """The distinct values of `items` per field: `item`, `slot0`..., and as `time` the first row that says so."""
        totals = {
            name: Totals(["item", *(f"slot{slot}" for slot in range(field.max_values))])
            for layout in self._layouts
            for name, field in layout.fields.items()
        }
        for number, (frame, layout) in enumerate(self._frames()):
            known = frame.join(items.alias("item").to_frame(), on="item", how="semi", maintain_order="left")
            for name, field in layout.fields.items():
                slots = {f"slot{slot}": column for slot, column in enumerate(slot_columns(name, field))}
                rows = known.select("item", time=pl.col("#row") + (number << 40), **slots)
                totals[name].add(rows.filter(pl.col("slot0").is_not_null()))
        return {name: total.result() for name, total in totals.items()}

    def _frames(self) -> Iterator[tuple[pl.DataFrame, SideLayout]]:
        for path, layout in self.pieces:
            yield pl.DataFrame(pl.from_arrow(read_columns(path))), layout
