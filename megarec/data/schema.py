"""What the columns of an event log mean: who, what, when, and how it went."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from megarec.base.config import build, plain
from megarec.base.errors import UserError, nearest

Role = Literal["item_side", "context", "feedback"]
Described = Literal["item", "user"]
FieldKind = Literal["id", "categorical", "numeric", "flag"]

RESERVED_NAMES = ("item", "user", "timestamp", "time", "hash", "users")  # make-shards has columns so called
ITEM_COLUMNS = ("id", "raw", "count", "first_seen", "last_seen")  # and items.parquet these, beside item-side fields
MAX_QUANTILES = 1000
MAX_SCHEMA_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FieldSchema:
    """One field of an event; two fields may read the same column.

    Attributes:
        column: the column of the log it is read from.
        role: `item_side` belongs to the item (artist, category), `context` is known before the choice (device, hour),
            `feedback` only after it (rating, played ratio).
        kind: `id` and `categorical` get a vocabulary (an id is text or an integer, a categorical whatever the log has),
            `numeric` is cut into bins, `flag` is yes or no.
        edges: numeric: the bin edges, ascending; a value lies in the bin with as many edges below or at it.
        num_quantiles: numeric: bins of equal share found from the train events, instead of `edges`.
        at_least: flag: yes when the value is at least this; without it the column holds true/false or 1/0.
        max_values: more than 1 for a column of lists, of which the first `max_values` are kept.
        separator: what divides the values of a list written as text.
    """

    column: str
    role: Role
    kind: FieldKind
    edges: tuple[float, ...] = ()
    num_quantiles: int = 0
    at_least: float | None = None
    max_values: int = 1
    separator: str | None = None

    def __post_init__(self) -> None:
        if self.kind == "numeric":
            if bool(self.edges) == bool(self.num_quantiles):
                raise UserError("a numeric field needs either edges or num_quantiles")
            if any(not a < b for a, b in zip(self.edges, self.edges[1:], strict=False)):
                raise UserError("edges are not ascending")
            if self.num_quantiles and not 2 <= self.num_quantiles <= MAX_QUANTILES:
                raise UserError(f"num_quantiles is not between 2 and {MAX_QUANTILES}")
        elif self.edges or self.num_quantiles:
            raise UserError(f"edges and num_quantiles belong to numeric fields, this is {self.kind}")
        if self.at_least is not None and self.kind != "flag":
            raise UserError(f"at_least belongs to flag fields, this is {self.kind}")
        if not 1 <= self.max_values <= 255:
            raise UserError("max_values is not between 1 and 255")
        if self.max_values > 1 and self.kind not in ("id", "categorical"):
            raise UserError(f"only id and categorical fields hold several values, this is {self.kind}")
        if self.separator is not None and (self.max_values == 1 or not self.separator):
            raise UserError("separator needs max_values above 1 and at least one character")


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """How files are written.

    Attributes:
        file_format: of files whose suffix does not say it; `sequences` is one user a line, its items apart by blanks,
            with the columns `line` (the number of the line) and `items`.
        delimiter: between the values of a line; by default a comma in `csv`, a tab in `tsv`.
        quoted: whether a value may stand in double quotes; by default in `csv` only.
        column_names: of files without a header line.
        encoding: of text files.
    """

    file_format: Literal["auto", "parquet", "csv", "tsv", "jsonl", "sequences"] = "auto"
    delimiter: str | None = None
    quoted: bool | None = None
    column_names: tuple[str, ...] = ()
    encoding: Literal["utf-8", "latin-1"] = "utf-8"

    def __post_init__(self) -> None:
        if self.delimiter is not None and (not self.delimiter or not self.delimiter.isascii()):
            raise UserError("the delimiter is not one or more ASCII characters")
        if self.delimiter is not None and len(self.delimiter) > 1 and self.quoted:
            raise UserError("quoted values need a delimiter of one character")


@dataclass(frozen=True, kw_only=True)
class SideFiles(FileFormat):
    """How to read files beside the log that describe its items or its users, one a row.

    Attributes:
        fields: the fields that are read from these files and not from the log; each from the files that have its
            column.
    """

    fields: tuple[str, ...]

    @property
    def key(self) -> str:
        """The column of the id of what a row describes."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ItemFiles(SideFiles):
    """Files of items; their fields are item-side.

    Attributes:
        item: the column of the item's id.
        extends_catalog: whether an item that only these files have belongs to the catalog.
    """

    item: str
    extends_catalog: bool = False

    @property
    def key(self) -> str:
        """See `SideFiles`."""
        return self.item


@dataclass(frozen=True, kw_only=True)
class UserFiles(SideFiles):
    """Files of users; their fields are context, the same in all events of a user.

    Attributes:
        user: the column of the user's id.
    """

    user: str

    @property
    def key(self) -> str:
        """See `SideFiles`."""
        return self.user


@dataclass(frozen=True, kw_only=True)
class Schema(FileFormat):
    """How to read a log.

    Attributes:
        name: what messages call it.
        user, item: the columns of the user's and the item's id: integers of 64 bits or text.
        timestamp: the column of the time; None keeps the order of the log.
        timestamp_unit: of numbers: seconds, milli- or microseconds since 1970 (`auto` decides by their size); `iso` is
            text such as 2024-05-01T12:00:00Z. Columns of a timestamp type need no unit.
        fields: what else to read, by the name the field has from here on.
        keep: rows to read: those whose column holds one of the values. Others are counted, not rejected.
        optional_columns: columns of `fields` and `keep` that a log may lack; it then has no such field or filter.
        text_columns: columns of ids that are text even where they look like integers.
        items, users: how to read item files and user files. Without such files their fields are absent, but for those
            with an optional column that the log has.
        aliases: other names of a ready schema.
    """

    name: str
    user: str
    item: str
    timestamp: str | None = None
    timestamp_unit: Literal["auto", "s", "ms", "us", "iso"] = "auto"
    fields: dict[str, FieldSchema] = field(default_factory=dict)
    keep: dict[str, list[Any]] = field(default_factory=dict)
    optional_columns: tuple[str, ...] = ()
    text_columns: tuple[str, ...] = ()
    items: ItemFiles | None = None
    users: UserFiles | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, field_schema in self.fields.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
                raise UserError(f"'{name}' is no field name", fix="Use letters, digits and underscores")
            if name in RESERVED_NAMES or (field_schema.role == "item_side" and name in ITEM_COLUMNS):
                raise UserError(f"the field name '{name}' is taken", fix="Choose another")
        for described, files in self.side_files().items():
            role, called = ("item_side", "item-side") if described == "item" else ("context", "context")
            for name in files.fields:
                if name not in self.fields or self.fields[name].role != role:
                    raise UserError(f"{described}s.fields names '{name}', which is no {called} field")
        for column in self.optional_columns:
            if column in (self.user, self.item, self.timestamp):
                raise UserError(f"the column '{column}' cannot be optional")
        for column, values in self.keep.items():
            if not values or not all(isinstance(v, str | int | float | bool) for v in values):
                raise UserError(f"keep.{column} is not a list of values")

    def side_files(self) -> dict[Described, SideFiles]:
        """How to read the files beside the log, by what they describe."""
        both: dict[Described, SideFiles | None] = {"item": self.items, "user": self.users}
        return {described: files for described, files in both.items() if files is not None}

    def fields_of(self, described: Described) -> dict[str, FieldSchema]:
        """The fields that are read from the item files, or from the user files."""
        files = self.side_files().get(described)
        return {name: self.fields[name] for name in (files.fields if files else ())}

    def log_fields(self) -> dict[str, FieldSchema]:
        """The fields that are read from the log."""
        elsewhere = self.fields_of("item") | self.fields_of("user")
        return {name: field for name, field in self.fields.items() if name not in elsewhere}

    def event_fields(self) -> dict[str, FieldSchema]:
        """The fields that each event has by itself: those of the log, and those of its user."""
        of_items = self.fields_of("item")
        return {name: field for name, field in self.fields.items() if name not in of_items}

    def columns(self) -> list[str]:
        """Every column of the log that is read, each once."""
        wanted = [self.user, self.item, self.timestamp, *(f.column for f in self.log_fields().values()), *self.keep]
        return list(dict.fromkeys(c for c in wanted if c is not None))


def ready_schemas() -> dict[str, str]:
    """The yaml text of the schemas that ship with megarec, by their names and aliases."""
    folder = resources.files("megarec.data") / "schemas"
    texts = [entry.read_text(encoding="utf-8") for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    named: dict[str, str] = {}
    for text in texts:
        schema = yaml.safe_load(text)
        named |= dict.fromkeys([schema["name"], *schema.get("aliases", ())], text)
    return dict(sorted(named.items()))


def load_schema(path_or_name: str | Path) -> Schema:
    """A ready schema by its name, or the schema in a yaml file.

    Raises:
        UserError: neither exists (names the nearest ready schema and all others), or the file holds no valid schema.
    """
    text, ready = str(path_or_name), ready_schemas()
    if text in ready:
        return parse_schema(ready[text], where=text)
    path = Path(text)
    if not path.is_file():
        if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            raise UserError("no such schema file", where=text)
        fix = f"{nearest(text, [*ready, 'infer'])} Ready schemas: {', '.join(ready)}"
        raise UserError(f"unknown schema '{text}'", fix=fix)
    if path.stat().st_size > MAX_SCHEMA_BYTES:
        raise UserError(f"a schema is at most {MAX_SCHEMA_BYTES} bytes", where=text)
    return parse_schema(path.read_text(encoding="utf-8", errors="replace"), where=text)


def parse_schema(text: str, *, where: str) -> Schema:
    """The schema in a yaml text; `where` names it in messages.

    Raises:
        UserError: the text is not yaml or does not hold a valid schema.
    """
    try:
        mapping = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"not valid yaml ({' '.join(str(error).split())})", where=where) from None
    if not isinstance(mapping, Mapping):
        raise UserError("a schema is a mapping of keys", where=where, fix="See docs/data_format.md")
    try:
        return build(Schema, mapping)
    except UserError as error:
        raise UserError(str(error), where=where) from None


def schema_text(schema: Schema) -> str:
    """`schema` as yaml that `parse_schema` reads; what is as by default is left out."""
    mapping = _changed(schema)
    if schema.fields:
        mapping["fields"] = {name: _changed(f) for name, f in schema.fields.items()}
    for described, files in schema.side_files().items():
        mapping[f"{described}s"] = _changed(files)
    return yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True)


def _changed(config: FileFormat | FieldSchema) -> dict[str, Any]:
    """The settings that are not as by default."""
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config)}
    return {name: value for name, value in plain(config).items() if getattr(config, name) != defaults[name]}


_USER_NAMES = ("user", "uid", "userid", "customer", "customerid", "visitorid", "memberid", "accountid", "reviewerid")
_ITEM_NAMES = (
    *("item", "itemid", "iid", "movie", "movieid", "product", "productid", "song", "songid", "track", "trackid"),
    *("video", "videoid", "article", "articleid", "contentid", "parentasin", "asin"),
)
_TIME_NAMES = ("timestamp", "time", "ts", "timems", "eventtime", "datetime", "date", "createdat", "unixreviewtime")
_FEEDBACK = (
    "rating",
    "score",
    "like",
    "dislike",
    "click",
    "played",
    "watch",
    "event",
    "action",
    "feedback",
    "purchase",
)
_ITEM_SIDE = ("artist", "album", "author", "brand", "category", "genre", "publisher", "price", "tag")
_MANY_VALUES = 100
_SEPARATOR = "|"


def infer_schema(sample: Mapping[str, list[Any]], *, where: str) -> Schema:
    """A schema for approval, guessed from the names of the columns and from their first values.

    A column that looks like free text is left out; text such as `drama|war` is a list. What has a name like a rating
    or a click is feedback, what has a name like an artist or a genre belongs to the item, everything else is context.

    Args:
        sample: the first values of each column, as the file holds them or as text.
        where: names the log in a message.

    Raises:
        UserError: no column is called like a user, or none like an item.
    """
    user = _find_column(sample, _USER_NAMES)
    item = _find_column(sample, _ITEM_NAMES)
    for what, column in (("user", user), ("item", item)):
        if column is None:
            fix = f"Write a schema. The columns are: {', '.join(sample)}"
            raise UserError(f"no column looks like the {what}", where=where, fix=fix)
    timestamp = _find_column(sample, _TIME_NAMES)
    fields = {}
    for column, values in sample.items():
        if column not in (user, item, timestamp):
            guess = _guess_field(column, values)
            if guess is not None:
                fields[_field_name(column)] = guess
    assert user is not None and item is not None
    return Schema(name="inferred", user=user, item=item, timestamp=timestamp, fields=fields)


def _find_column(sample: Mapping[str, list[Any]], names: tuple[str, ...]) -> str | None:
    for name in names:
        for column in sample:
            if re.sub(r"[^a-z]", "", column.split(":")[0].lower()) == name:
                return column
    return None


def _field_name(column: str) -> str:
    name = re.sub(r"\W", "_", column.split(":")[0], flags=re.ASCII)[:60]
    return f"field_{name}" if not name or name[0].isdigit() or name in RESERVED_NAMES + ITEM_COLUMNS else name


def _guess_field(column: str, values: list[Any]) -> FieldSchema | None:
    name = column.lower()
    role: Role = "context"
    if any(part in name for part in _FEEDBACK):
        role = "feedback"
    elif any(part in name for part in _ITEM_SIDE):
        role = "item_side"
    filled = [v for v in values if v is not None and v != ""]
    if not filled or any(isinstance(v, dict | bytes) for v in filled):
        return None
    if any(isinstance(v, list) for v in filled):
        return FieldSchema(column=column, role=role, kind="categorical", max_values=8)
    if _is_list_as_text(filled):
        return FieldSchema(column=column, role=role, kind="categorical", max_values=8, separator=_SEPARATOR)
    distinct = {str(v).lower() for v in filled}
    if distinct <= {"true", "false"} or distinct == {"0", "1"}:
        return FieldSchema(column=column, role=role, kind="flag")
    if len(distinct) <= _MANY_VALUES:
        return FieldSchema(column=column, role=role, kind="categorical")
    if name.split(":")[0].endswith("id"):
        return FieldSchema(column=column, role=role, kind="id")
    if all(_is_number(v) for v in filled):
        return FieldSchema(column=column, role=role, kind="numeric", num_quantiles=10)
    few = len(distinct) * 2 <= len(filled)
    return FieldSchema(column=column, role=role, kind="id") if few else None


def _is_list_as_text(values: list[Any]) -> bool:
    parts = {part for value in values for part in str(value).split(_SEPARATOR)}
    return any(_SEPARATOR in str(value) for value in values) and len(parts) <= _MANY_VALUES


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
