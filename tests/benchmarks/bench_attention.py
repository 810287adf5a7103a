"""Jagged attention against a padded one, forward and backward, in one run: time and peak memory.

    python tests/benchmarks/bench_attention.py [--threads 2] [--users 128] [--longest 880] [--heads 1] [--width 50]

Lengths follow a Zipf law with mean / max = 1/8. The padded baseline is what the public code does: pad every history to
the longest of the batch and compute `[B, N, longest, longest]` scores with autograd. Peak memory is what the process
gained over the memory held before the call, each measurement in a fresh process.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from megarec_kernels.hstu_attention import bucket_times, hstu_attention
from megarec_kernels.softmax_attention import softmax_attention
from megarec_kernels.tiles import plan_tiles
from torch import Tensor

NUM_BUCKETS = 128


def zipf_lengths(num_users: int, longest: int) -> np.ndarray:
    """`longest / rank^s`, with s such that the mean is an eighth of the longest; in a random order."""
    rank = np.arange(1, num_users + 1)
    exponents = np.linspace(0.0, 3.0, 3001)
    means = [np.maximum(longest / rank**s, 1).mean() for s in exponents]
    s = exponents[int(np.argmin(np.abs(np.array(means) - longest / 8)))]
    lengths = np.maximum(longest / rank**s, 1).astype(np.int64)
    return np.random.default_rng(0).permutation(lengths)


def make_inputs(args: argparse.Namespace) -> dict[str, Tensor]:
    lengths = torch.from_numpy(zipf_lengths(args.users, args.longest))
    generator = torch.Generator().manual_seed(0)
    num_tokens = int(lengths.sum())
    inputs = {
        name: torch.randn(num_tokens, args.heads, args.width, generator=generator).requires_grad_() for name in "qkv"
    }
    inputs["position_bias"] = torch.randn(args.longest, generator=generator).mul_(0.02).requires_grad_()
    inputs["time_bias"] = torch.randn(NUM_BUCKETS + 1, generator=generator).mul_(0.02).requires_grad_()
    inputs["timestamp"] = torch.randint(0, 10**7, (num_tokens,), generator=generator).sort()[0]
    inputs["query_timestamp"] = inputs["timestamp"] + torch.randint(0, 1000, (num_tokens,), generator=generator)
    inputs["cu_seqlens"] = F.pad(lengths.cumsum(0), (1, 0))
    return inputs


def jagged_hstu(x: dict[str, Tensor], num_layers: int) -> Tensor:
    plan = plan_tiles(x["cu_seqlens"])
    buckets = bucket_times(plan, x["timestamp"], x["query_timestamp"], num_buckets=NUM_BUCKETS)
    out = x["v"]
    for _ in range(num_layers):
        out = hstu_attention(
            x["q"], x["k"], out, x["cu_seqlens"], scale=0.1, divisor=100.0,
            position_bias=x["position_bias"], time_bias=x["time_bias"], plan=plan, time_buckets=buckets,
        )  # fmt: skip
    return out


def jagged_softmax(x: dict[str, Tensor], num_layers: int) -> Tensor:
    plan = plan_tiles(x["cu_seqlens"])
    out = x["v"]
    for _ in range(num_layers):
        out = softmax_attention(x["q"], x["k"], out, x["cu_seqlens"], scale=0.1, plan=plan)
    return out


def padded(x: dict[str, Tensor], num_layers: int, *, softmax: bool) -> Tensor:
    lengths = x["cu_seqlens"].diff()
    longest = int(lengths.max())
    real = torch.arange(longest) < lengths[:, None]

    def pad(values: Tensor) -> Tensor:
        dense = values.new_zeros(len(lengths), longest, *values.shape[1:])
        return dense.index_put((real,), values)

    q, k, out = (pad(x[name]).transpose(1, 2) for name in "qkv")
    row = torch.arange(longest)
    distance = row[:, None] - row[None, :]
    if not softmax:
        seconds = pad(x["query_timestamp"])[:, :, None] - pad(x["timestamp"])[:, None, :]
        buckets = (seconds.abs().clamp(min=1).log() / 0.301).long().clamp(max=NUM_BUCKETS)
    for _ in range(num_layers):
        scores = 0.1 * (q @ k.transpose(2, 3))
        if softmax:
            weights = scores.masked_fill(distance < 0, float("-inf")).softmax(dim=-1)
        else:
            scores = scores + x["position_bias"][distance.clamp(min=0)] + x["time_bias"][buckets][:, None]
            weights = F.silu(scores) * (distance >= 0) / 100.0
        out = weights @ out
    return out.transpose(1, 2)[real]


METHODS: dict[str, Callable[[dict[str, Tensor], int], Tensor]] = {
    "hstu jagged": jagged_hstu,
    "hstu padded": lambda x, n: padded(x, n, softmax=False),
    "softmax jagged": jagged_softmax,
    "softmax padded": lambda x, n: padded(x, n, softmax=True),
}


def measure(args: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(args.threads)
    inputs = make_inputs(args)
    leaves = [value for value in inputs.values() if value.requires_grad]

    def once() -> float:
        start = time.perf_counter()
        out = METHODS[args.method](inputs, args.layers)
        torch.autograd.grad(out.sum(), leaves, allow_unused=True)
        return time.perf_counter() - start

    torch.ones(64, 64).matmul(torch.ones(64, 64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    once()
    peak_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"ms": median(once() for _ in range(args.repeats)) * 1e3, "peak_mib": peak_mib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("threads", 2), ("users", 128), ("longest", 880), ("heads", 1), ("width", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--method", choices=list(METHODS))
    args = parser.parse_args()
    if args.method:
        print(json.dumps(measure(args)))
        return
    lengths = zipf_lengths(args.users, args.longest)
    print(f"{args.users} users, {lengths.sum()} tokens, mean / max {lengths.mean() / lengths.max():.3f}, {args}")
    results = {}
    for method in METHODS:
        command = [sys.executable, __file__, *sys.argv[1:], "--method", method]
        results[method] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{method:16} {results[method]['ms']:9.1f} ms {results[method]['peak_mib']:9.0f} MiB", flush=True)
    for kind in ("hstu", "softmax"):
        jagged, baseline = results[f"{kind} jagged"], results[f"{kind} padded"]
        print(
            f"{kind}: jagged is {baseline['ms'] / jagged['ms']:.1f} x as fast "
            f"with 1/{baseline['peak_mib'] / jagged['peak_mib']:.1f} of the memory"
        )


if __name__ == "__main__":
    main()
