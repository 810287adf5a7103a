"""From raw columns to ids, times and numbers of one type; rows that cannot be used are named with their reason."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from megarec.base.errors import UserError
from megarec.data.schema import FieldSchema, Schema
from megarec.data.values import FALSE_TEXTS, MAX_TIME_US, MICROSECONDS, TRUE_TEXTS, parse_time
from megarec_tools.make_shards.log.layout import Layout, SideLayout, slot_columns
from megarec_tools.make_shards.log.reading import NOT_SCALAR, UNREADABLE

_YEAR_1973_US = 100_000_000 * 1_000_000

Mask = npt.NDArray[np.bool_]


class Rejects:
    """The rows of one frame that cannot be used; a row counts once, for its first reason.

    Attributes:
        signs: (column, `negative` or `big`) for integer ids below 0, or of 2^63 and more.
    """

    def __init__(self, num_rows: int) -> None:
        self.code = np.zeros(num_rows, np.uint16)
        self.reasons: list[str] = [""]
        self.values: dict[int, str] = {}
        self.signs: set[tuple[str, str]] = set()

    def note(self, bad: pl.Series | Mask, reason: str, values: pl.Series) -> None:
        """Rejects the rows where `bad` is true; `values` says what stood there."""
        mask = (bad.fill_null(False).to_numpy() if isinstance(bad, pl.Series) else bad) & (self.code == 0)
        if not mask.any():
            return
        self.reasons.append(reason)
        self.code[mask] = len(self.reasons) - 1
        for row in np.flatnonzero(mask)[:1].tolist():
            self.values[row] = str(values[row])[:80]

    def note_signs(self, ids: pl.Series, *, negative: str) -> None:
        """Records that integer ids below 0 stand for themselves (`negative`) or for ids of 2^63 and more (`big`)."""
        if len(ids) and not ids.dtype.is_unsigned_integer() and (ids.min() or 0) < 0:  # type: ignore[operator]
            self.signs.add((ids.name, negative))

    def frame(self, row: pl.Series) -> pl.DataFrame:
        """`row`, `reason`, and the `value` of the first row of each reason."""
        at = np.flatnonzero(self.code)
        reasons = pl.Series("reason", self.reasons, dtype=pl.String).gather(self.code[at].astype(np.int64))
        values = pl.Series("value", [self.values.get(i) for i in at.tolist()], dtype=pl.String)
        return pl.DataFrame([row.gather(at).cast(pl.Int64).alias("row"), reasons, values])


def keep_rows(frame: pl.DataFrame, keep: dict[str, list[Any]]) -> pl.DataFrame:
    """The rows whose columns hold one of the values that `keep` lists."""
    for column, values in keep.items():
        if frame[column].dtype.is_numeric():
            numbers = pl.Series(map(str, values), dtype=pl.String).cast(pl.Float64, strict=False).drop_nulls()
            frame = frame.filter(pl.col(column).cast(pl.Float64).is_in(numbers.implode()))
        else:
            texts = [str(v).lower() if isinstance(v, bool) else str(v) for v in values]
            frame = frame.filter(pl.col(column).cast(pl.String).is_in(texts))
    return frame


def clean(frame: pl.DataFrame, layout: Layout) -> tuple[pl.DataFrame, Rejects]:
    """The usable rows with typed columns, and the rest.

    Args:
        frame: raw columns and `#row`.
        layout: how to read them.

    Returns:
        `user`, `item` and vocabulary fields as Int64 or String, `time` in microseconds, `numeric` fields as Float64,
        flags as ids; a field of several values has one column per slot. And what is wrong with the others.
    """
    schema = layout.schema
    rejects = Rejects(len(frame))
    columns = [
        _ids(frame[schema.user], layout.integers, rejects=rejects, required=True).alias("user"),
        _ids(frame[schema.item], layout.integers, rejects=rejects, required=True).alias("item"),
        _times(frame, schema, layout=layout, rejects=rejects).alias("time"),
    ]
    for name, field in schema.log_fields().items():
        columns += _field(frame[field.column], name, field, integers=layout.integers, rejects=rejects)
    return _good_rows(columns, rejects), rejects


def clean_side(frame: pl.DataFrame, layout: SideLayout) -> tuple[pl.DataFrame, Rejects]:
    """The usable rows of a side file: `#row`, `item` or `user`, its fields as `clean` gives them. And the rest."""
    rejects = Rejects(len(frame))
    columns = [
        frame["#row"].cast(pl.Int64),
        _ids(frame[layout.key], layout.integers, rejects=rejects, required=True).alias(layout.described),
    ]
    for name, field in layout.fields.items():
        columns += _field(frame[field.column], name, field, integers=layout.integers, rejects=rejects)
    return _good_rows(columns, rejects), rejects


def _good_rows(columns: list[pl.Series], rejects: Rejects) -> pl.DataFrame:
    good = pl.Series(rejects.code == 0)
    cleaned = pl.DataFrame(columns)
    return cleaned if good.all() else cleaned.filter(good)


def _field(
    values: pl.Series, name: str, field: FieldSchema, *, integers: frozenset[str], rejects: Rejects
) -> list[pl.Series]:
    if isinstance(values.dtype, pl.List | pl.Array) and field.max_values == 1:
        raise UserError(f"the column '{field.column}' holds lists", fix=f"Set fields.{name}.max_values in the schema")
    if field.max_values > 1:
        lists = _lists(values, field)
        slots = slot_columns(name, field)
        picked = [lists.list.get(slot, null_on_oob=True).alias(field.column) for slot in range(len(slots))]
        return [_ids(p, integers, rejects=rejects).alias(s) for s, p in zip(slots, picked, strict=True)]
    if field.kind in ("id", "categorical"):
        return [_ids(values, integers, rejects=rejects).alias(name)]
    if field.kind == "flag" and field.at_least is None:
        return [_flags(values, rejects=rejects).alias(name)]
    numbers = _numbers(values, rejects=rejects)
    if field.at_least is not None:
        numbers = (numbers >= field.at_least).cast(pl.Int8) + 1
    return [numbers.alias(name)]


def _lists(values: pl.Series, field: FieldSchema) -> pl.Series:
    if isinstance(values.dtype, pl.Array):
        values = values.arr.to_list()
    if not isinstance(values.dtype, pl.List):
        text = _as_text(values)
        values = text.str.split(field.separator) if field.separator else text.cast(pl.List(pl.String))
    values = values.list.drop_nulls()
    if values.dtype == pl.List(pl.String):
        values = values.list.eval(pl.element().filter(pl.element() != ""))
    return values.list.head(field.max_values)


def _ids(values: pl.Series, integers: frozenset[str], *, rejects: Rejects, required: bool = False) -> pl.Series:
    column = values.name
    ids = _integers(values, rejects) if column in integers else _texts(values, rejects)
    if required:
        rejects.note(ids.is_null(), f"no id in '{column}'", values)
    return ids


def _texts(values: pl.Series, rejects: Rejects) -> pl.Series:
    text = _as_text(values)
    rejects.note(text.str.contains(UNREADABLE, literal=True), f"'{values.name}' is not UTF-8 text", values)
    rejects.note(text == NOT_SCALAR, f"'{values.name}' holds an object", values)
    return text.set(text == "", None)  # type: ignore[arg-type]


def _integers(values: pl.Series, rejects: Rejects) -> pl.Series:
    """Integers from -2^63 to 2^64 - 1; those of 2^63 and more wrap to negative ones (`Rejects.signs` says so)."""
    beyond, broken = f"'{values.name}' is beyond 64 bits", f"'{values.name}' is not an integer"
    if values.dtype == pl.UInt64:
        wrapped = values.reinterpret(signed=True)
        rejects.note_signs(wrapped, negative="big")
        return wrapped
    if values.dtype.is_integer():
        rejects.note_signs(values, negative="negative")
        return values.cast(pl.Int64)
    if values.dtype.is_float():
        whole = values.fill_nan(None)
        rejects.note(whole.abs() > 2.0**53, beyond, values)
        rejects.note(whole != whole.floor(), broken, values)
        return whole.cast(pl.Int64, strict=False)
    text = _as_text(values)
    numbers = text.cast(pl.Int64, strict=False)
    rejects.note_signs(numbers, negative="negative")
    same = numbers.cast(pl.String) == text  # 007 and +7 are not 7
    if bool(same.all(ignore_nulls=False)):
        return numbers
    empty = text.is_null() | (text == "")
    wide = text.cast(pl.UInt64, strict=False)
    big = ((wide >= 2**63) & (wide.cast(pl.String) == text)).fill_null(False)
    digits = text.str.contains(r"^-?[1-9][0-9]*$")
    fine = empty | same.fill_null(False) | big
    rejects.note(digits & numbers.is_null() & ~fine, beyond, values)
    rejects.note(~fine, broken, values)
    wrapped = wide.reinterpret(signed=True)
    rejects.note_signs(wrapped.filter(big), negative="big")
    return wrapped.zip_with(big, numbers)


def _times(frame: pl.DataFrame, schema: Schema, *, layout: Layout, rejects: Rejects) -> pl.Series:
    if schema.timestamp is None:
        return pl.Series(np.zeros(len(frame), np.int64))
    values = frame[schema.timestamp]
    name = schema.timestamp
    times = _microseconds(values, layout.time_unit)
    empty = values.is_null() | (values == "" if values.dtype == pl.String else values.is_null())
    rejects.note(empty, f"no time in '{name}'", values)
    rejects.note(times.is_null(), f"'{name}' is not a time", values)
    rejects.note(times < 0, f"'{name}' is a negative time", values)
    rejects.note(times > MAX_TIME_US, f"'{name}' is beyond the year 9999", values)
    if layout.time_unit_found and layout.time_unit in ("ms", "us"):
        reason = f"'{name}' is not in {layout.time_unit} as the first rows are"
        rejects.note(times < _YEAR_1973_US, reason, values)
    return times


def _microseconds(values: pl.Series, unit: str) -> pl.Series:
    if values.dtype == pl.Date:
        values = values.cast(pl.Datetime("us"))
    if isinstance(values.dtype, pl.Datetime):
        return values.dt.epoch("us")
    if values.dtype.is_temporal():
        raise UserError(f"the column '{values.name}' is a {values.dtype}, not a moment in time")
    if unit == "iso":
        distinct = _as_text(values).unique().drop_nulls()
        parsed = pl.Series([parse_time(text) for text in distinct], dtype=pl.Int64)
        return _as_text(values).replace_strict(distinct, parsed, default=None, return_dtype=pl.Int64)
    scale = MICROSECONDS[unit]
    limit = MAX_TIME_US // scale + 1
    if values.dtype.is_integer():
        bounded = values.clip(None, limit) if values.dtype == pl.UInt64 else values.cast(pl.Int64)
        return _scaled(bounded.cast(pl.Int64), limit, scale)
    floats = values.cast(pl.Float64, strict=False).fill_nan(None)
    scaled = (floats.clip(-1, limit) * scale).floor().cast(pl.Int64, strict=False)
    if values.dtype != pl.String:
        return scaled
    whole = values.cast(pl.Int64, strict=False)
    return _scaled(whole, limit, scale).zip_with(whole.is_not_null(), scaled)


def _scaled(numbers: pl.Series, limit: int, scale: int) -> pl.Series:
    return numbers.clip(-1, limit) * scale


def _numbers(values: pl.Series, *, rejects: Rejects) -> pl.Series:
    if not (values.dtype.is_numeric() or values.dtype in (pl.String, pl.Boolean)):
        raise UserError(f"the column '{values.name}' is a {values.dtype}, not a number")
    numbers = values.cast(pl.Float64, strict=False)
    if values.dtype == pl.String:
        rejects.note(numbers.is_null() & (values != ""), f"'{values.name}' is not a number", values)
    rejects.note(numbers.is_nan() | numbers.is_infinite(), f"'{values.name}' is not a finite number", values)
    return numbers


def _flags(values: pl.Series, *, rejects: Rejects) -> pl.Series:
    text = _as_text(values).str.to_lowercase()
    yes, no = text.is_in(TRUE_TEXTS), text.is_in(FALSE_TEXTS)
    rejects.note(~(yes | no) & (text != ""), f"'{values.name}' is neither true nor false", values)
    flags = yes.cast(pl.Int8) + 1
    return flags.set(~(yes | no).fill_null(False), None)  # type: ignore[arg-type]


def _as_text(values: pl.Series) -> pl.Series:
    if values.dtype == pl.String:
        return values
    convertible: list[Callable[[Any], bool]] = [
        lambda t: t.is_numeric(),
        lambda t: t == pl.Boolean,
        lambda t: isinstance(t, pl.Categorical | pl.Enum),
        lambda t: t == pl.Null,
    ]
    if not any(accepts(values.dtype) for accepts in convertible):
        raise UserError(f"the column '{values.name}' is a {values.dtype}, not an id")
    return values.cast(pl.String)
