"""From requests in raw values, as a log has them, to histories in ids, as the shards have them.

A request is one JSON object:

```
{"user": 17, "events": [{"item": 9, "timestamp": 1700000000, "device": "phone", "played_ratio_pct": 80}, ...],
 "at": 1700000600, "context": {"device": "phone"}, "items": [9, 12]}
```

An event may name its item and time as the log's columns or as `item` and `timestamp`; its other keys are columns of
the log. Columns of user files stand in `context`, once for all events. What is left out is missing; values that the
vocabulary lacks get id 0, as in the shards, and are counted.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megarec.base.errors import UserError, nearest
from megarec.base.jagged import lengths_to_offsets
from megarec.data.dataset import Dataset, FieldInfo
from megarec.data.schema import FieldSchema
from megarec.data.values import FALSE_TEXTS, MAX_TIME_US, MICROSECONDS, TRUE_TEXTS, UNIT_LIMITS, parse_time
from megarec.inference.histories import Histories

REQUEST_KEYS = ("user", "events", "at", "context", "items")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question in raw values.

    Attributes:
        user: given back with the answer; nothing else is done with it.
        events: what happened, in any order.
        at: the time of the question; None: that of the newest event.
        context: context columns of the question; those left out are as in the newest event.
        items: the only items to score; None: all of them.
        where: names the request in an error, such as `line 3`.
    """

    user: Any = None
    events: Sequence[Mapping[str, Any]] = ()
    at: Any = None
    context: Mapping[str, Any] = field(default_factory=dict)
    items: Sequence[Any] | None = None
    where: str = ""


def parse_request(line: str, *, where: str) -> Request:
    """The request in a line of JSON.

    Raises:
        UserError: it is not JSON, or not of a request's form.
    """
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        raise UserError(f"not valid JSON ({error})", where=where) from None
    if not isinstance(raw, dict):
        raise UserError("a request is a JSON object", where=where)
    for key in raw:
        if key not in REQUEST_KEYS:
            raise UserError(f"unknown key '{key[:40]}'", where=where, fix=nearest(key, list(REQUEST_KEYS)))
    events, context, items = raw.get("events", []), raw.get("context") or {}, raw.get("items")
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise UserError("'events' is a list of objects", where=where)
    if not isinstance(context, dict):
        raise UserError("'context' is an object", where=where)
    if items is not None and (not isinstance(items, list) or not items):
        raise UserError("'items' is a list of at least one item", where=where)
    return Request(user=raw.get("user"), events=events, at=raw.get("at"), context=context, items=items, where=where)


class RawReader:
    """Reads raw values as `megarec-make-shards` did.

    Args:
        catalog: fields, schema, `items.parquet` and `vocab/`: a dataset, or a bundle's.

    Attributes:
        unknown: how often a field had a value that its vocabulary lacks, by field.
        ignored: how often an event had a key that is no column of the schema, by key.
        dropped_events: events that the schema's row filter leaves out.
    """

    def __init__(self, catalog: Dataset) -> None:
        self._catalog = catalog
        self._item_of = {raw: number for number, raw in enumerate(catalog.item_raw()) if number}
        self._vocabulary = {
            name: _read_vocabulary(catalog.path / "vocab" / f"{name}.parquet", info)
            for name, info in catalog.fields.items()
            if info.kind in ("id", "categorical") and info.role in ("context", "feedback")
        }
        self.unknown: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self.dropped_events = 0

    def read(self, requests: Sequence[Request]) -> Histories:
        """The histories of `requests`, in time order, and their questions.

        Raises:
            UserError: a value cannot be read; names the request and the event.
        """
        events = [self._events(request) for request in requests]
        flat = [event for history in events for event in history]
        names = [name for name, info in self._catalog.fields.items() if info.role != "item_side"]
        context = [name for name in names if self._catalog.fields[name].role == "context"]
        return Histories(
            user=np.full(len(requests), -1, dtype=np.int64),
            cu_seqlens=lengths_to_offsets(np.array([len(history) for history in events], dtype=np.int64)),
            timestamp=np.array([event["timestamp"] for event in flat], dtype=np.int64),
            fields={name: self._column(name, [event[name] for event in flat]) for name in names},
            query_time=np.array([self._time(r, h) for r, h in zip(requests, events, strict=True)], dtype=np.int64),
            query_fields={
                name: self._column(name, [self._question(r, h, name) for r, h in zip(requests, events, strict=True)])
                for name in context
            },
        )

    def outcome_names(self, field: str) -> list[str]:
        """What the ids 1, 2, ... of a feedback field stand for: values of the log, or the bounds of bins."""
        edges = [f"{edge:g}" for edge in self._catalog.fields[field].edges]
        if edges:
            inner = [f"{low} to {high}" for low, high in pairwise(edges)]
            return [f"below {edges[0]}", *inner, f"{edges[-1]} and up"]
        raw_of = {number: str(raw) for raw, number in self._vocabulary[field].items()}
        return [raw_of[number] for number in range(1, self._catalog.fields[field].num_ids)]

    def item_ids(self, raw: Sequence[Any]) -> list[int]:
        """The ids of raw items; 0 for those that are not in the catalog, which are counted."""
        return [self._item(value) for value in raw]

    def _events(self, request: Request) -> list[dict[str, Any]]:
        events = []
        columns = {field.column for field in self._catalog.schema.fields_of("user").values()}
        of_user = {column: value for column, value in request.context.items() if column in columns}
        for number, event in enumerate(request.events, start=1):
            where = f"{request.where}, event {number}".removeprefix(", ")
            if self._is_kept(event):
                events.append(self._event({**of_user, **event}, where))
            else:
                self.dropped_events += 1
        return sorted(events, key=lambda event: int(event["timestamp"]))  # stable: equal times keep their order

    def _is_kept(self, event: Mapping[str, Any]) -> bool:
        return all(_is_one_of(event[c], values) for c, values in self._catalog.schema.keep.items() if c in event)

    def _event(self, event: Mapping[str, Any], where: str) -> dict[str, Any]:
        schema = self._catalog.schema
        item = event.get("item", event.get(schema.item))
        if item is None or isinstance(item, list | dict):
            raise UserError(f"no item under '{schema.item}' or 'item'", where=where)
        ids: dict[str, Any] = {"item": self._item(item), "timestamp": 0}
        if self._catalog.has_timestamps:
            time = event.get("timestamp", event.get(schema.timestamp or "timestamp"))
            ids["timestamp"] = read_seconds(time, schema.timestamp_unit, where=where)
        known = {"item", "timestamp", *schema.columns(), *(f.column for f in schema.event_fields().values())}
        self.ignored.update(key for key in event if key not in known)
        for name, info in self._catalog.fields.items():
            if info.role in ("context", "feedback"):
                ids[name] = self._field(name, event.get(schema.fields[name].column), where)
        return ids

    def _question(self, request: Request, history: list[dict[str, Any]], name: str) -> Any:
        column = self._catalog.schema.fields[name].column
        if column in request.context:
            return self._field(name, request.context[column], f"{request.where}, context".removeprefix(", "))
        return history[-1][name] if history else self._empty(self._catalog.fields[name])

    def _time(self, request: Request, history: list[dict[str, Any]]) -> int:
        newest: int = history[-1]["timestamp"] if history else 0
        if request.at is None or not self._catalog.has_timestamps:
            return newest
        where = f"{request.where}, at".removeprefix(", ")
        at = read_seconds(request.at, self._catalog.schema.timestamp_unit, where=where)
        if at < newest:
            raise UserError("the question is asked before the newest event", where=where)
        return at

    def _column(self, name: str, values: list[Any]) -> np.ndarray:
        slots = self._catalog.fields[name].slots
        return np.array(values, dtype=np.int64).reshape((len(values),) if slots == 1 else (len(values), slots))

    def _item(self, value: Any) -> int:
        number = find_id(self._item_of, value)
        self.unknown["item"] += number == 0
        return number

    def _field(self, name: str, value: Any, where: str) -> Any:
        info, schema = self._catalog.fields[name], self._catalog.schema.fields[name]
        if value is None or value == "":
            return self._empty(info)
        if name in self._vocabulary:
            values = _split(value, schema) if info.slots > 1 else [value]
            ids = [find_id(self._vocabulary[name], v) for v in values[: info.slots]]
            self.unknown[name] += ids.count(0)
            return ids[0] if info.slots == 1 else ids + [-1] * (info.slots - len(ids))
        where = f"{where}, '{schema.column}'"
        if info.kind == "flag" and schema.at_least is None:
            return _read_flag(value, where=where)
        number = _read_number(value, where=where)
        if info.kind == "flag":
            return 1 + int(number >= (schema.at_least or 0.0))
        return 1 + int(np.searchsorted(np.array(info.edges), number, side="right"))

    @staticmethod
    def _empty(info: FieldInfo) -> Any:
        return 0 if info.slots == 1 else [-1] * info.slots


def read_seconds(value: Any, unit: str, *, where: str) -> int:
    """Whole seconds since 1970 of a number or a text in `unit` (`auto`: by its size, or ISO 8601).

    Raises:
        UserError: it is no time.
    """
    number: float | None = None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number or (isinstance(value, str) and unit != "iso"):
        try:
            number = float(value)
        except ValueError:
            number = None
        except OverflowError:
            number = math.inf
    if number is None:
        number, unit = _parse_moment(value, where=where), "us"
    if not math.isfinite(number) or number < 0:
        raise UserError(f"{str(value)[:40]!r} is not a time", where=where)
    if unit not in MICROSECONDS:
        unit = next((name for limit, name in UNIT_LIMITS if number < limit), "us")
    if number * MICROSECONDS[unit] > MAX_TIME_US:
        raise UserError(f"{str(value)[:40]!r} is beyond the year 9999", where=where)
    return int(number * MICROSECONDS[unit] // MICROSECONDS["s"])


def _parse_moment(value: Any, *, where: str) -> int:
    if value is None:
        raise UserError("no timestamp", where=where)
    moment = parse_time(value) if isinstance(value, str) else None
    if moment is None:
        raise UserError(f"{str(value)[:40]!r} is not a time", where=where)
    return moment


def _read_vocabulary(path: Path, info: FieldInfo) -> dict[Any, int]:
    import polars as pl

    try:
        frame = pl.read_parquet(path, columns=["id", "raw"])
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"not a readable vocabulary ({error})", where=str(path)) from None
    ids = frame["id"].to_list()
    if any(not 0 < number < info.num_ids for number in ids):
        raise UserError("it holds ids that the field does not have", where=str(path), fix="Convert again")
    return dict(zip(frame["raw"].to_list(), ids, strict=True))


def find_id(vocabulary: Mapping[Any, int], value: Any) -> int:
    """The id of a raw value; text and numbers that look the same are the same, as in a CSV and a Parquet file."""
    if isinstance(value, list | dict):
        return 0
    forms = [value, str(value)]
    if isinstance(value, bool):
        forms = ["true" if value else "false"]
    elif isinstance(value, str):
        forms.append(int(value) if value.lstrip("-").isdecimal() and len(value) < 21 else value)
    elif isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        forms += [str(int(value)), f"{int(value)}.0"]
    return next((vocabulary[form] for form in forms if form in vocabulary), 0)


def _is_one_of(value: Any, wanted: Sequence[Any]) -> bool:
    """As the shards decide: a number is one of the numbers, anything else is compared as text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value in [_to_float(str(w)) for w in wanted]
    text, *texts = (str(v).lower() if isinstance(v, bool) else str(v) for v in (value, *wanted))
    return text in texts


def _split(value: Any, schema: FieldSchema) -> list[Any]:
    if isinstance(value, str) and schema.separator:
        value = value.split(schema.separator)
    values = value if isinstance(value, list) else [value]
    return [v for v in values if v is not None and v != ""]


def _read_flag(value: Any, *, where: str) -> int:
    text = str(value).lower()
    if text not in TRUE_TEXTS + FALSE_TEXTS:
        raise UserError(f"{str(value)[:40]!r} is neither true nor false", where=where)
    return 1 + int(text in TRUE_TEXTS)


def _read_number(value: Any, *, where: str) -> float:
    number = _to_float(value)
    if not math.isfinite(number):
        raise UserError(f"{str(value)[:40]!r} is not a finite number", where=where)
    return number


def _to_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
