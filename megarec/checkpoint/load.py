"""Reading checkpoints at any layout: what this rank wants is put together from what the saving ranks held."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megarec.base.errors import UserError
from megarec.checkpoint.manifest import Manifest, read_manifest, read_pointer
from megarec.checkpoint.pieces import Piece, PieceIndex, fill


class Checkpoint:
    """A complete, verified checkpoint.

    Args:
        path: a checkpoint directory, or a directory of checkpoints (then its `latest`), or a run directory.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = find_checkpoint(path)
        self.manifest: Manifest = read_manifest(self.path)
        self._saved: dict[str, list[tuple[str, PieceIndex]]] = {}
        for entry in self.manifest.files:
            for index in entry.pieces:
                self._saved.setdefault(index.name, []).append((entry.file, index))

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self.manifest.step

    def names(self) -> list[str]:
        """The names of all tensors in it."""
        return sorted(self._saved)

    def read_whole(self, name: str) -> Tensor:
        """One whole tensor, in the dtype it was saved in."""
        file, saved = self._entries(name)[0]
        shape, dim = saved.global_shape, saved.dim
        with safe_open(str(self.path / file), framework="pt") as tensors:
            dtype = tensors.get_tensor(name).dtype
        wanted = PieceIndex(name=name, global_shape=shape, dim=dim, count=shape[dim] if shape else 1)
        target = torch.empty(shape, dtype=dtype)
        self.load([Piece(index=wanted, values=target)])
        return target

    @torch.no_grad()
    def load(self, wanted: Sequence[Piece]) -> None:
        """Fills the values of every wanted piece, in place.

        Raises:
            UserError: a tensor is missing, has another global shape, or not all of it was saved.
        """
        filled = [torch.zeros(max(piece.index.count, 0), dtype=torch.bool) for piece in wanted]
        plan: dict[str, list[tuple[int, PieceIndex]]] = {}
        for number, piece in enumerate(wanted):
            for file, saved in self._entries(piece.index.name):
                if saved.global_shape != piece.index.global_shape:
                    raise UserError(
                        f"'{saved.name}' has shape {saved.global_shape}, the model wants {piece.index.global_shape}",
                        where=str(self.path),
                        fix="Use the configuration the checkpoint was trained with",
                    )
                plan.setdefault(file, []).append((number, saved))
        for file, jobs in plan.items():
            with safe_open(str(self.path / file), framework="pt") as tensors:
                for number, saved in jobs:
                    values = tensors.get_tensor(saved.name)
                    if tuple(values.shape) != saved.shape:
                        raise UserError(f"'{saved.name}' is not as the manifest says", where=str(self.path / file))
                    held = fill(wanted[number].index, wanted[number].values, saved, values)
                    filled[number] |= held[: len(filled[number])]
        for piece, complete in zip(wanted, filled, strict=True):
            if not bool(complete.all()):
                raise UserError(f"'{piece.index.name}' is not whole in the checkpoint", where=str(self.path))

    def _entries(self, name: str) -> list[tuple[str, PieceIndex]]:
        if name not in self._saved:
            raise UserError(
                f"no '{name}' in the checkpoint", where=str(self.path), fix="It belongs to another configuration"
            )
        return self._saved[name]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint directory that `path` means: itself, its `latest`, or `checkpoints/latest` of a run directory."""
    if (path / "manifest.json").is_file():
        return path
    for directory in (path, path / "checkpoints"):
        newest = read_pointer(directory, "latest")
        if newest is not None:
            return newest
    raise UserError("no checkpoint here", where=str(path), fix="Give a run directory or a step-* directory")
