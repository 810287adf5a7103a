"""What is decided once for a whole log, from its first rows: which ids are integers and the unit of the time."""

from dataclasses import dataclass, replace

import polars as pl

from megarec.base.errors import UserError
from megarec.data.schema import Described, FieldSchema, FileFormat, Schema
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
        """The frame columns of every field of the events with a vocabulary; `item` is one, of one column."""
        slots = {"item": ["item"]}
        for name, field in self.schema.event_fields().items():
            if field.kind in ("id", "categorical"):
                slots[name] = slot_columns(name, field)
        return slots


def slot_columns(name: str, field: FieldSchema) -> list[str]:
    """The frame columns of a field: one, or one per kept value."""
    return [name] if field.max_values == 1 else [f"{name}/{slot}" for slot in range(field.max_values)]


@dataclass(frozen=True, kw_only=True)
class SideLayout:
    """How one item file or user file is read.

    Attributes:
        described: what a row describes.
        files: the file.
        written: how it is written.
        key: the column of the id of what is described.
        fields: the fields that are read from it.
        integers: as in `Layout`.
    """

    described: Described
    files: LogFiles
    written: FileFormat
    key: str
    fields: dict[str, FieldSchema]
    integers: frozenset[str]

    def columns(self) -> list[str]:
        """Every column that is read, each once."""
        return list(dict.fromkeys([self.key, *(field.column for field in self.fields.values())]))


def narrow_schema(schema: Schema, present: list[str], *, present_beside: dict[Described, set[str]]) -> Schema:
    """`schema` without what its files lack.

    Args:
        schema: all that could be read.
        present: the columns of the log; only optional ones may be missing.
        present_beside: the columns of the item files and of the user files; without such files, none.
    """
    lacking = set(schema.optional_columns) - set(present)
    absent = {name for name, field in schema.log_fields().items() if field.column in lacking}
    for described in schema.side_files():
        columns = present_beside.get(described) or set(schema.optional_columns) - lacking
        absent |= {name for name, field in schema.fields_of(described).items() if field.column not in columns}

    def of_files(described: Described) -> tuple[str, ...]:
        return tuple(name for name in schema.fields_of(described) if name not in absent)

    return replace(
        schema,
        fields={name: field for name, field in schema.fields.items() if name not in absent},
        keep={column: values for column, values in schema.keep.items() if column not in lacking},
        optional_columns=(),
        items=replace(schema.items, fields=of_files("item")) if schema.items and "item" in present_beside else None,
        users=replace(schema.users, fields=of_files("user")) if schema.users and "user" in present_beside else None,
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


def decide_side_layout(
    files: LogFiles, fields: dict[str, FieldSchema], *, described: Described, log: Layout
) -> SideLayout:
    """The layout of an item or user file from its first rows; the ids it describes are what they are in the log."""
    written = log.schema.side_files()[described]
    key, key_in_log = written.key, log.schema.item if described == "item" else log.schema.user
    bare = SideLayout(described=described, files=files, written=written, key=key, fields=fields, integers=frozenset())
    sample = read_sample(files, bare.columns(), written=written, list_columns=list_columns_of(fields.values()))
    if sample[key].dtype.is_nested():
        raise UserError(f"the column '{key}' is a {sample[key].dtype}, not one value")
    integers = _integer_columns(sample, fields, text_columns=log.schema.text_columns) - {key}
    return replace(bare, integers=integers | ({key} if key_in_log in log.integers else set()))


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
