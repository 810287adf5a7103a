"""Shards are plain tars, the same byte for byte, and a damaged one is never read as a shorter one."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from megarec.base.errors import UserError
from megarec.data.block import decode_block, encode_block
from megarec.data.tar import index_shard, write_shard
from tests.data.small_datasets import make_block

BLOCKS = [make_block([3, 4], first_user=0), make_block([700], first_user=2), make_block([], first_user=3)]
PAYLOADS = [encode_block(block) for block in BLOCKS]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard-000012.tar"
    num_blocks, num_bytes = write_shard(path, PAYLOADS)
    assert (num_blocks, num_bytes) == (3, path.stat().st_size)
    return path


def test_a_shard_is_indexed(shard: Path) -> None:
    content = shard.read_bytes()
    assert [content[at : at + size] for at, size in index_shard(shard)] == PAYLOADS


def test_a_shard_is_an_ordinary_tar_without_a_date(shard: Path, tmp_path: Path) -> None:
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == [f"000012-{block:06d}.mp" for block in range(3)]
        assert {(member.mtime, member.uid, member.uname) for member in members} == {(0, 0, "")}
    (tmp_path / "again").mkdir()
    again = tmp_path / "again" / shard.name
    write_shard(again, iter(PAYLOADS))
    assert again.read_bytes() == shard.read_bytes()


def test_plain_webdataset_reads_a_shard(shard: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"000012-{block:06d}" for block in range(3)]
    for sample, block in zip(samples, BLOCKS, strict=True):
        decoded = decode_block(sample["mp"], where=sample["__key__"])
        np.testing.assert_array_equal(decoded.columns["item"], block.columns["item"])
        np.testing.assert_array_equal(decoded.offsets, block.offsets)


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> object:
        yield PAYLOADS[0]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "shard-000000.tar", failing())
    assert list(tmp_path.iterdir()) == []


def test_a_tar_of_the_tar_command_is_read(tmp_path: Path) -> None:
    """Its end is padded to 10 kB."""
    (tmp_path / "000000-000000.mp").write_bytes(PAYLOADS[0])
    path = tmp_path / "shard-000000.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(tmp_path / "000000-000000.mp", arcname="000000-000000.mp")
    ((offset, size),) = index_shard(path)
    assert path.read_bytes()[offset : offset + size] == PAYLOADS[0]


def test_every_cut_is_refused(shard: Path) -> None:
    content = shard.read_bytes()
    (_, _), (second, second_size), _ = index_shard(shard)
    cuts = {
        "at a header boundary": (second - 512, "without an end mark"),
        "inside a header": (second - 100, "inside the header"),
        "right after a header": (second, "inside block 1"),
        "inside a payload": (second + second_size // 2, "inside block 1"),
        "inside the padding": (second + second_size + 1, "inside block 1"),
        "before the end mark": (len(content) - 1024, "without an end mark"),
        "inside the end mark": (len(content) - 512, "end mark"),
        "to nothing": (0, "without an end mark"),
    }
    for size, message in cuts.values():
        shard.write_bytes(content[:size])
        with pytest.raises(UserError, match=message) as caught:
            index_shard(shard)
        assert str(shard) in str(caught.value)
    for size in range(0, len(content), 97):
        shard.write_bytes(content[:size])
        with pytest.raises(UserError):
            index_shard(shard)


def with_member(kind: bytes, name: str = "000012-000000.mp", size: int = 0) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (bytes(range(256)) * 2, "garbage"),
        (b"\xff" * 512, "garbage"),
        (bytes(512), "end mark"),
        (with_member(tarfile.SYMTYPE), "not a plain file"),
        (with_member(tarfile.DIRTYPE), "not a plain file"),
        (with_member(tarfile.XHDTYPE), "not a plain file"),
        (with_member(tarfile.REGTYPE, name="../../etc/passwd"), "not a plain file"),
        (with_member(tarfile.REGTYPE, size=-1024), "not a plain file"),
        (with_member(tarfile.REGTYPE, size=2**62), "inside block 1"),
    ],
)
def test_a_wrong_header_is_refused(shard: Path, header: bytes, message: str) -> None:
    content = bytearray(shard.read_bytes())
    second = index_shard(shard)[1][0]
    content[second - 512 : second] = header
    shard.write_bytes(content)
    with pytest.raises(UserError, match=message):
        index_shard(shard)


def test_any_flipped_bit_of_a_header_is_refused(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    second = index_shard(shard)[1][0]
    checksum = range(second - 512 + 148, second - 512 + 156)  # what fills its field up means nothing
    for place in set(range(second - 512, second, 5)) - set(checksum):
        content[place] ^= 4
        shard.write_bytes(content)
        with pytest.raises(UserError):
            index_shard(shard)
        content[place] ^= 4


def test_a_missing_shard_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        index_shard(tmp_path / "shard-000000.tar")
