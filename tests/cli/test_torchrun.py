"""The same command under torchrun, killed for real and continued."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from megarec.checkpoint.manifest import read_pointer
from tests.inference.synthetic import write_world
from tests.train.runs import read_tensors

SETTINGS = [
    "num_steps=40",
    "checkpoint.every_steps=10",
    "log_every_steps=10",
    "evaluate_every_steps=20",
    "checkpoint.keep_best=ndcg@10",
    "tensorboard=false",
    "model.width=16",
    "model.table_width=16",
    "model.block.num_heads=2",
    "model.heads.query_width=16",
    "model.dropout=0.1",
    "stream.tokens_per_pack=64",
    "stream.lanes=2",
    "stream.max_history_events=12",
]


def start(data: Path, run_dir: Path, num_ranks: int) -> "subprocess.Popen[str]":
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"] if num_ranks > 1 else []
    command = [sys.executable, *launch, "-m", "megarec.cli.train", f"data={data}", f"run_dir={run_dir}", *SETTINGS]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def test_two_processes_survive_a_kill(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_world(data, num_users=60)
    output = finish(start(data, tmp_path / "whole", 2))
    assert "2 ranks" in output
    assert output.count("evaluation at step") == 2
    logs = tmp_path / "whole" / "logs"
    assert sorted(path.name for path in logs.iterdir()) == ["main.log", "rank-00000.log", "rank-00001.log"]
    said = (logs / "main.log").read_text()
    assert said.count("step 40/40") == 1
    assert all(line in output for line in said.splitlines())
    second = (logs / "rank-00001.log").read_text()
    assert "world 1 of 2" in second and "data 1 of 2" in second and second.rstrip().endswith("finished")
    victim = start(data, tmp_path / "killed", 2)
    while read_pointer(tmp_path / "killed" / "checkpoints", "latest") is None and victim.poll() is None:
        time.sleep(0.01)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.communicate()
    finish(start(data, tmp_path / "killed", 2))
    expected, resumed = read_tensors(str(tmp_path / "whole")), read_tensors(str(tmp_path / "killed"))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
    assert (tmp_path / "whole" / "checkpoints" / "best").read_text() == (
        tmp_path / "killed" / "checkpoints" / "best"
    ).read_text()
