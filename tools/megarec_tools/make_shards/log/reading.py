"""From a piece of a log to a polars frame of its raw columns; lines that are no rows are named, not lost."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from pyarrow import ArrowException
from pyarrow import csv as arrow_csv

from megarec.base.errors import UserError
from megarec.data.schema import FieldSchema, FileFormat
from megarec_tools.make_shards.log.files import LogFiles
from megarec_tools.make_shards.log.pieces import (
    Piece,
    damaged_parquet,
    first_text_piece,
    open_parquet,
    parse_json,
)

SAMPLE_ROWS = 10_000

NOT_A_ROW = "the line has another number of values than the header"
NOT_JSON = "the line is no JSON object"
NOT_EQUAL = "the lists of the row have different lengths"
NOT_SCALAR = "\x00"  # stands for an object where a value should be; no id or number can contain it
UNREADABLE = "\ufffd"  # what bytes that are not UTF-8 become


def read_piece(
    piece: Piece, columns: Sequence[str], *, list_columns: Collection[str] | None = None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Reads the `columns` of a piece.

    Values of text formats stay text, so that nothing is guessed per piece.

    Args:
        piece: what to read.
        columns: the columns to read.
        list_columns: JSON lines: the columns of lists; None takes those where a list occurs.

    Returns:
        The rows with their number `#row` in the piece (from 0), and the lines that are no rows: `row`, `reason`,
        `value`.
    """
    if piece.format == "parquet":
        return _read_parquet(piece, columns)
    if piece.format == "sequences":
        return _read_sequences(piece), _broken([], NOT_A_ROW)
    if piece.format == "jsonl":
        return _read_json_lines(piece.text, columns, list_columns=list_columns)
    return _read_delimited(piece, columns)


def list_columns_of(fields: Iterable[FieldSchema]) -> set[str]:
    """The columns that fields of several values are read from."""
    return {field.column for field in fields if field.max_values > 1}


def explode_rows(frame: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """One row per element of the lists of each row; columns without lists repeat. And the rows of unequal lists.

    An empty list, or none, is a user without events.
    """
    lists = [column for column in frame.columns if isinstance(frame[column].dtype, pl.List)]
    lengths = frame.select(pl.col(lists).list.len().fill_null(0))
    least, most = lengths.min_horizontal(), lengths.max_horizontal()
    unequal = (least != most).to_numpy()
    rows = frame["#row"].to_numpy()[unequal].tolist() if unequal.any() else []
    values = [str(lengths.row(at, named=True)) for at in np.flatnonzero(unequal).tolist()]
    exploded = frame.filter((least == most) & (most > 0)).explode(lists)
    return exploded, _broken(list(zip(rows, values, strict=True)), NOT_EQUAL)


def _read_sequences(piece: Piece) -> pl.DataFrame:
    lines = piece.text.decode("utf-8", errors="replace").removesuffix("\n").split("\n")
    numbers = pl.Series("#row", np.arange(len(lines)))
    items = pl.Series("items", lines, dtype=pl.String).str.extract_all(r"\S+")
    return pl.DataFrame([numbers, (numbers + piece.first_line).alias("line"), items])


def _read_parquet(piece: Piece, columns: Sequence[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    try:
        table: Any = piece.batch
        if table is None:
            file = open_parquet(piece.path)
            table = file.read_row_groups(list(piece.row_groups), columns=list(columns), use_threads=False)
        frame = pl.DataFrame(pl.from_arrow(table))
    except (ArrowException, OSError, pl.exceptions.PolarsError) as error:
        raise damaged_parquet(piece.path, error) from None
    return frame.select(columns).with_row_index("#row"), _broken([], NOT_A_ROW)


def _read_delimited(piece: Piece, columns: Sequence[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    assert piece.style is not None
    text = piece.text
    if len(piece.style.delimiter) > 1:
        text = text.replace(piece.style.delimiter.encode(), piece.style.one_byte_delimiter.encode())
    try:
        table, broken = _parse_delimited(piece, text, columns)
    except UnicodeDecodeError:
        table, broken = _parse_delimited(piece, text.decode("utf-8", errors="replace").encode(), columns)
    numbers = np.arange(table.num_rows + len(broken), dtype=np.int64)
    numbers = np.delete(numbers, [row for row, _ in broken])
    frame = pl.DataFrame(pl.from_arrow(table)).select(columns)
    return frame.insert_column(0, pl.Series("#row", numbers)), _broken(broken, NOT_A_ROW)


def _parse_delimited(piece: Piece, text: bytes, columns: Sequence[str]) -> tuple[pa.Table, list[tuple[int, str]]]:
    assert piece.style is not None
    broken: list[tuple[int, str]] = []
    if not text.strip():
        return pa.table({column: pa.array([], pa.large_string()) for column in columns}), broken

    def note(row: Any) -> str:
        broken.append((row.number - 1, row.text))
        return "skip"

    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(text),
            read_options=arrow_csv.ReadOptions(
                use_threads=False, column_names=list(piece.names), block_size=len(text) + 1
            ),
            parse_options=arrow_csv.ParseOptions(
                delimiter=piece.style.one_byte_delimiter,
                quote_char='"' if piece.style.quoted else False,
                newlines_in_values=piece.style.quoted,
                invalid_row_handler=note,
            ),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=list(columns),
                column_types=dict.fromkeys(columns, pa.large_string()),
                strings_can_be_null=False,
            ),
        )
    except ArrowException as error:
        if "UTF8" in str(error) or "UTF-8" in str(error):
            raise UnicodeDecodeError("utf-8", b"", 0, 0, "somewhere in the piece") from None
        raise UserError(f"cannot be read as {piece.format} ({error})", where=str(piece.path)) from None
    return table, broken


def _read_json_lines(
    text: bytes, columns: Sequence[str], *, list_columns: Collection[str] | None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    values: dict[str, list[Any]] = {column: [] for column in columns}
    numbers: list[int] = []
    broken: list[tuple[int, str]] = []
    lines = [line for line in text.split(b"\n") if line.strip()]
    for number, line in enumerate(lines):
        row = parse_json(line)
        if not isinstance(row, dict):
            broken.append((number, line[:200].decode("utf-8", errors="replace")))
            continue
        numbers.append(number)
        for column, items in values.items():
            items.append(row.get(column))
    series = [pl.Series("#row", numbers, dtype=pl.Int64)]
    for column, items in values.items():
        if column in list_columns if list_columns is not None else any(isinstance(item, list) for item in items):
            lists = [item if isinstance(item, list) else [] if item is None else [item] for item in items]
            texts = [[_as_text(value) for value in item] for item in lists]
            series.append(pl.Series(column, texts, dtype=pl.List(pl.String)))
        else:
            series.append(pl.Series(column, [_as_text(item) for item in items], dtype=pl.String))
    return pl.DataFrame(series), _broken(broken, NOT_JSON)


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    return NOT_SCALAR


def _broken(rows: list[tuple[int, str]], reason: str) -> pl.DataFrame:
    schema = {"row": pl.Int64, "reason": pl.String, "value": pl.String}
    return pl.DataFrame(
        {"row": [r for r, _ in rows], "reason": [reason] * len(rows), "value": [t for _, t in rows]}, schema=schema
    )


def read_sample(
    files: LogFiles,
    columns: Sequence[str],
    *,
    written: FileFormat | None,
    list_columns: Collection[str] | None = None,
) -> pl.DataFrame:
    """The first rows of a log: enough of them to decide what its columns hold; for the arguments see `read_piece`.

    Raises:
        UserError: the log has no rows.
    """
    for path in files.paths:
        if files.format == "parquet":
            batches = open_parquet(path).iter_batches(batch_size=SAMPLE_ROWS, columns=list(columns), use_threads=False)
            try:
                batch = next(batches, None)
            except (ArrowException, OSError) as error:
                raise damaged_parquet(path, error) from None
            frame = pl.DataFrame(pl.from_arrow(batch)).with_row_index("#row") if batch is not None else pl.DataFrame()
        else:
            piece = first_text_piece(path, files.format, written=written)
            frame = read_piece(piece, columns, list_columns=list_columns)[0].head(SAMPLE_ROWS)
        if len(frame):
            return frame
    raise UserError("the log has no rows", where=str(files.paths[0]), fix="Check input")
