"""Blocks come back as they were, and nothing malformed comes back at all."""

import zlib
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.base.errors import UserError
from megarec.data import block as block_module
from megarec.data.block import Block, decode_block, encode_block, read_num_users
from tests.data.small_datasets import make_block

WHERE = "train/shard-000007.tar, block 3"
TRAIN = make_block([3, 0, 5, 1], first_user=10)
EVAL = make_block([3, 0, 5], first_user=10, num_targets=[1, 0, 2])


def assert_same(left: Block, right: Block) -> None:
    for name in ("user", "offsets", "query_time", "target_offsets"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    for name in ("columns", "target_columns"):
        ours, theirs = getattr(left, name), getattr(right, name)
        assert list(ours) == list(theirs)
        for column in ours:
            np.testing.assert_array_equal(ours[column], theirs[column])


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("block", [TRAIN, EVAL, make_block([], first_user=0), make_block([0], first_user=0)])
def test_a_block_comes_back(block: Block, compression: Any) -> None:
    data = encode_block(block, compression=compression)
    assert encode_block(block, compression=compression) == data
    assert_same(decode_block(data, where=WHERE), block)
    assert read_num_users(data[:64], where=WHERE) == len(block.user)


def test_columns_take_the_smallest_type_and_are_views() -> None:
    ids = {"a": [0, 255], "b": [0, 256], "c": [0, 65536], "d": [[-1, 5], [3, 127]], "e": [[-1, 128], [0, 0]]}
    columns = {name: np.array(values, dtype=np.int64) for name, values in ids.items()}
    block = Block(user=np.array([4]), offsets=np.array([0, 2]), columns=columns)
    decoded = decode_block(encode_block(block), where=WHERE).columns
    assert [decoded[name].dtype.name for name in ids] == ["uint8", "uint16", "int32", "int8", "int16"]
    assert not decoded["a"].flags.owndata
    with pytest.raises(ValueError, match="32 bits"):
        encode_block(replace(block, columns={"a": np.array([0, 2**31])}))


def resealed(payload: dict[str, Any]) -> bytes:
    """`payload` with a checksum that is right for what it now holds."""
    crc = zlib.crc32(msgpack.packb([payload[key] for key in ("format", "users", "events", "codec")]))
    for name, (dtype, shape, data) in payload["columns"].items():
        crc = zlib.crc32(data, zlib.crc32(msgpack.packb([name, dtype, shape]), crc))
    return msgpack.packb(payload | {"crc32": crc})


def int64_column(*values: int) -> list[Any]:
    return ["int64", [len(values)], np.array(values, dtype="<i8").tobytes()]


SABOTAGES: dict[str, tuple[Any, str]] = {
    "format": (lambda p: p.update(format="other"), "its format is 'other'"),
    "codec": (lambda p: p.update(codec="gzip"), "unknown codec"),
    "users": (lambda p: p.update(users=5), "not what the columns hold"),
    "events": (lambda p: p.update(events=2**60), "not what the columns hold"),
    "no offsets": (lambda p: p["columns"].pop("offsets"), "no column 'offsets'"),
    "unknown column": (lambda p: p["columns"].update(evil=int64_column(1)), "unknown column 'evil'"),
    "offsets too short": (lambda p: p["columns"].update(offsets=int64_column(0, 3, 8)), "offsets is not one number"),
    "offsets start late": (lambda p: p["columns"].update(offsets=int64_column(1, 3, 3, 8)), "do not rise from 0"),
    "offsets fall": (lambda p: p["columns"].update(offsets=int64_column(0, 5, 3, 8)), "do not rise from 0"),
    "offsets negative": (lambda p: p["columns"].update(offsets=int64_column(0, -3, 3, 8)), "do not rise from 0"),
    "offsets beyond": (lambda p: p["columns"].update(offsets=int64_column(0, 3, 3, 2**40)), "has shape"),
    "offsets narrow": (lambda p: p["columns"].update(offsets=["int8", [4], b"\0\1\2\3"]), "is not int64"),
    "targets short": (lambda p: p["columns"].update(target_offsets=int64_column(0, 1, 1, 2)), "target_offsets count"),
    "half an evaluation block": (lambda p: p["columns"].pop("query_time"), "come together"),
    "query_time short": (lambda p: p["columns"].update(query_time=int64_column(1)), "query_time is not"),
    "shape larger": (lambda p: p["columns"]["events/item"].__setitem__(1, [9]), "does not hold its shape"),
    "shape absurd": (lambda p: p["columns"]["events/item"].__setitem__(1, [2**62, 2**62]), "claims"),
    "shape no slots": (lambda p: p["columns"].update({"events/item": ["int8", [8, 0], b""]}), "has shape"),
    "shape three": (lambda p: p["columns"]["events/item"].__setitem__(1, [8, 1, 1]), "not a map of name to"),
    "shape negative": (lambda p: p["columns"]["events/item"].__setitem__(1, [-8]), "not a map of name to"),
    "shape boolean": (lambda p: p["columns"]["events/item"].__setitem__(1, [True]), "not a map of name to"),
    "dtype of objects": (lambda p: p["columns"]["events/item"].__setitem__(0, "object"), "not a map of name to"),
    "dtype of floats": (lambda p: p["columns"]["events/item"].__setitem__(0, "float32"), "not a map of name to"),
    "bytes as text": (lambda p: p["columns"]["events/item"].__setitem__(2, "text"), "not a map of name to"),
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_a_malformed_block_is_refused_though_its_checksum_is_right(name: str) -> None:
    payload = msgpack.unpackb(encode_block(EVAL))
    change, message = SABOTAGES[name]
    assert_same(decode_block(resealed(payload), where=WHERE), EVAL)
    change(payload)
    try:
        data = resealed(payload)
    except TypeError:  # text has no checksum
        data = msgpack.packb(payload)
    with pytest.raises(UserError, match=message) as caught:
        decode_block(data, where=WHERE)
    assert str(caught.value).startswith(WHERE)


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x93\1\2\3", b"\x80", bytes(512), b"\xdf\xff\xff\xff\xff", b"\x91" * 5000]
)
def test_what_is_no_block_is_refused(data: bytes) -> None:
    with pytest.raises(UserError, match=WHERE):
        decode_block(data, where=WHERE)
    with pytest.raises(UserError, match=WHERE):
        read_num_users(data, where=WHERE)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 7), st.sampled_from(["none", "zstd"]))
def test_any_flipped_bit_is_noticed(place: int, bit: int, compression: Any) -> None:
    data = bytearray(encode_block(EVAL, compression=compression))
    data[place % len(data)] ^= 1 << bit
    with pytest.raises(UserError, match="damaged block"):
        decode_block(bytes(data), where=WHERE)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_any_cut_is_noticed(size: int) -> None:
    data = encode_block(EVAL)
    with pytest.raises(UserError, match="damaged block"):
        decode_block(data[: size % len(data)], where=WHERE)


def test_a_zstd_frame_allocates_no_more_than_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    import zstandard

    payload = msgpack.unpackb(encode_block(EVAL, compression="zstd"))
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    payload["columns"]["events/item"][2] = bomb
    with pytest.raises(UserError, match="does not hold its shape"):
        decode_block(resealed(payload), where=WHERE)
    payload["columns"]["events/item"][1:] = [[1 << 26], bomb]
    monkeypatch.setattr(block_module, "MAX_COLUMN_BYTES", 1 << 20)
    with pytest.raises(UserError, match="claims"):
        decode_block(resealed(payload), where=WHERE)


def test_what_does_not_fit_together_is_not_written() -> None:
    with pytest.raises(ValueError, match="offsets count"):
        encode_block(replace(TRAIN, columns={"item": np.zeros(3, dtype=np.int32)}))
    with pytest.raises(ValueError, match="come together"):
        encode_block(replace(EVAL, query_time=None))
