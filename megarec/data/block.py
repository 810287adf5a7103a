"""A block: the histories of a few hundred users, columnar, as one tar member.

The payload is a msgpack map
`{format, users, events, codec, crc32, columns: {name: [dtype, shape, bytes]}}` with the columns `user`, `offsets`,
`events/<column>` and, in evaluation blocks, `query_time`, `target_offsets` and `targets/<column>`. Ids are stored in
the smallest integer type that holds them. With `codec: zstd` every column's bytes are one zstd frame. The checksum
covers the stored bytes and everything that says how to read them.

A block comes from a file that somebody else may have written: whatever is wrong with it is a `UserError`, it can
run no code, and it can make a reader allocate no more than `MAX_COLUMN_BYTES` per column.
"""

import zlib
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack
import numpy as np
import numpy.typing as npt
import zstandard

from megarec.base.errors import UserError
from megarec.base.jagged import Int64

Array = npt.NDArray[Any]
Compression = Literal["none", "zstd"]

FORMAT = "megarec-block-1"
MAX_COLUMN_BYTES = 1 << 31
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("uint8", "int8", "uint16", "int16", "int32", "int64")}
_NARROW = [np.dtype(name) for name in ("uint8", "int8", "uint16", "int16", "int32")]
_HEAD = ("format", "users", "events", "codec")


@dataclass(frozen=True, kw_only=True)
class Block:
    """The histories of B users end to end.

    Attributes:
        user: user index, `[B]`.
        offsets: where each user's events begin, `[B + 1]`, from 0 to T.
        columns: one array `[T]` (or `[T, slots]`) of ids per field, and `timestamp` `[T]` in seconds.
        query_time: evaluation only: the time the question is asked, in seconds, `[B]`.
        target_offsets: evaluation only: where each user's targets begin, `[B + 1]`.
        target_columns: evaluation only: as `columns`, of the targets.
    """

    user: Int64
    offsets: Int64
    columns: dict[str, Array]
    query_time: Int64 | None = None
    target_offsets: Int64 | None = None
    target_columns: dict[str, Array] = field(default_factory=dict)


def encode_block(block: Block, *, compression: Compression = "none") -> bytes:
    """The payload of `block`; the same block gives the same bytes.

    Raises:
        ValueError: the block's arrays do not fit together, or an id does not fit into 32 bits.
        UserError: a column is larger than `MAX_COLUMN_BYTES`.
    """
    fault = find_fault(block)
    if fault:
        raise ValueError(fault)
    fixed = {"user": block.user, "offsets": block.offsets}
    if block.query_time is not None and block.target_offsets is not None:
        fixed |= {"query_time": block.query_time, "target_offsets": block.target_offsets}
    arrays: dict[str, Array] = {name: array.astype(np.int64, copy=False) for name, array in fixed.items()}
    arrays |= {f"events/{name}": _narrowed(name, column) for name, column in block.columns.items()}
    arrays |= {f"targets/{name}": _narrowed(name, column) for name, column in block.target_columns.items()}
    columns = {name: _encode_column(array, name=name, compression=compression) for name, array in arrays.items()}
    head = {"format": FORMAT, "users": len(block.user), "events": int(block.offsets[-1]), "codec": compression}
    payload: bytes = msgpack.packb(head | {"crc32": _checksum(head, columns), "columns": columns})
    return payload


def decode_block(data: bytes, *, where: str) -> Block:
    """The block in a payload; its arrays are read-only views.

    Args:
        data: the payload, from anywhere.
        where: names the payload in an error, such as `train/shard-000003.tar, block 7`.

    Raises:
        UserError: the payload is damaged or inconsistent.
    """
    try:
        return _decode(data)
    except _Fault as fault:
        raise UserError(f"damaged block: {fault}", where=where, fix="Copy the shard again or make it anew") from None


def read_num_users(prefix: bytes, *, where: str) -> int:
    """The number of users that a payload claims in its first bytes; `decode_block` finds out whether it is true."""
    unpacker = msgpack.Unpacker()
    unpacker.feed(prefix)
    try:
        unpacker.read_map_header()
        fields = [unpacker.unpack() for _ in range(4)]
    except (ValueError, msgpack.UnpackException) as error:
        raise UserError(f"damaged block: not msgpack ({error})", where=where) from None
    if fields[:3] != ["format", FORMAT, "users"] or type(fields[3]) is not int or fields[3] < 0:
        raise UserError("damaged block: does not begin with its format and number of users", where=where)
    return fields[3]


def find_fault(block: Block) -> str | None:
    """What keeps the arrays of `block` from fitting together, or None."""
    num_users = len(block.user)
    evaluation = (block.query_time is not None, block.target_offsets is not None, bool(block.target_columns))
    if len(set(evaluation)) > 1:
        return "query_time, target_offsets and targets come together"
    if block.user.shape != (num_users,):
        return "user is not one number per user"
    fault = _find_jagged_fault(block.offsets, block.columns, num_users=num_users, name="offsets")
    if fault or block.query_time is None or block.target_offsets is None:
        return fault
    if block.query_time.shape != (num_users,):
        return "query_time is not one number per user"
    return _find_jagged_fault(block.target_offsets, block.target_columns, num_users=num_users, name="target_offsets")


class _Fault(Exception):
    """What is wrong with a payload."""


def _decode(data: bytes) -> Block:
    try:
        payload = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise _Fault(f"not msgpack ({error})") from None
    if not isinstance(payload, dict) or set(payload) != {*_HEAD, "crc32", "columns"}:
        raise _Fault("not a map of format, users, events, codec, crc32 and columns")
    head = {key: payload[key] for key in _HEAD}
    columns = payload["columns"]
    if head["format"] != FORMAT:
        raise _Fault(f"its format is {str(head['format'])[:40]!r}, this version reads {FORMAT!r}")
    if head["codec"] not in ("none", "zstd"):
        raise _Fault(f"unknown codec {str(head['codec'])[:40]!r}")
    if not isinstance(columns, dict) or not all(_is_column(name, entry) for name, entry in columns.items()):
        raise _Fault("columns is not a map of name to dtype, shape and bytes")
    if payload["crc32"] != _checksum(head, columns):
        raise _Fault("its checksum is wrong")
    arrays = {name: _decode_column(entry, name=name, codec=head["codec"]) for name, entry in columns.items()}
    block = _assemble(arrays)
    fault = find_fault(block)
    if fault is None and (len(block.user), block.offsets[-1]) != (head["users"], head["events"]):
        fault = "users and events are not what the columns hold"
    if fault:
        raise _Fault(fault)
    return block


def _assemble(arrays: dict[str, Array]) -> Block:
    missing = {"user", "offsets"} - set(arrays)
    if missing:
        raise _Fault(f"no column {min(missing)!r}")
    fixed = {name: arrays.pop(name) for name in ("user", "offsets", "query_time", "target_offsets") if name in arrays}
    wrong = [name for name, array in fixed.items() if array.dtype != np.int64]
    unknown = [name for name in arrays if not name.startswith(("events/", "targets/"))]
    if wrong or unknown:
        raise _Fault(f"column {wrong[0]!r} is not int64" if wrong else f"unknown column {unknown[0][:40]!r}")
    named = {
        prefix: {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        for prefix in ("events/", "targets/")
    }
    return Block(**fixed, columns=named["events/"], target_columns=named["targets/"])


def _find_jagged_fault(offsets: Int64, columns: dict[str, Array], *, num_users: int, name: str) -> str | None:
    if offsets.shape != (num_users + 1,):
        return f"{name} is not one number per user and one more"
    if offsets[0] != 0 or bool(np.any(offsets[1:] < offsets[:-1])):
        return f"{name} do not rise from 0"
    for column, array in columns.items():
        if array.ndim not in (1, 2) or len(array) != offsets[-1] or 0 in array.shape[1:]:
            return f"column {column!r} has shape {list(array.shape)}, {name} count {offsets[-1]} rows"
    return None


def _narrowed(name: str, column: Array) -> Array:
    if name == "timestamp":
        return column.astype(np.int64, copy=False)
    low, high = (int(column.min()), int(column.max())) if column.size else (0, 0)
    for dtype in _NARROW:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return column.astype(dtype, copy=False)
    raise ValueError(f"column {name!r} holds ids from {low} to {high}: they do not fit into 32 bits")


def _encode_column(array: Array, *, name: str, compression: Compression) -> list[Any]:
    if array.nbytes > MAX_COLUMN_BYTES:
        raise UserError(f"a block's column {name!r} is {array.nbytes} bytes", fix="Put fewer users into a block")
    data = np.ascontiguousarray(array, dtype=_DTYPES[array.dtype.name]).tobytes()
    if compression == "zstd":
        data = zstandard.ZstdCompressor(level=3).compress(data)
    return [array.dtype.name, list(array.shape), data]


def _is_column(name: Any, entry: Any) -> bool:
    if not (isinstance(name, str) and isinstance(entry, list) and len(entry) == 3):
        return False
    dtype, shape, data = entry
    shaped = isinstance(shape, list) and 1 <= len(shape) <= 2 and all(type(n) is int and n >= 0 for n in shape)
    return isinstance(dtype, str) and dtype in _DTYPES and shaped and isinstance(data, bytes)


def _decode_column(entry: list[Any], *, name: str, codec: str) -> Array:
    dtype, shape, data = _DTYPES[entry[0]], tuple(entry[1]), entry[2]
    num_bytes = dtype.itemsize * shape[0] * (shape[1] if len(shape) == 2 else 1)
    if num_bytes > MAX_COLUMN_BYTES:
        raise _Fault(f"column {name[:40]!r} claims {num_bytes} bytes")
    if codec == "zstd":
        try:
            # The declared size is checked before a byte is allocated for it.
            if zstandard.frame_content_size(data) != num_bytes:
                raise _Fault(f"column {name[:40]!r} does not hold its shape {list(shape)}")
            data = zstandard.ZstdDecompressor().decompress(data)
        except zstandard.ZstdError as error:
            raise _Fault(f"column {name[:40]!r} is not a zstd frame ({error})") from None
    if len(data) != num_bytes:
        raise _Fault(f"column {name[:40]!r} does not hold its shape {list(shape)}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _checksum(head: dict[str, Any], columns: dict[str, list[Any]]) -> int:
    crc = zlib.crc32(msgpack.packb([head[key] for key in _HEAD]))
    for name, (dtype, shape, data) in columns.items():
        crc = zlib.crc32(data, zlib.crc32(msgpack.packb([name, dtype, shape]), crc))
    return crc
