"""What no command answers with a traceback: paths the system refuses, too little memory, numbers that are none."""

import errno
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megarec.base.config import build
from megarec.base.errors import UserError, run_command
from megarec.base.files import new_directory, read_json, read_records


def fail(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


def outcome(body: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        run_command(body)
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1 and printed.startswith("error: ")
    return int(ended.value.code or 0), printed


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG])
def test_a_refused_path_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = outcome(fail(OSError(number, "No such luck", "some/where")), capsys)
    assert code == 2
    assert "some/where: No such luck" in line


def test_a_file_in_the_place_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code, line = outcome(lambda: read_json(tmp_path / "file" / "dataset.json", what="dataset"), capsys)
    assert code == 2 and str(tmp_path / "file") in line

    def make() -> None:
        with new_directory(tmp_path / "file" / "made"):
            pass

    code, line = outcome(make, capsys)
    assert code == 2 and str(tmp_path / "file") in line


def test_too_little_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = outcome(fail(MemoryError("Unable to allocate 58.2 TiB")), capsys)
    assert code == 1 and "58.2 TiB" in line


def test_other_system_errors_keep_their_traceback() -> None:
    with pytest.raises(ConnectionResetError):
        run_command(fail(ConnectionResetError(errno.ECONNRESET, "gone")))


@dataclass(frozen=True, kw_only=True)
class Settings:
    rate: float = 0.0


@pytest.mark.parametrize("value", ["nan", float("inf"), "-inf", "1e999", 10**400, True, "many", None])
def test_a_setting_is_a_finite_number(value: object) -> None:
    with pytest.raises(UserError, match="rate: expected a finite number"):
        build(Settings, {"rate": value})


@pytest.mark.parametrize("num_digits", [400, 5000])  # more than a float holds, more than Python reads
def test_json_of_somebody_else_has_no_endless_numbers(tmp_path: Path, num_digits: int) -> None:
    number = "1" + "0" * num_digits
    (tmp_path / "a.json").write_text(f'{{"seed": {10**30}, "loss": {number}}}')
    with pytest.raises(UserError, match="too many digits"):
        read_json(tmp_path / "a.json", what="evaluation")
    (tmp_path / "a.jsonl").write_text(f'{{"step": 1, "loss": {number}}}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match="line 1: not a record"):
        read_records(tmp_path / "a.jsonl")


def test_numbers_as_yaml_reads_them() -> None:
    assert build(Settings, {"rate": "1e-3"}).rate == 1e-3
    assert build(Settings, {"rate": 2}).rate == 2.0


def test_a_reader_that_leaves_early_sees_no_traceback() -> None:
    program = (
        "from megarec.base.errors import run_command\nrun_command(lambda: [print(n) for n in range(100_000)] and None)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_command(interrupted)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "interrupted: only what was complete is left\n"
