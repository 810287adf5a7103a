"""A piece: what one rank holds of one global tensor, and how wanted pieces are put together from saved ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PieceIndex:
    """Which part of a global tensor a piece is: along `dim`, the positions `start`, `start + stride`, ...

    A slice has stride 1, a table sharded by row over W ranks has stride W, a whole tensor starts at 0.

    Attributes:
        name: the tensor's name, the same for every layout.
        global_shape: the shape of the whole tensor.
        dim: the dimension that is cut.
        start: the first position held along `dim`.
        stride: the distance between positions held.
        count: how many positions are held.
    """

    name: str
    global_shape: tuple[int, ...]
    dim: int = 0
    start: int = 0
    stride: int = 1
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the piece itself."""
        if not self.global_shape:
            return ()
        return (*self.global_shape[: self.dim], self.count, *self.global_shape[self.dim + 1 :])

    def positions(self) -> Tensor:
        """The positions held along `dim`, `[count]`."""
        return self.start + self.stride * torch.arange(self.count)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece with its values."""

    index: PieceIndex
    values: Tensor


def whole(name: str, values: Tensor) -> Piece:
    """The piece that is the whole tensor."""
    shape = tuple(values.shape)
    return Piece(index=PieceIndex(name=name, global_shape=shape, count=shape[0] if shape else 1), values=values)


def fill(wanted: PieceIndex, target: Tensor, saved: PieceIndex, values: Tensor) -> Tensor:
    """Copies into `target` what `saved` holds of `wanted`; both are cut along one dimension.

    Returns:
        Which of the wanted positions were filled, bool `[wanted.count]`.
    """
    if not wanted.global_shape:
        target.copy_(values)
        return torch.ones(1, dtype=torch.bool)
    if wanted.dim != saved.dim:
        raise AssertionError(f"'{wanted.name}' is cut along dimension {saved.dim} and wanted along {wanted.dim}")
    distance = wanted.positions() - saved.start
    held = (distance >= 0) & (distance % saved.stride == 0) & (distance // saved.stride < saved.count)
    if held.all() and wanted.stride == saved.stride:
        target.copy_(values.narrow(wanted.dim, int(distance[0]) // saved.stride if wanted.count else 0, wanted.count))
    elif held.any():
        source = values.index_select(wanted.dim, distance[held] // saved.stride)
        target.index_copy_(wanted.dim, torch.nonzero(held).squeeze(1), source.to(target.dtype))
    return held


def piece_names(pieces: Sequence[Piece]) -> list[str]:
    """Names of pieces; a rank holds at most one piece of a tensor."""
    names = [piece.index.name for piece in pieces]
    if len(set(names)) != len(names):
        raise AssertionError("one rank offers two pieces of one tensor")
    return names
