"""Item files beside the log: read and cleaned before it, joined to the items when those are known."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from megarec.base.errors import UserError
from megarec.data.schema import Schema
from megarec_tools.make_shards.histories import read_columns, write_columns
from megarec_tools.make_shards.log.cleaning import clean_items
from megarec_tools.make_shards.log.files import LogFiles, find_files
from megarec_tools.make_shards.log.layout import ItemLayout, Layout, decide_item_layout, slot_columns
from megarec_tools.make_shards.log.pieces import Piece, columns_of, cut_pieces, require_columns
from megarec_tools.make_shards.log.reading import list_columns_of, read_piece
from megarec_tools.make_shards.processes import OrderedMap
from megarec_tools.make_shards.summary import RejectedRows
from megarec_tools.make_shards.vocabularies import Totals

ItemFiles = dict[Path, tuple[LogFiles, list[str]]]


@dataclass(frozen=True, kw_only=True)
class ItemTask:
    """One piece of an item file to read; the result goes to `spill`."""

    piece: Piece
    layout: ItemLayout
    spill: Path


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """What was found in one piece; as in `PartitionResult`."""

    num_rows: int
    rejects: pl.DataFrame
    signs: set[tuple[str, str]]


def find_item_files(inputs: list[str], schema: Schema) -> ItemFiles:
    """The item files that `inputs` name, in order, each as a log of one file, with its columns.

    Raises:
        UserError: the schema has no section `items`; a file is not there, has no item column, or none that is wanted.
    """
    if schema.items is None:
        fix = "Name another schema, or add the section 'items' of docs/data_format.md"
        raise UserError(f"the schema '{schema.name}' does not say how to read item files", where="items", fix=fix)
    wanted = [schema.fields[name].column for name in schema.items.fields]
    found: ItemFiles = {}
    for text in inputs:
        files = find_files([text], file_format=schema.items.file_format)
        for path in files.paths:
            if path in found:
                raise UserError("the file is named twice", where=str(path))
            present = columns_of(path, files.format, written=schema.items)
            require_columns(present, [schema.items.item], path=path)
            if not schema.items.extends_catalog and not set(wanted) & set(present):
                raise UserError(f"none of the columns {', '.join(wanted)}", where=str(path), fix="Is it an item file?")
            found[path] = (replace(files, paths=(path,)), present)
    return found


def decide_item_layouts(found: ItemFiles, log: Layout) -> list[ItemLayout]:
    """How each item file is read: a column is of the type that it has in the first file that has it."""
    items = log.schema.items
    integers: dict[str, bool] = {}
    layouts = []
    for files, present in found.values():
        fields = {
            name: log.schema.fields[name]
            for name in (items.fields if items else ())
            if log.schema.fields[name].column in present
        }
        layout = decide_item_layout(files, fields, log=log)
        for column in layout.columns():
            integers.setdefault(column, column in layout.integers)
        layouts.append(replace(layout, integers=frozenset(c for c in layout.columns() if integers[c])))
    return layouts


def read_item_piece(task: ItemTask) -> ItemResult:
    """Runs one task."""
    lists = list_columns_of(task.layout.fields.values())
    raw, broken = read_piece(task.piece, task.layout.columns(), list_columns=lists)
    frame, rejects = clean_items(raw, task.layout)
    write_columns(task.spill, frame.to_arrow())
    rejected = pl.concat([broken, rejects.frame(raw["#row"])]).with_columns(pl.col("row") + 1)
    return ItemResult(num_rows=len(raw) + len(broken), rejects=rejected, signs=rejects.signs)


class ItemTables:
    """What the item files say about items. Rows lie on the disk; one piece of a file is in memory at a time.

    Args:
        layouts: the files; none of them reads as no rows.
        work: the folder for what was read.
        max_rejects: the share of rows that may be unusable.

    Attributes:
        rejected: the rows that could not be used.
        signs: see `Rejects.signs`.
    """

    def __init__(self, layouts: list[ItemLayout], *, work: Path, max_rejects: float) -> None:
        self._layouts = layouts
        self._work = work
        self._pieces: list[tuple[Path, ItemLayout]] = []
        self.rejected = RejectedRows([layout.files.paths[0] for layout in layouts], max_rejects)
        self.signs: set[tuple[str, str]] = set()

    def read(self, ordered_map: OrderedMap) -> None:
        """Reads all files.

        Raises:
            UserError: a file is damaged, or too many rows cannot be used.
        """
        file_of_piece: list[int] = []

        def tasks() -> Iterator[ItemTask]:
            for file, layout in enumerate(self._layouts):
                for piece in cut_pieces(layout.files, written=layout.written):
                    self._pieces.append((self._work / f"items-{len(self._pieces):06d}.arrow", layout))
                    file_of_piece.append(file)
                    yield ItemTask(piece=piece, layout=layout, spill=self._pieces[-1][0])

        for number, result in enumerate(ordered_map(read_item_piece, tasks())):
            self.rejected.add(result.rejects, file=file_of_piece[number], num_rows=result.num_rows)
            self.signs |= result.signs
        self.rejected.check()

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
                rows = known.select("item", time=pl.col("row") + (number << 40), **slots)
                totals[name].add(rows.filter(pl.col("slot0").is_not_null()))
        return {name: total.result() for name, total in totals.items()}

    def _frames(self) -> Iterator[tuple[pl.DataFrame, ItemLayout]]:
        for path, layout in self._pieces:
            yield pl.DataFrame(pl.from_arrow(read_columns(path))), layout
