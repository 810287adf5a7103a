"""Two agents with node ranks of their own, started by the scripts of examples/multi_node, train one job with gloo.

Both hosts are this machine: on the loopback address, or, where that is allowed, in two network namespaces.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch

from megarec.checkpoint.manifest import read_pointer
from tests.cli.test_one_line_for_all_ranks import free_port
from tests.cli.test_torchrun import SETTINGS
from tests.inference.synthetic import write_world
from tests.train.runs import read_tensors

pytestmark = pytest.mark.slow  # each start of two agents takes up to half a minute
EXAMPLES = Path(__file__).parents[2] / "examples" / "multi_node"
END_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class Host:
    """Where an agent runs: what stands before its command, and what only its environment has."""

    prefix: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def start(host: Host, settings: list[str], environment: dict[str, str]) -> "subprocess.Popen[str]":
    command = [*host.prefix, "bash", str(EXAMPLES / "launch.sh"), *settings]
    known = {"NNODES": "2", "NPROC_PER_NODE": "1", "MAX_RESTARTS": "0", **environment, **host.environment}
    return subprocess.Popen(
        command, env={**os.environ, **known}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_job(
    data: Path, run_dir: Path, hosts: list[Host], meeting: str = "static", **environment: str
) -> list["subprocess.Popen[str]"]:
    """One agent on each host; with `static` they are told their numbers, with `c10d` they agree on them."""
    settings = [f"data={data}", f"run_dir={run_dir}", "device=cpu", *SETTINGS]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
    numbers = [{"NODE_RANK": str(number)} if meeting == "static" else {} for number in range(len(hosts))]
    return [start(host, settings, {**common, **number}) for host, number in zip(hosts, numbers, strict=True)]


def finish(agents: list["subprocess.Popen[str]"]) -> list[str]:
    try:
        outputs = [agent.communicate(timeout=END_SECONDS)[0] for agent in agents]
    except subprocess.TimeoutExpired:
        for agent in agents:
            if agent.poll() is None:
                lose(agent)
        raise
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    return outputs


def lose(agent: "subprocess.Popen[str]") -> None:
    """The host is gone: SIGKILL for everything that ran on it."""
    for process in [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]:
        process.kill()
    agent.communicate(timeout=END_SECONDS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hosts") / "data"
    write_world(path, num_users=60)
    return path


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of the run that nobody interrupts."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    first, second = finish(start_job(data, run_dir, [Host(), Host()]))
    assert "step 40/40" in first and "2 ranks" in first
    assert "step " not in second and "error" not in second  # rank 0 alone is heard
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == [
        "main.log",
        "rank-00000.log",
        "rank-00001.log",
    ]
    return read_tensors(str(run_dir))


def same(expected: dict[str, torch.Tensor], run_dir: Path) -> bool:
    found = read_tensors(str(run_dir))
    return expected.keys() == found.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_lost_host_costs_no_more_than_the_steps_since_the_checkpoint(
    tmp_path: Path, data: Path, whole: dict[str, torch.Tensor]
) -> None:
    run_dir = tmp_path / "run"
    survivor, victim = start_job(data, run_dir, [Host(), Host()])
    while read_pointer(run_dir / "checkpoints", "latest") is None and victim.poll() is None:
        time.sleep(0.01)
    lose(victim)
    output, _ = survivor.communicate(timeout=END_SECONDS)
    assert survivor.returncode != 0, output
    assert "step 40/40" not in output
    newest = read_pointer(run_dir / "checkpoints", "latest")
    assert newest is not None
    first, _ = finish(start_job(data, run_dir, [Host(), Host()]))
    step = int(newest.name.removeprefix("step-"))
    assert f"{step} of 40 steps done" in first
    assert same(whole, run_dir)


def test_a_killed_process_is_started_again_with_all_others(
    tmp_path: Path, data: Path, whole: dict[str, torch.Tensor]
) -> None:
    run_dir = tmp_path / "run"
    agents = start_job(data, run_dir, [Host(), Host()], "c10d", MAX_RESTARTS="2")
    while read_pointer(run_dir / "checkpoints", "latest") is None and agents[1].poll() is None:
        time.sleep(0.01)
    (victim,) = psutil.Process(agents[1].pid).children()
    victim.kill()
    outputs = finish(agents)
    assert any("0 of 40 steps done" in output and "10 of 40 steps done" in output for output in outputs), outputs
    log = (run_dir / "logs" / "rank-00000.log").read_text()
    assert log.count("started: ") == 2 and log.count("INFO megarec: finished") == 1
    assert same(whole, run_dir)


def test_hosts_that_number_themselves(tmp_path: Path, data: Path, whole: dict[str, torch.Tensor]) -> None:
    outputs = finish(start_job(data, tmp_path / "run", [Host(), Host()], "c10d"))
    assert sum("step 40/40" in output for output in outputs) == 1
    assert same(whole, tmp_path / "run")


SRUN = """#!/usr/bin/env bash
# Stands for Slurm's: runs the command once per task, all at once, and fails if one fails.
while [[ $1 == --* ]]; do shift; done
pids=()
for ((task = 0; task < SLURM_NNODES; task++)); do
  SLURM_NODEID=$task "$@" & pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""
SCONTROL = "#!/usr/bin/env bash\n[[ $* == 'show hostnames 127.0.0.[1-2]' ]] && printf '127.0.0.1\\n127.0.0.2\\n'\n"


def test_a_slurm_job(tmp_path: Path, data: Path, whole: dict[str, torch.Tensor]) -> None:
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_SUBMIT_DIR": str(EXAMPLES.parents[1]),
        "MASTER_PORT": str(free_port()),
        "NPROC_PER_NODE": "1",
    }
    settings = [f"data={data}", f"run_dir={tmp_path / 'run'}", "device=cpu", *SETTINGS]
    done = subprocess.run(
        ["bash", str(EXAMPLES / "train.sbatch"), *settings],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=END_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("job 17, start 0, on 127.0.0.[1-2]\n")
    assert same(whole, tmp_path / "run")


@pytest.fixture
def namespaces() -> Iterator[list[Host]]:
    """Two hosts that reach each other by a cable and by nothing else."""
    names = [f"megarec-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", f"cable{number}")
            ip("-n", name, "link", "set", f"cable{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        pytest.skip(f"no network namespaces here: {error}")
    yield [
        Host(
            prefix=("ip", "netns", "exec", name),
            environment={
                "MASTER_ADDR": "10.77.0.1",
                "LOCAL_ADDR": f"10.77.0.{number + 1}",
                "GLOO_SOCKET_IFNAME": f"cable{number}",
            },
        )
        for number, name in enumerate(names)
    ]
    for name in names:
        ip("netns", "del", name)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.mark.parametrize("meeting", ["static", "c10d"])
def test_two_network_namespaces(
    tmp_path: Path, data: Path, whole: dict[str, torch.Tensor], namespaces: list[Host], meeting: str
) -> None:
    finish(start_job(data, tmp_path / "run", namespaces, meeting))
    assert same(whole, tmp_path / "run")
