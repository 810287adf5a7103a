"""A log cut into pieces that workers read on their own: row groups of Parquet files, whole lines of text files."""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import zstandard
from pyarrow import ArrowException, parquet

from megarec.base.errors import UserError, nearest
from megarec.data.schema import FileFormat
from megarec_tools.make_shards.log.files import COMPRESSIONS, LogFiles, LogFormat

PIECE_ROWS = 1 << 20
PIECE_BYTES = 16 << 20
MAX_ROW_BYTES = 64 << 20
SAMPLE_BYTES = 1 << 20
READ_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_ZSTD_WINDOW = 1 << 27


@dataclass(frozen=True, kw_only=True)
class TextStyle:
    """How the lines of a text log are written."""

    delimiter: str
    quoted: bool

    @property
    def one_byte_delimiter(self) -> str:
        """`delimiter`, or the control character that a longer one is replaced by before parsing."""
        return self.delimiter if len(self.delimiter) == 1 else "\x1f"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of one file.

    Attributes:
        number: counts the pieces of the log.
        file: index of the file in the log.
        path: of the file.
        format: of the file.
        row_groups: Parquet: the row groups to read,
        batch: or what was read, of a log whose rows hold lists.
        text: otherwise: whole lines, without the header.
        first_line: sequences: the number of the first line in the log, from 1.
        names: csv and tsv: the names of all columns.
        style: csv and tsv.
        read_bytes: how much of the log's bytes was read to make this piece.
    """

    number: int
    file: int
    path: Path
    format: LogFormat
    row_groups: tuple[int, ...] = ()
    batch: pa.RecordBatch | None = None
    text: bytes = b""
    first_line: int = 1
    names: tuple[str, ...] = ()
    style: TextStyle | None = None
    read_bytes: int = 0


def text_style(written: FileFormat | None, file_format: LogFormat) -> TextStyle:
    """The delimiter and the quotes of a file: the schema's, or those of its format."""
    delimiter = (written.delimiter if written else None) or ("\t" if file_format == "tsv" else ",")
    quoted = written.quoted if written and written.quoted is not None else file_format == "csv" and len(delimiter) == 1
    return TextStyle(delimiter=delimiter, quoted=quoted)


SEQUENCE_COLUMNS = ["line", "items"]


def columns_of(path: Path, file_format: LogFormat, *, written: FileFormat | None) -> list[str]:
    """The names of the columns of a file; of JSON lines, the keys of its first lines.

    Raises:
        UserError: the file cannot be read, or has two columns of one name.
    """
    if file_format == "parquet":
        return list(open_parquet(path).schema_arrow.names)
    if file_format == "jsonl":
        keys = _json_keys(_first_lines(path, written=written))
        if not keys:
            raise UserError("none of its first lines is a JSON object", where=str(path), fix="Check input")
        return keys
    if file_format == "sequences":
        return SEQUENCE_COLUMNS
    if written is not None and written.column_names:
        return list(written.column_names)
    line = _first_lines(path, written=written).split(b"\n", 1)[0]
    return _header(line, path=path, style=text_style(written, file_format))


def cut_pieces(
    files: LogFiles, *, written: FileFormat, list_columns: Sequence[str] = (), item: str = ""
) -> Iterator[Piece]:
    """All pieces of a log, in order.

    Args:
        files: the log.
        written: how it is written.
        list_columns: of a Parquet log whose rows hold lists: the columns to read. Its row groups may hold far more
            than a piece should, so that they are read here, some rows at a time.
        item: the column of these whose lists are counted.

    Raises:
        UserError: a file is damaged or is not what its suffix says.
    """
    number, first_line = 0, 1
    for index, path in enumerate(files.paths):
        names: tuple[str, ...] = ()
        style = None
        if files.format in ("csv", "tsv"):
            names, style = tuple(columns_of(path, files.format, written=written)), text_style(written, files.format)
        parts: Iterator[dict[str, Any]]
        if files.format != "parquet":
            parts = _text_pieces(path, files.format, written=written)
        elif list_columns:
            parts = _row_batches(path, list_columns, item=item)
        else:
            parts = _row_groups(path)
        for part in parts:
            yield Piece(
                number=number,
                file=index,
                path=path,
                format=files.format,
                names=names,
                style=style,
                first_line=first_line,
                **part,
            )
            number += 1
            if files.format == "sequences":
                first_line += part["text"].count(b"\n") + (not part["text"].endswith(b"\n"))


def first_text_piece(path: Path, file_format: LogFormat, *, written: FileFormat | None) -> Piece:
    """The first rows of a text file as a piece of their own."""
    text = _first_lines(path, written=written)
    text = text[: text.rfind(b"\n") + 1] or text
    names: tuple[str, ...] = ()
    if file_format in ("csv", "tsv"):
        names = tuple(columns_of(path, file_format, written=written))
        if written is None or not written.column_names:
            text = text.partition(b"\n")[2]
    style = text_style(written, file_format)
    return Piece(number=0, file=0, path=path, format=file_format, text=text, names=names, style=style)


def estimate_events(files: LogFiles, *, written: FileFormat, item: str) -> int:
    """The events of a log: exact for Parquet, for text from the length of the first rows.

    Args:
        files: the log.
        written: how it is written.
        item: the column of the item, which may hold one value or a list of them.
    """
    if files.format == "parquet":
        return sum(_num_values(open_parquet(path).metadata, item) for path in files.paths)
    sample = first_text_piece(files.paths[0], files.format, written=written).text
    expansion = 1 if files.paths[0].suffix.lower() not in COMPRESSIONS else 4
    num_events = len(sample.split()) if files.format == "sequences" else sample.count(b"\n") + 1
    return files.num_bytes * expansion * num_events // (len(sample) + 1)


def open_parquet(path: Path) -> parquet.ParquetFile:
    """An opened Parquet file; a damaged one is a `UserError`."""
    try:
        return parquet.ParquetFile(path, memory_map=False, pre_buffer=False, buffer_size=READ_BYTES)
    except (ArrowException, OSError) as error:
        raise damaged_parquet(path, error) from None


def damaged_parquet(path: Path, error: Exception) -> UserError:
    """What to say about a Parquet file that cannot be read."""
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(f"damaged or truncated Parquet file ({first_line})", where=str(path), fix="Copy it again")


def _num_values(metadata: Any, column: str, *, row_groups: Iterable[int] | None = None) -> int:
    """How many values a column of a Parquet file has, those of its lists counted one by one."""
    groups = [metadata.row_group(g) for g in (range(metadata.num_row_groups) if row_groups is None else row_groups)]
    names = [metadata.schema.column(at).path.split(".")[0] for at in range(metadata.num_columns)]
    return sum(int(group.column(names.index(column)).num_values) for group in groups)


def _row_batches(path: Path, columns: Sequence[str], *, item: str) -> Iterator[dict[str, Any]]:
    file = open_parquet(path)
    for index in range(file.metadata.num_row_groups):
        num_rows = int(file.metadata.row_group(index).num_rows)
        num_values = _num_values(file.metadata, item, row_groups=[index])
        size = max(1, PIECE_ROWS * num_rows // max(1, num_values))
        batches = file.iter_batches(size, row_groups=[index], columns=list(columns), use_threads=False)
        try:
            for batch in batches:
                yield {"batch": batch}
        except (ArrowException, OSError) as error:
            raise damaged_parquet(path, error) from None


def _row_groups(path: Path) -> Iterator[dict[str, Any]]:
    metadata = open_parquet(path).metadata
    group: list[int] = []
    num_rows = 0
    for index in range(metadata.num_row_groups):
        group.append(index)
        num_rows += metadata.row_group(index).num_rows
        if num_rows >= PIECE_ROWS or index == metadata.num_row_groups - 1:
            yield {"row_groups": tuple(group)}
            group, num_rows = [], 0


def _text_pieces(path: Path, file_format: LogFormat, *, written: FileFormat) -> Iterator[dict[str, Any]]:
    quoted = file_format == "csv" and text_style(written, file_format).quoted
    skip_header = file_format in ("csv", "tsv") and not written.column_names
    rest, read_so_far = bytearray(), 0
    for data, position in _text_of(path, written=written):
        rest += data
        if skip_header:
            if b"\n" not in rest:
                continue
            del rest[: rest.index(b"\n") + 1]
            skip_header = False
        if len(rest) < PIECE_BYTES:
            continue
        end = _last_row_end(rest, quoted=quoted)
        if end == 0:
            if len(rest) > MAX_ROW_BYTES:
                raise UserError(f"a row is longer than {MAX_ROW_BYTES >> 20} MB", where=str(path))
            continue
        yield {"text": bytes(rest[:end]), "read_bytes": position - read_so_far}
        del rest[:end]
        read_so_far = position
    if rest and not skip_header:
        yield {"text": bytes(rest), "read_bytes": path.stat().st_size - read_so_far}


def _last_row_end(text: bytearray, *, quoted: bool) -> int:
    """Just behind the last line break that is not inside quotes; 0 when there is none."""
    last = text.rfind(b"\n") + 1
    if not quoted or not last:
        return last
    end, num_quotes = last, text.count(b'"', 0, last)
    for _ in range(1000):
        if num_quotes % 2 == 0:
            return end
        before = text.rfind(b"\n", 0, end - 1) + 1
        if before == 0:
            break
        num_quotes -= text.count(b'"', before, end)
        end = before
    return last  # a stray quote: the parser will say which row it is in


def _text_of(path: Path, *, written: FileFormat | None) -> Iterator[tuple[bytes, int]]:
    """The text of a file in UTF-8, without the byte order mark, and how far into the file each part of it reaches."""
    chunks = {".gz": _gunzipped, ".zst": _unzstd}.get(path.suffix.lower(), _plain)(path)
    encoding = written.encoding if written else "utf-8"
    first, first_accent = True, encoding != "utf-8"
    for data, position in chunks:
        if first and data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError("the text is UTF-16", where=str(path), fix="Convert it to UTF-8")
        data = data.removeprefix(_BOM) if first else data
        if first_accent and not data.isascii():
            _refuse_utf_8(data, path=path, encoding=encoding)
            first_accent = False
        yield data if encoding == "utf-8" else data.decode(encoding).encode(), position
        first = first and not data


def _refuse_utf_8(data: bytes, *, path: Path, encoding: str) -> None:
    """Latin-1 letters all but never stand together as UTF-8 ones do, so that text of both kinds is UTF-8."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return
    what = f"the schema says {encoding}, but the text is UTF-8"
    raise UserError(what, where=str(path), fix="Copy the schema and set encoding to utf-8")


def _plain(path: Path) -> Iterator[tuple[bytes, int]]:
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            yield data, file.tell()


def _gunzipped(path: Path) -> Iterator[tuple[bytes, int]]:
    with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) as file:
        try:
            while data := file.read(1 << 22):
                yield data, raw.tell()
        except EOFError:
            raise UserError("the gzip file is truncated", where=str(path), fix="Copy it again") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"damaged gzip file ({error})", where=str(path), fix="Copy it again") from None


def _unzstd(path: Path) -> Iterator[tuple[bytes, int]]:
    # The library's own file reader takes a truncated frame for a whole one; a frame object knows its end.
    unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    with path.open("rb") as file:
        frame, inside = unpacker.decompressobj(), False
        while data := file.read(1 << 13):  # small: a few bytes can unpack to megabytes
            while data:
                try:
                    text = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise UserError(f"damaged zstd file ({error})", where=str(path), fix="Copy it again") from None
                inside, data = not frame.eof, frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = unpacker.decompressobj()
                yield text, file.tell()
        if inside:
            raise UserError("the zstd file is truncated", where=str(path), fix="Copy it again")


def _first_lines(path: Path, *, written: FileFormat | None) -> bytes:
    """At least the first line of a text file, if it has one."""
    text = b""
    for data, _ in _text_of(path, written=written):
        text += data
        if len(text) >= SAMPLE_BYTES and b"\n" in text:
            break
        if len(text) > MAX_ROW_BYTES:
            raise UserError(f"the first line is longer than {MAX_ROW_BYTES >> 20} MB", where=str(path))
    return text


def _header(line: bytes, *, path: Path, style: TextStyle) -> list[str]:
    text = line.rstrip(b"\r").decode("utf-8", errors="replace")
    if not text.strip():
        raise UserError("the log has no header line", where=str(path), fix="Set column_names in the schema if so meant")
    if any(ord(character) < 32 and character not in ("\t", style.delimiter) for character in text):
        raise UserError("the first line is not text", where=str(path), fix="Is this file what its name says?")
    if style.quoted:
        try:
            names = next(csv.reader(io.StringIO(text), delimiter=style.delimiter))
        except csv.Error as error:
            raise UserError(f"the header line cannot be read ({error})", where=str(path)) from None
    else:
        names = text.split(style.delimiter)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"two columns are named '{twice[0]}'", where=str(path))
    return names


def parse_json(line: bytes) -> Any:
    """The value of a JSON line; None when it is none."""
    try:
        return json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None


def _json_keys(text: bytes) -> list[str]:
    """The keys of the first thousand JSON lines, in the order met."""
    keys: dict[str, None] = {}
    for line in text.split(b"\n")[:1000]:
        row = parse_json(line)
        if isinstance(row, dict):
            keys.update(dict.fromkeys(row))
    return list(keys)


def require_columns(present: list[str], wanted: list[str], *, path: Path) -> None:
    """Raises `UserError` when a wanted column is not present, naming the nearest that is."""
    for column in wanted:
        if column not in present:
            what = f"no column '{column}'"
            raise UserError(what, where=str(path), fix=nearest(column, present) + " Or set it in the schema")
