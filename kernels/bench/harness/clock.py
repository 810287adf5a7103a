"""Times: many calls of all methods in turns, and what the device can do at all."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

FLUSHED_BYTES = 1 << 29  # more than any L2 holds, and longer than what a launch costs the host
SLICE_SECONDS = 0.05
MAX_CALLS_IN_A_ROUND = 20
LEAST_ROUNDS = 3

Key = TypeVar("Key")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the device was measured to do in this run.

    Attributes:
        flops: operations per second of a large matrix product, the best of many.
        bytes_per_second: bytes read and written by a large copy, the best of many.
    """

    flops: float
    bytes_per_second: float

    def seconds(self, flops: float, num_bytes: float) -> float:
        """The least time that so much work can take."""
        return max(flops / self.flops, num_bytes / self.bytes_per_second)


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Products of 8,192 (GPU) or 1,024 squared matrices in this dtype, and copies of 1 GiB or 256 MiB."""
    size, num_bytes = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 28)
    a = torch.randn(size, size, device=device).to(dtype)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: torch.mm(a, a), "copy": lambda: target.copy_(source)}
    times = time_in_turns(calls, device=device, seconds=0.5)
    return Limits(
        flops=2.0 * size**3 / min(times["product"]) * 1e3,
        bytes_per_second=2.0 * num_bytes / min(times["copy"]) * 1e3,
    )


def time_in_turns(
    calls: Mapping[Key, Callable[[], object]], *, device: torch.device, seconds: float
) -> dict[Key, list[float]]:
    """Milliseconds of single calls. In every round each method has its turn, so that noise hits all alike.

    A turn is as many calls as fit 50 ms, 20 at most; rounds go on for `seconds` times the number of methods, three at
    least. On CUDA the L2 cache is overwritten before every call, and events take the time on the device.

    Args:
        calls: each is called twice before anything is timed.
        device: where they run.
        seconds: for each of the calls.
    """
    if not calls:
        return {}
    turns = {}
    for name, call in calls.items():
        call()
        started = time.perf_counter()
        call()
        wait_for(device)
        took = time.perf_counter() - started
        turns[name] = max(1, min(MAX_CALLS_IN_A_ROUND, int(SLICE_SECONDS / max(took, 1e-9))))
    time_calls = _time_on_cuda if device.type == "cuda" else _time_on_cpu
    times: dict[Key, list[float]] = {name: [] for name in calls}
    started, num_rounds = time.perf_counter(), 0
    while num_rounds < LEAST_ROUNDS or time.perf_counter() - started < seconds * len(calls):
        for name, call in calls.items():
            times[name] += time_calls(call, turns[name])
        num_rounds += 1
    return times


def wait_for(device: torch.device) -> None:
    """Until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time_on_cpu(call: Callable[[], object], num_calls: int) -> list[float]:
    times = []
    for _ in range(num_calls):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return times


def _time_on_cuda(call: Callable[[], object], num_calls: int) -> list[float]:
    """Nothing waits between the calls: the host launches ahead while the device overwrites the cache."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(num_calls)]
    for first, last in events:
        flushed.zero_()
        first.record()
        call()
        last.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) for first, last in events]
