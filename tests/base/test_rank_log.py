import logging
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megarec.base.errors import UserError
from megarec.base.rank_log import RankLog

SPEAK = """
import logging, os, sys, warnings
from pathlib import Path
from megarec.base.progress import say
from megarec.base.rank_log import RankLog
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
with RankLog(rank) as log:
    os.write(2, b"before the folder\\n")
    log.open(folder, about="device cpu, tensor 1 of 2")
    say("a line of progress")
    warnings.warn("an odd thing", UserWarning)
    logging.getLogger("other.library").warning("a library warns")
    logging.getLogger("other.library").info("a library chats")
    os.write(1, b"from C\\n")
    print("a bar", file=sys.stderr)
say("afterwards")
"""


def speak(rank: int, folder: Path) -> "subprocess.CompletedProcess[str]":
    """In a process of its own, where standard output is the real one."""
    return subprocess.run(
        [sys.executable, "-c", SPEAK, str(rank), str(folder)], capture_output=True, text=True, check=True
    )


def read(folder: Path, name: str) -> str:
    return (folder / name).read_text(encoding="utf-8")


def test_other_ranks_are_silent_and_their_log_holds_all(tmp_path: Path) -> None:
    done = speak(3, tmp_path / "logs")
    assert (done.stdout, done.stderr) == ("afterwards\n", "")
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["rank-00003.log"]
    text = read(tmp_path / "logs", "rank-00003.log")
    lines = text.splitlines()
    assert lines[0] == "before the folder"
    assert f"started: rank 3, host {socket.gethostname()}, pid " in lines[1]
    assert lines[1].endswith("device cpu, tensor 1 of 2")
    assert lines[-1].endswith("INFO megarec: finished")
    for said in ("a line of progress", "an odd thing", "WARNING other.library: a library warns", "from C", "a bar"):
        assert said in text
    assert "chats" not in text
    assert "afterwards" not in text


def test_rank_0_is_heard_and_what_it_says_is_kept(tmp_path: Path) -> None:
    done = speak(0, tmp_path)
    assert sorted(done.stdout.splitlines()) == ["a line of progress", "afterwards", "from C"]
    for shown in ("before the folder", "an odd thing", "a library warns", "a bar"):
        assert shown in done.stderr
    for hidden in ("progress", "started", "finished", "chats"):
        assert hidden not in done.stderr
    assert read(tmp_path, "main.log") == "a line of progress\n"
    assert "INFO megarec.said: a line of progress" in read(tmp_path, "rank-00000.log")
    speak(0, tmp_path)  # the run goes on
    assert read(tmp_path, "main.log") == "a line of progress\n" * 2
    assert read(tmp_path, "rank-00000.log").count("finished") == 2


@pytest.mark.parametrize("rank", [0, 2])
def test_an_error_is_in_the_log_with_its_traceback(
    tmp_path: Path, rank: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ZeroDivisionError), RankLog(rank) as log:
        log.open(tmp_path, about="")
        _ = 1 / 0
    text = read(tmp_path, f"rank-{rank:05d}.log")
    assert "ERROR megarec: stopped by ZeroDivisionError" in text
    assert "_ = 1 / 0" in text
    assert "finished" not in text
    assert capfd.readouterr() == ("", "")  # it is on its way to whoever ends the process


def test_a_mistake_is_one_line_in_the_log(tmp_path: Path) -> None:
    with pytest.raises(UserError), RankLog(1) as log:
        log.open(tmp_path, about="")
        raise UserError("the shard is damaged", where="shard-7.tar")
    assert "ERROR megarec: refused: shard-7.tar: the shard is damaged\n" in read(tmp_path, "rank-00001.log")
    assert "Traceback" not in read(tmp_path, "rank-00001.log")


def test_nothing_of_it_stays_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root, ours = logging.getLogger(), logging.getLogger("megarec")
    before = (list(root.handlers), ours.level, warnings.showwarning, sorted(os.listdir("/proc/self/fd")))
    with pytest.raises(UserError), RankLog(1):
        raise UserError("refused before there was a folder")
    assert (list(root.handlers), ours.level, warnings.showwarning, sorted(os.listdir("/proc/self/fd"))) == before
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_fault_in_c_leaves_its_place(tmp_path: Path) -> None:
    program = SPEAK.split("    say(")[0] + "    import ctypes; ctypes.string_at(0)\n"
    dead = subprocess.run([sys.executable, "-c", program, "1", str(tmp_path)], capture_output=True, check=False)
    assert dead.returncode == -signal.SIGSEGV
    assert "string_at" in read(tmp_path, "rank-00001.log")
