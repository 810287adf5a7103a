"""Files and folders that appear whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarec.base.errors import UserError

MAX_DIGITS = 40


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A folder to fill that gets its name `path` only when the block ends without an error.

    Raises:
        UserError: `path` exists and is not an empty folder.
    """
    refuse_occupied(path)
    staging = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        if path.exists():
            path.rmdir()
        os.replace(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file name beside `path`, renamed to `path` only when the block ends without an error."""
    staging = path.with_name(f".{path.name}.unfinished")
    try:
        yield staging
        with staging.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def refuse_occupied(path: Path) -> None:
    """Raises `UserError` when `path` exists and is anything but an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError("the output directory is not empty", where=str(path), fix="Choose another or remove it")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, keys in the order given, whole or not at all."""
    with new_file(path) as staging:
        staging.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, *, what: str) -> Any:
    """Reads JSON; a missing or broken file is a `UserError` that calls the file `what`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_int=_integer)
    except FileNotFoundError:
        raise UserError(f"no {what} here", where=str(path), fix="Check the path") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"the {what} is not valid JSON ({error})", where=str(path)) from None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a run's JSONL file, which need not exist; a last line cut short by a kill is dropped.

    Raises:
        UserError: another line is no record with a `step`.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line, parse_int=_integer)
        except (json.JSONDecodeError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int | float):
            records.append(record)
        elif number < len(lines):
            raise UserError("not a record with a step", where=f"{path}, line {number}")
    return records


def _integer(digits: str) -> int:
    """An integer of JSON; one that no float can hold is none."""
    if len(digits) > MAX_DIGITS:
        raise json.JSONDecodeError("a number of too many digits", digits, 0)
    return int(digits)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
