"""What a checkpoint directory says about itself: JSON only, checked before a byte of it is used.

```
checkpoints/
  latest                   the name of the newest complete checkpoint
  best                     the name of the best one by the chosen metric, if one is kept
  step-00001000/
    manifest.json          step, files with sha256, pieces, training state
    rank-00000.safetensors what each rank held
```
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarec.base.config import build, plain
from megarec.base.errors import UserError
from megarec.base.files import new_file, read_json, sha256_of, write_json
from megarec.checkpoint.pieces import PieceIndex

FORMAT = 1
_FILE_NAME = re.compile(r"rank-\d{5}\.safetensors")
_STEP_NAME = re.compile(r"step-\d{8}")


@dataclass(frozen=True, kw_only=True)
class SavedFile:
    """One file of a checkpoint and the pieces in it."""

    file: str
    sha256: str
    pieces: tuple[PieceIndex, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint but the tensors.

    Attributes:
        format: the version of this layout.
        step: optimizer steps done.
        files: one per rank.
        state: what training needs besides tensors: lane positions, update counts, where each table begins.
        config: the run's whole configuration.
    """

    format: int
    step: int
    files: tuple[SavedFile, ...]
    state: dict[str, Any]
    config: dict[str, Any]


def step_name(step: int) -> str:
    """The directory name of a step."""
    return f"step-{step:08d}"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` into a checkpoint directory that is not visible yet."""
    write_json(directory / "manifest.json", plain(manifest))


def read_manifest(directory: Path) -> Manifest:
    """Reads and checks `manifest.json` and the checksum of every file it names.

    Raises:
        UserError: the manifest or a file is missing, damaged or of another format.
    """
    raw = read_json(directory / "manifest.json", what="checkpoint manifest")
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError("not a checkpoint of this format", where=str(directory), fix="Use the megarec that wrote it")
    manifest = build(Manifest, raw, where="manifest.json")
    for entry in manifest.files:
        path = directory / entry.file
        if not _FILE_NAME.fullmatch(entry.file) or not path.is_file():
            raise UserError("the checkpoint lacks this file", where=str(path), fix="Use an older checkpoint")
        if sha256_of(path) != entry.sha256:
            raise UserError(
                "the checksum is wrong: the file is damaged", where=str(path), fix="Use an older checkpoint"
            )
    return manifest


def read_pointer(directory: Path, pointer: str) -> Path | None:
    """The checkpoint that `latest` or `best` names, or None when there is none yet."""
    path = directory / pointer
    if not path.is_file():
        return None
    name = path.read_text(encoding="utf-8").strip()
    if not _STEP_NAME.fullmatch(name) or not (directory / name).is_dir():
        raise UserError(f"points to '{name}', which is not here", where=str(path), fix="Name a checkpoint directly")
    return directory / name


def write_pointer(directory: Path, pointer: str, step: int) -> None:
    """Makes `latest` or `best` name the checkpoint of `step`, by one atomic rename."""
    with new_file(directory / pointer) as staging:
        staging.write_text(step_name(step) + "\n", encoding="utf-8")
