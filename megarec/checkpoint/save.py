"""Writing checkpoints: copied at once, written behind training's back, visible by one rename.

Order of a save: every rank copies its pieces; a thread writes them into `.step-N.unfinished/`; when every rank's
thread is done rank 0 writes the manifest with all checksums, renames the directory, then moves `latest`. A process
killed anywhere in between leaves a directory that no reader looks at.
"""

import errno
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megarec.base.config import build, plain
from megarec.base.files import sha256_of
from megarec.checkpoint.manifest import (
    FORMAT,
    Manifest,
    SavedFile,
    read_pointer,
    step_name,
    write_manifest,
    write_pointer,
)
from megarec.checkpoint.pieces import Piece, piece_names


class CheckpointWriter:
    """Saves checkpoints of one run; every method but the constructor is collective over all ranks.

    Args:
        directory: where the checkpoints of the run live.
        rank: this process.
        world_size: the number of processes.
        keep_last: how many newest checkpoints stay; the best one stays too.

    Attributes:
        newest_step: the step of the newest save, finished or under way, or None.
    """

    def __init__(self, directory: Path, *, rank: int, world_size: int, keep_last: int) -> None:
        self._directory = directory
        self._rank = rank
        self._world_size = world_size
        self._keep_last = keep_last
        self._pending: _PendingSave | None = None
        self.newest_step: int | None = None

    def start(self, step: int, pieces: Sequence[Piece], *, state: dict[str, Any], config: dict[str, Any]) -> None:
        """Copies `pieces` and begins to write them; a save still under way is finished first."""
        self.finish()
        staging = self._directory / f".{step_name(step)}.unfinished"
        if self._rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        dist.barrier()
        self.newest_step = step
        path = staging / f"rank-{self._rank:05d}.safetensors"
        self._pending = _PendingSave(path, pieces, step=step, state=state, config=config)

    def poll(self) -> None:
        """Completes the save under way if every rank has written its file; returns at once otherwise."""
        if self._pending is None:
            return
        unfinished = torch.tensor([int(self._pending.is_writing())])
        dist.all_reduce(unfinished)
        if not unfinished.item():
            self.finish()

    def finish(self) -> None:
        """Waits for the save under way and makes it visible.

        Raises:
            OSError: this rank could not write its file.
            RuntimeError: another rank could not.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        entry = pending.wait()
        entries: list[dict[str, Any] | None] = [None] * self._world_size
        dist.all_gather_object(entries, None if entry is None else plain(entry))
        failed = [rank for rank, written in enumerate(entries) if written is None]
        staging = pending.path.parent
        if failed:
            if self._rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
            raise pending.error or RuntimeError(f"ranks {failed} could not write checkpoint step {pending.step}")
        if self._rank == 0:
            files = tuple(build(SavedFile, written) for written in entries if written is not None)
            manifest = Manifest(
                format=FORMAT, step=pending.step, files=files, state=pending.state, config=pending.config
            )
            write_manifest(staging, manifest)
            self._publish(staging, pending.step)
        dist.barrier()

    def mark_best(self, step: int) -> None:
        """Names the checkpoint of `step` the best one; it must be complete."""
        self.finish()
        if self._rank == 0:
            write_pointer(self._directory, "best", step)

    def _publish(self, staging: Path, step: int) -> None:
        final = self._directory / step_name(step)
        shutil.rmtree(final, ignore_errors=True)  # a leftover of a run that was killed before `latest` moved
        os.replace(staging, final)
        write_pointer(self._directory, "latest", step)
        kept = sorted(self._directory.glob("step-*"))[-self._keep_last :]
        best = read_pointer(self._directory, "best")
        for old in self._directory.glob("step-*"):
            if old not in kept and old != best and old != final:
                shutil.rmtree(old)


class _PendingSave:
    """One rank's file being written by a thread."""

    def __init__(
        self, path: Path, pieces: Sequence[Piece], *, step: int, state: dict[str, Any], config: dict[str, Any]
    ) -> None:
        self.path, self.step, self.state, self.config = path, step, state, config
        self.error: OSError | None = None
        self._entry: SavedFile | None = None
        copies = {
            name: piece.values.detach().to("cpu", copy=True).contiguous()
            for name, piece in zip(piece_names(pieces), pieces, strict=True)
        }
        indices = tuple(piece.index for piece in pieces)
        self._thread = threading.Thread(target=self._write, args=(copies, indices), name="checkpoint")
        self._thread.start()

    def _write(self, copies: dict[str, torch.Tensor], indices: tuple[Any, ...]) -> None:
        try:
            save_file(copies, str(self.path))
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
            self._entry = SavedFile(file=self.path.name, sha256=sha256_of(self.path), pieces=indices)
        except Exception as error:  # safetensors raises its own class for a full disk
            self.error = error if isinstance(error, OSError) else OSError(*errno_of(error))

    def is_writing(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> SavedFile | None:
        self._thread.join()
        return self._entry


def errno_of(error: Exception) -> tuple[int, str]:
    """The system's number and words of an error of safetensors, which has a class of its own for a full disk."""
    full = "No space left" in str(error) or "os error 28" in str(error)
    return (errno.ENOSPC if full else errno.EIO), str(error)
