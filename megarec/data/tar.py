"""Shards: plain USTAR files whose members are blocks, written byte for byte the same, read without trust.

`tarfile` and WebDataset read a tar that was cut between two members as if it were whole; here a shard without its
end mark is an error.
"""

import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

from megarec.base.errors import UserError
from megarec.base.files import new_file

_UNIT = 512
_END = bytes(2 * _UNIT)


def write_shard(path: Path, blocks: Iterable[bytes]) -> tuple[int, int]:
    """Writes encoded `blocks` as the members `<shard>-<block>.mp` of a tar, whole or not at all.

    Args:
        path: the new file; the shard's number is what follows the last `-` in its name (`shard-000003.tar`).
        blocks: encoded blocks, in order.

    Returns:
        The number of blocks and the size of the file in bytes.
    """
    shard = path.stem.rpartition("-")[2]
    num_blocks = 0
    with new_file(path) as staging, staging.open("wb") as file:
        for data in blocks:
            member = tarfile.TarInfo(f"{shard}-{num_blocks:06d}.mp")
            member.size = len(data)
            file.write(member.tobuf(tarfile.USTAR_FORMAT))
            file.write(data)
            file.write(bytes(-len(data) % _UNIT))
            num_blocks += 1
        file.write(_END)
        file.flush()
        num_bytes = file.tell()
    return num_blocks, num_bytes


def index_shard(path: Path) -> list[tuple[int, int]]:
    """Where the blocks of a shard lie: (offset, size) in bytes, in the order of the file.

    Reads headers only. A block's own checksum vouches for its bytes.

    Raises:
        UserError: the file is missing, is cut anywhere, or has a member that is not a plain file.
    """
    try:
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            return _index(file.fileno(), num_bytes=num_bytes)
    except FileNotFoundError:
        raise UserError("the shard is missing", where=str(path), fix="Copy it again or make the dataset anew") from None
    except _Fault as fault:
        what = f"damaged shard: {fault}"
        raise UserError(what, where=str(path), fix="Copy it again or make the dataset anew") from None


class _Fault(Exception):
    """What is wrong with a tar."""


def _index(descriptor: int, *, num_bytes: int) -> list[tuple[int, int]]:
    members: list[tuple[int, int]] = []
    at = 0
    while True:
        header = os.pread(descriptor, _UNIT, at)
        where = f"block {len(members)} (byte {at})"
        if not header:
            raise _Fault(f"it ends before {where} without an end mark: it was cut")
        if len(header) < _UNIT:
            raise _Fault(f"it was cut inside the header of {where}")
        if header == bytes(_UNIT):
            break
        size = _member_size(header, where=where)
        end = at + _UNIT + size + -size % _UNIT
        if end > num_bytes:
            raise _Fault(f"it was cut inside {where}")
        members.append((at + _UNIT, size))
        at = end
    if os.pread(descriptor, len(_END), at) != _END:
        raise _Fault(f"its end mark at byte {at} is broken")
    return members


def _member_size(header: bytes, *, where: str) -> int:
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _Fault(f"the header of {where} is garbage ({error})") from None
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.size < 0 or not member.name.endswith(".mp"):
        raise _Fault(f"{where} is not a plain file named *.mp")
    return member.size
