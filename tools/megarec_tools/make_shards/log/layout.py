"""What is decided once for a whole log, from its first rows: which ids are integers and the unit of the time."""

from dataclasses import dataclass, replace

import polars as pl

from megarec.base.errors import UserError
from megarec.data.schema import FieldSchema, Schema
from megarec.data.values import UNIT_LIMITS

_INTEGER = r"^(0|-?[1-9][0-9]*)$"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the columns of one log are read.

    Attributes:
        schema: the schema, without the fields and filters whose optional column the log lacks.
        integers: the columns whose ids are integers; all other ids are text.
        time_unit: `s`, `ms`, `us` or `iso`.
        time_unit_found: whether the unit was found from the log instead of given.
    """

    schema: Schema
    integers: frozenset[str]
    time_unit: str
    time_unit_found: bool

    @property
    def vocabulary_slots(self) -> dict[str, list[str]]:
        """The frame columns of every field with a vocabulary; `item` is one, of one column."""
        slots = {"item": ["item"]}
        for name, field in self.schema.fields.items():
            if field.kind in ("id", "categorical"):
                slots[name] = slot_columns(name, field)
        return slots


def slot_columns(name: str, field: FieldSchema) -> list[str]:
    """The frame columns of a field: one, or one per kept value."""
    return [name] if field.max_values == 1 else [f"{name}/{slot}" for slot in range(field.max_values)]


def narrow_schema(schema: Schema, present: list[str]) -> Schema:
    """`schema` without the fields and filters whose optional column is not among the `present` ones."""
    lacking = set(schema.optional_columns) - set(present)
    return replace(
        schema,
        fields={name: field for name, field in schema.fields.items() if field.column not in lacking},
        keep={column: values for column, values in schema.keep.items() if column not in lacking},
        optional_columns=(),
    )


def decide_layout(sample: pl.DataFrame, schema: Schema) -> Layout:
    """The layout of a log from its first rows.

    Raises:
        UserError: a column has a type that cannot be what the schema says.
    """
    for column in (schema.user, schema.item, *([schema.timestamp] if schema.timestamp else [])):
        if sample[column].dtype.is_nested():
            raise UserError(f"the column '{column}' is a {sample[column].dtype}, not one value")
    id_columns = [schema.user, schema.item, *(f.column for f in schema.fields.values() if f.kind == "id")]
    category_columns = [f.column for f in schema.fields.values() if f.kind == "categorical"]
    integers = {c for c in id_columns if c not in schema.text_columns and _holds_integers(sample[c], text_counts=True)}
    integers |= {c for c in category_columns if _holds_integers(sample[c], text_counts=False)}
    unit = schema.timestamp_unit
    if unit == "auto" and schema.timestamp is not None:
        unit = _find_unit(sample[schema.timestamp], where=schema.timestamp)  # type: ignore[assignment]
    return Layout(
        schema=schema,
        integers=frozenset(integers),
        time_unit=unit,
        time_unit_found=schema.timestamp_unit == "auto",
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
