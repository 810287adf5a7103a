"""A mistake under several ranks: one line, exit code 2 everywhere, whether all of them see it or one."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megarec.base.errors import UserError
from megarec.parallel.groups import ProcessInfo
from megarec.train import step as step_module
from tests.cli.test_commands import call
from tests.inference.synthetic import write_world
from tests.ranks import run_ranks

SMALL = ("stream.lanes=2", "stream.tokens_per_pack=512", "stream.max_history_events=64", "tensorboard=false")


def free_port() -> int:
    """A port of the loopback address that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def train(process: ProcessInfo, port: int, *arguments: str) -> int:
    """`megarec-train` as torchrun starts it, in a fork of the test."""
    os.environ.update(RANK=str(process.rank), WORLD_SIZE=str(process.world), LOCAL_RANK=str(process.rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return call("megarec-train", "device=cpu", *SMALL, *arguments)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stream.lanes=3", "3 lanes cannot be shared by 2 data-parallel ranks"),
        ("nmu_steps=3", "unknown key 'nmu_steps'"),
        ("model.input_fields=[nothing]", "'nothing' is not a field"),
    ],
)
def test_a_mistake_that_all_ranks_see(
    tmp_path: Path, setting: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_world(tmp_path / "data", num_users=40)
    capfd.readouterr()
    where = [f"data={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}", "verify_shards=false"]
    assert run_ranks(train, 2, free_port(), *where, setting) == [2, 2]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "run").exists()


def train_until_one_refuses(process: ProcessInfo, port: int, *arguments: str) -> int:
    """`megarec-train` in which rank 1 alone finds a damaged shard, in its third step."""
    original, calls = step_module.run_schedule, [0]

    def run_schedule(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if process.rank == 1 and calls[0] == 3:
            raise UserError("the checksum is wrong", where="shard-000007.tar")
        return original(*args, **kwargs)

    step_module.run_schedule = run_schedule  # type: ignore[assignment]
    return train(process, port, *arguments)


def test_a_mistake_that_one_rank_sees(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_world(tmp_path / "data", num_users=40)
    capfd.readouterr()
    where = [f"data={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}", "verify_shards=false", "num_steps=50"]
    assert run_ranks(train_until_one_refuses, 2, free_port(), *where) == [2, 2]
    assert capfd.readouterr().err == "error: shard-000007.tar: the checksum is wrong\n"
    other, refusing = [(tmp_path / "run" / "logs" / f"rank-{rank:05d}.log").read_text() for rank in range(2)]
    assert "refused: shard-000007.tar: the checksum is wrong" in refusing and "Traceback" not in refusing
    assert "Traceback" in other  # it lost its connection, which is said in its log alone


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megarec.cli.train"]
    settings = [f"data={tmp_path}", f"run_dir={tmp_path / 'run'}", "stream.lanes=3", "device=cpu"]
    ended = subprocess.run([sys.executable, *launch, *settings], capture_output=True, text=True, check=False)
    output = ended.stdout + ended.stderr
    assert ended.returncode == 1  # torchrun's own
    assert output.count("3 lanes cannot be shared by 2 data-parallel ranks") == 1
    assert output.count("exitcode  : 2") == 2, output
