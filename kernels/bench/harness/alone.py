"""Measurements that need a process of their own: peak memory on a CPU, and how long a first step takes.

The process is `python kernels/bench --alone TASK` with the task as JSON; it prints one line of JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kernels.bench.cases import Inputs, all_cases, draw_inputs
from kernels.bench.harness.clock import wait_for
from kernels.bench.harness.gate import run_method
from kernels.bench.harness.peers import load_peers

COMPILER_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One method at one shape, to run once in a fresh process.

    Attributes:
        runs: the method's forward and backward; or `nothing`, after imports, inputs and a small product.
        op: the op.
        case: its name.
        method: the method's name; for `beside` the other case's.
        dtype: such as `float32`.
        device: `cpu` or `cuda`.
        seed: of the inputs.
        threads: of torch on the CPU.
        peers: the files that were given.
    """

    runs: Literal["method", "nothing"]
    op: str
    case: str
    method: str
    dtype: str
    device: str
    seed: int
    threads: int
    peers: tuple[str, ...] = ()


def run_alone(task: Task, environment: Mapping[str, str] | None = None) -> dict[str, float | None]:
    """By a fresh process: `mib` of peak memory, None if it compiled something, and `seconds` from launch to the end.

    Raises:
        RuntimeError: the process failed; its last line.
    """
    command = [sys.executable, str(Path(__file__).parents[1]), "--alone", json.dumps(asdict(task))]
    started = time.monotonic()
    done = subprocess.run(
        command, env=os.environ | dict(environment or {}), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"in a process of its own: {last}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {"mib": found["mib"], "seconds": found["finished"] - started}


def measure_first_steps(task: Task) -> dict[str, float]:
    """Seconds from launch to the end of the first forward and backward, without and with compiled kernels on disk."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: f"{folder}/{name}" for name in COMPILER_CACHES}
        steps = {"nothing": "nothing", "cold": "method", "warm": "method"}
        return {
            name: float(run_alone(replace(task, runs=runs), caches)["seconds"] or 0.0)  # type: ignore[arg-type]
            for name, runs in steps.items()
        }


def perform(text: str) -> None:
    """What the fresh process does with its task, given as JSON; prints what it found."""
    task = Task(**json.loads(text))
    torch.set_num_threads(task.threads)
    device, dtype = torch.device(task.device), getattr(torch, task.dtype)
    cases = all_cases()
    case = next(case for case in cases[task.op] if case.name == task.case)
    methods = {**case.ours, **case.baselines, **load_peers(task.peers, cases).get(task.op, {})}
    if task.method in case.beside:
        case = case.beside[task.method]
        methods[task.method] = next(iter(case.ours.values()))
    inputs = draw_inputs(case, device=device, dtype=dtype, seed=task.seed)
    run_method(_multiply, {"x": torch.ones(64, 64, device=device, requires_grad=True)}, ("x",))
    before = _peak_bytes()
    if task.runs == "method":
        run_method(methods[task.method], inputs, case.gradients)
    wait_for(device)
    finished = time.monotonic()
    compiled = "torch._inductor.compile_fx" in sys.modules  # its own memory would count
    print(json.dumps({"mib": None if compiled else (_peak_bytes() - before) / 2**20, "finished": finished}))


def _multiply(inputs: Inputs) -> Tensor:
    """A small product: torch loads what it needs for any forward and backward, and starts its threads."""
    return inputs["x"] @ inputs["x"]


def _peak_bytes() -> int:
    """Of this process's own memory: `getrusage` would start from what its parent held when it was made."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
