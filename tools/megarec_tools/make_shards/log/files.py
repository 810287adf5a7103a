"""Which files a log is made of, and their format."""

import glob
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megarec.base.errors import UserError

LogFormat = Literal["parquet", "csv", "tsv", "jsonl", "sequences"]

FORMATS: dict[str, LogFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".inter": "tsv",
    ".item": "tsv",
    ".user": "tsv",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
}
COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True, kw_only=True)
class LogFiles:
    """The files of one log, in the order in which their rows count, all of one format."""

    paths: tuple[Path, ...]
    format: LogFormat

    @property
    def num_bytes(self) -> int:
        """Bytes on the disk."""
        return sum(path.stat().st_size for path in self.paths)


def find_files(inputs: list[str], *, file_format: str) -> LogFiles:
    """The files that `inputs` name: files, globs and directories.

    The files of a directory or a glob come in the order of their names; names that begin with `.` or `_` are skipped.

    Args:
        inputs: what the user named.
        file_format: the format of files whose suffix does not say it, or `auto`.

    Raises:
        UserError: nothing is there, a file is named twice, or the files are not all of one kind.
    """
    paths = [path for text in inputs for path in _expand(text)]
    twice = next((path for path, times in Counter(paths).items() if times > 1), None)
    if twice:
        raise UserError("the file is named twice", where=str(twice))
    kinds = {_kind_of(path, file_format): path for path in reversed(paths)}
    if len(kinds) > 1:
        names = " and ".join(sorted(str(path) for path in kinds.values()))
        raise UserError(
            f"files of different kinds in one log: {names}", fix="Name files of one kind, such as 'logs/*.csv'"
        )
    return LogFiles(paths=tuple(paths), format=next(iter(kinds))[0])


def _expand(text: str) -> list[Path]:
    path = Path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        below = sorted(path.rglob("*"))
        found = [p for p in below if p.is_file() and not _is_hidden(p.relative_to(path))]
    else:
        found = [Path(name) for name in sorted(glob.glob(text, recursive=True)) if Path(name).is_file()]
    if not found:
        raise UserError("no such file" if not path.is_dir() else "no files in here", where=text, fix="Check the path")
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _kind_of(path: Path, file_format: str) -> tuple[LogFormat, str]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    suffix = suffixes[-1] if suffixes else ""
    kind: LogFormat | None = FORMATS.get(suffix) or {f: f for f in FORMATS.values()}.get(file_format)  # type: ignore
    if file_format == "sequences":
        kind = "sequences"  # of a file of any suffix: there is nothing in it that could say so
    if kind is None:
        fix = f"Use one of {', '.join(FORMATS)} (and .gz or .zst), or set file_format in the schema"
        raise UserError("the suffix does not say the format", where=str(path), fix=fix)
    if kind == "parquet" and compression:
        raise UserError("a Parquet file has its own compression", where=str(path), fix=f"Undo the {compression}")
    return kind, compression
