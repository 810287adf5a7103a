"""How fast training goes, and how far that is from what the hardware can do."""

import time
from dataclasses import dataclass

import psutil
import torch


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What an interval of steps achieved, over all ranks.

    Attributes:
        seconds: wall-clock time of the interval.
        tokens_per_second: living tokens, padding not counted.
        tflops: model arithmetic per second, 1e12 operations, all ranks together.
        mfu: `tflops` over the measured matmul peak of all ranks.
        data_wait: share of the time spent waiting for packs.
    """

    seconds: float
    tokens_per_second: float
    tflops: float
    mfu: float
    data_wait: float


class Meter:
    """Adds up tokens, arithmetic and waiting between two progress lines.

    Args:
        peak_flops: the measured peak of one rank, operations per second.
        num_ranks: ranks that work together.
    """

    def __init__(self, *, peak_flops: float, num_ranks: int) -> None:
        self._peak = peak_flops * num_ranks
        self._reset()

    def add(self, *, num_tokens: int, flops: float, waited_seconds: float) -> None:
        """One step of all ranks together."""
        self._tokens += num_tokens
        self._flops += flops
        self._waited += waited_seconds

    def read(self) -> Throughput:
        """What happened since the last reading; starts a new interval."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        result = Throughput(
            seconds=seconds,
            tokens_per_second=self._tokens / seconds,
            tflops=self._flops / seconds / 1e12,
            mfu=self._flops / seconds / self._peak,
            data_wait=self._waited / seconds,
        )
        self._reset()
        return result

    def _reset(self) -> None:
        self._tokens, self._flops, self._waited = 0, 0.0, 0.0
        self._started = time.perf_counter()


def measure_matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product: the denominator of MFU.

    Takes a few tenths of a second; the best of five products of 1,024 (CPU) or 8,192 (GPU) squared matrices.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):  # the first one warms up
        _synchronize(device)
        started = time.perf_counter()
        torch.mm(a, a)
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def memory_bytes(device: torch.device) -> int:
    """Peak device memory of this process on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
