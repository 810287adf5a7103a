"""What the scripts of examples/multi_node hand to torchrun, without starting anything."""

import os
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "multi_node"
OURS = ("NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "JOB_ID", "MAX_RESTARTS", "LOCAL_ADDR")
SHOW = '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\nprintf "connections %s\\n" "$CUDA_DEVICE_MAX_CONNECTIONS"\n'


def run(script: str, *arguments: str, folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The script, with a torchrun that shows its arguments, one a line."""
    torchrun = folder / "torchrun"
    torchrun.write_text(SHOW, encoding="utf-8")
    torchrun.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    return subprocess.run(
        ["bash", str(EXAMPLES / script), *arguments],
        env={**kept, "PATH": f"{folder}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"NNODES": "2", "MASTER_ADDR": "host0", "NODE_RANK": "1"},
            "--nnodes 2 --nproc-per-node 1 --max-restarts 0 --node-rank 1 --master-addr host0 --master-port 29500",
        ),
        (
            {"NNODES": "2", "MASTER_ADDR": "host0", "JOB_ID": "7", "NPROC_PER_NODE": "8", "MAX_RESTARTS": "5"},
            "--nnodes 2 --nproc-per-node 8 --max-restarts 5 --rdzv-backend c10d --rdzv-endpoint host0:29500 "
            "--rdzv-id 7",
        ),
        (
            {"NNODES": "2", "MASTER_ADDR": "10.0.0.1", "LOCAL_ADDR": "10.0.0.2", "MASTER_PORT": "5000"},
            "--nnodes 2 --nproc-per-node 1 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:5000 "
            "--rdzv-id megarec --local-addr 10.0.0.2 --rdzv-conf is_host=0",
        ),
    ],
    ids=["static", "c10d", "addresses"],
)
def test_what_torchrun_gets(tmp_path: Path, environment: dict[str, str], expected: str) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/usr/bin/env bash\nexit 9\n")  # a host without a GPU, whatever this one has
    (tmp_path / "nvidia-smi").chmod(0o755)
    done = run("launch.sh", "data=a b", "run_dir=run", folder=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    *arguments, connections = done.stdout.splitlines()
    assert arguments == [*expected.split(), "-m", "megarec.cli.train", "data=a b", "run_dir=run"]
    assert connections == "connections 1"


def test_a_process_for_every_gpu(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/usr/bin/env bash\nprintf 'GPU 0\\nGPU 1\\nGPU 2\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    done = run("launch.sh", "data=a", folder=tmp_path)
    assert "--nproc-per-node\n3\n" in done.stdout


def test_hosts_that_cannot_find_each_other_are_refused(tmp_path: Path) -> None:
    done = run("launch.sh", "data=a", folder=tmp_path, NNODES="2")
    assert done.returncode == 2
    assert done.stderr == "error: MASTER_ADDR is not set. Name a host that all others reach\n"


def test_restarts_that_would_not_work_are_refused(tmp_path: Path) -> None:
    done = run("launch.sh", "data=a", folder=tmp_path, NODE_RANK="0", MAX_RESTARTS="2")
    assert done.returncode == 2
    assert done.stderr == "error: MAX_RESTARTS=2 does not work with NODE_RANK. Leave NODE_RANK out\n"


def test_help(tmp_path: Path) -> None:
    for arguments in ((), ("--help",)):
        done = run("launch.sh", *arguments, folder=tmp_path)
        assert done.returncode == 0
        assert all(name in done.stdout for name in OURS)
    assert run("train.sbatch", folder=tmp_path).returncode == 2
