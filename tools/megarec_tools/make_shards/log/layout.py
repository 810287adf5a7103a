"""What is decided once for a whole log, from its first rows: which ids are integers and the unit of the time."""

from dataclasses import dataclass, replace

import polars as pl

from megarec.base.errors import UserError
from megarec.data.schema import FieldSchema, FileFormat, Schema
from megarec.data.values import UNIT_LIMITS
from megarec_tools.make_shards.log.files import LogFiles
from megarec_tools.make_shards.log.reading import explode_rows, list_columns_of, read_sample

_INTEGER = r"^(0|-?[1-9][0-9]*)$"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the columns of one log are read.

    Attributes:
        schema: the schema, without the fields and filters whose optional column the log lacks.
        integers: the columns whose ids are integers; all other ids are text.
        time_unit: `s`, `ms`, `us` or `iso`.
        time_unit_found: whether the unit was found from the log instead of given.
        exploded: whether a row is one user, with a list in the column of the item and in every column that is one
            value per event.
    """

    schema: Schema
    integers: frozenset[str]
    time_unit: str
    time_unit_found: bool
    exploded: bool

    @property
    def vocabulary_slots(self) -> dict[str, list[str]]:
        """The frame columns of every field of the log with a vocabulary; `item` is one, of one column."""
        slots = {"item": ["item"]}
        for name, field in self.schema.log_fields().items():
            if field.kind in ("id", "categorical"):
                slots[name] = slot_columns(name, field)
        return slots


def slot_columns(name: str, field: FieldSchema) -> list[str]:
    """The frame columns of a field: one, or one per kept value."""
    return [name] if field.max_values == 1 else [f"{name}/{slot}" for slot in range(field.max_values)]


@dataclass(frozen=True, kw_only=True)
class ItemLayout:
    """How one item file is read.

    Attributes:
        files: the file.
        written: how it is written.
        item: the column of the item's id.
        fields: the fields that are read from it.
        integers: as in `Layout`.
    """

    files: LogFiles
    written: FileFormat
    item: str
    fields: dict[str, FieldSchema]
    integers: frozenset[str]

    def columns(self) -> list[str]:
        """Every column that is read, each once."""
        return list(dict.fromkeys([self.item, *(field.column for field in self.fields.values())]))


def narrow_schema(schema: Schema, present: list[str], *, present_for_items: set[str]) -> Schema:
    """`schema` without what its files lack.

    Args:
        schema: all that could be read.
        present: the columns of the log; only optional ones may be missing.
        present_for_items: the columns of the item files; empty without such files.
    """
    items = schema.items if present_for_items else None
    from_items = schema.items.fields if schema.items else ()
    lacking = set(schema.optional_columns) - set(present)
    of_items = present_for_items or set(schema.optional_columns) - lacking
    fields = {
        name: field
        for name, field in schema.fields.items()
        if (field.column in of_items if name in from_items else field.column not in lacking)
    }
    return replace(
        schema,
        fields=fields,
        keep={column: values for column, values in schema.keep.items() if column not in lacking},
        optional_columns=(),
        items=replace(items, fields=tuple(name for name in from_items if name in fields)) if items else None,
    )


def decide_layout(sample: pl.DataFrame, schema: Schema) -> Layout:
    """The layout of a log from its first rows.

    Raises:
        UserError: a column has a type that cannot be what the schema says.
    """
    exploded = isinstance(sample[schema.item].dtype, pl.List)
    if exploded:
        if schema.timestamp and not isinstance(sample[schema.timestamp].dtype, pl.List):
            raise UserError(f"the column '{schema.item}' holds lists and '{schema.timestamp}' does not")
        if isinstance(sample[schema.user].dtype, pl.List):
            raise UserError(f"the column '{schema.user}' holds lists, and a row of lists is one user")
        sample, _ = explode_rows(sample)
    for column in (schema.user, schema.item, *([schema.timestamp] if schema.timestamp else [])):
        if sample[column].dtype.is_nested():
            raise UserError(f"the column '{column}' is a {sample[column].dtype}, not one value")
    integers = _integer_columns(sample, schema.log_fields(), text_columns=schema.text_columns)
    integers |= {
        c
        for c in (schema.user, schema.item)
        if c not in schema.text_columns and _holds_integers(sample[c], text_counts=True)
    }
    unit = schema.timestamp_unit
    if unit == "auto" and schema.timestamp is not None:
        unit = _find_unit(sample[schema.timestamp], where=schema.timestamp)  # type: ignore[assignment]
    return Layout(
        schema=schema,
        integers=integers,
        time_unit=unit,
        time_unit_found=schema.timestamp_unit == "auto",
        exploded=exploded,
    )


def decide_item_layout(files: LogFiles, fields: dict[str, FieldSchema], *, log: Layout) -> ItemLayout:
    """The layout of an item file from its first rows; the ids of items are what they are in the log."""
    items = log.schema.items
    assert items is not None
    bare = ItemLayout(files=files, written=items, item=items.item, fields=fields, integers=frozenset())
    sample = read_sample(files, bare.columns(), written=items, list_columns=list_columns_of(fields.values()))
    if sample[items.item].dtype.is_nested():
        raise UserError(f"the column '{items.item}' is a {sample[items.item].dtype}, not one value")
    integers = _integer_columns(sample, fields, text_columns=log.schema.text_columns) - {items.item}
    return replace(bare, integers=integers | ({items.item} if log.schema.item in log.integers else set()))


def _integer_columns(
    sample: pl.DataFrame, fields: dict[str, FieldSchema], *, text_columns: tuple[str, ...]
) -> frozenset[str]:
    ids = [f.column for f in fields.values() if f.kind == "id" and f.column not in text_columns]
    categories = [f.column for f in fields.values() if f.kind == "categorical"]
    return frozenset(
        {c for c in ids if _holds_integers(sample[c], text_counts=True)}
        | {c for c in categories if _holds_integers(sample[c], text_counts=False)}
    )


def _holds_integers(values: pl.Series, *, text_counts: bool) -> bool:
    if isinstance(values.dtype, pl.List):
        values = values.explode()
    if values.dtype.is_integer():
        return True
    if values.dtype.is_float():
        return text_counts  # ids that some tool turned into floats; categories such as 3.5 become text
    if values.dtype != pl.String or not text_counts:
        return False
    filled = values.filter(values.is_not_null() & (values != ""))
    return len(filled) > 0 and int(filled.str.contains(_INTEGER).sum()) * 2 > len(filled)


def _find_unit(values: pl.Series, *, where: str) -> str:
    if values.dtype.is_temporal():
        return "iso"
    numbers = values.cast(pl.Float64, strict=False).drop_nulls().drop_nans()
    if len(numbers) * 2 < len(values.drop_nulls()):
        return "iso"
    size = numbers.abs().median()
    for limit, unit in UNIT_LIMITS:
        if not isinstance(size, float) or size < limit:
            return unit
    raise UserError("the times look like nanoseconds", where=where, fix="Divide them by 1000")
