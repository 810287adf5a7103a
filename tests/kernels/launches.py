"""Launches HSTU attention on a GPU that is pretended, and says where a launch is not what its variant records.

    python tests/kernels/launches.py

Nothing is compiled or run: Triton is stopped where it looks for a compiled program. Prints a line per difference.
"""

import sys
from typing import Any

import torch
from megarec_kernels.hstu_attention import bucket_times, gpu
from megarec_kernels.hstu_attention.variants import variants
from megarec_kernels.tiles import plan_tiles
from megarec_kernels.variants import Variant
from megarec_kernels.visibility import semi_local
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

HEADS = 3  # so that rows of heads of 50 are no multiple of 16


class PretendedGpu:
    """What Triton asks of a device before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def launched(width: int, dtype: torch.dtype, lengths: list[int], **flags: bool) -> dict[str, dict[str, Any]]:
    """What is known of each kernel when attention of packed rows, forward and backward, launches it."""
    seen: dict[str, dict[str, Any]] = {}

    def stop(**asked: Any) -> bool:
        seen[asked["fn"].name.split(".")[-1]] = asked["compile"]
        return True

    knobs.runtime.jit_cache_hook = stop
    cu_seqlens, num_tokens = torch.tensor([0, *lengths]).cumsum(0), sum(lengths)
    packed = torch.zeros(num_tokens, HEADS, 4 * width, dtype=dtype, requires_grad=True)
    _, v, q, k = packed.split(width, dim=2)
    plan, biases, buckets, visibility = plan_tiles(cu_seqlens), (None, None), None, None
    if flags.get("biases"):
        biases = torch.zeros(max(lengths) + 5, requires_grad=True), torch.zeros(25, requires_grad=True)
        time = torch.arange(num_tokens)
        buckets = bucket_times(plan, time, time, num_buckets=24)
    if flags.get("visibility"):
        visibility = semi_local(cu_seqlens, num_first=3, num_last=10, num_tokens=num_tokens)
    out = gpu.attend(
        (q, k, v), biases, (plan, buckets, visibility), scale=0.3, divisor=17.0, deterministic=not flags.get("atomic")
    )
    out.backward(torch.zeros(num_tokens, HEADS, width, dtype=dtype))
    return seen


def differences(variant: Variant, launch: dict[str, Any]) -> list[str]:
    """The arguments of which a variant records another type, value or alignment than the launch has."""
    names = variant.kernel.arg_names
    constants = {(key[0] if isinstance(key, tuple) else key): value for key, value in launch["constants"].items()}
    aligned = {key[0] if isinstance(key, tuple) else key for key, known in launch["configs"][0].items() if known}
    said = []
    for number, name in enumerate(names):
        kind = launch["signature"][name]
        found = constants.get(name, constants.get(number)) if kind == "constexpr" else (kind, number in aligned)
        recorded = (variant.types[name], name in variant.aligned) if name in variant.types else variant.constants[name]
        if found != recorded:
            said.append(f"{variant.name}: {name} is {found}, recorded {recorded}")
    for name in ("num_warps", "num_stages"):
        if launch[name] != getattr(variant, name):
            said.append(f"{variant.name}: {name} is {launch[name]}, recorded {getattr(variant, name)}")
    return said


def main() -> int:
    """The exit code: 1 if anything differs."""
    driver.set_active(PretendedGpu())
    recorded = {variant.name: variant for variant in variants()}
    long, dtypes = [200, 64], {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    said, compared = [], set()
    for width, dtype, lengths, flags in (
        (128, "bf16", long, ["biases"]),
        (128, "bf16", long, ["biases", "visibility"]),
        (128, "bf16", long, []),
        (128, "bf16", long, ["biases", "atomic"]),
        (256, "bf16", long, ["biases"]),
        (64, "bf16", [60, 10], ["biases", "short"]),
        (64, "fp32", long, ["biases"]),
        (50, "fp16", long, ["biases"]),
    ):
        launches = launched(width, dtypes[dtype], lengths, **dict.fromkeys(flags, True))
        for kernel, launch in launches.items():
            words = [f for f in flags if f != "atomic" or kernel == "keys_kernel"]
            name = " ".join([f"hstu_attention.{kernel.removesuffix('_kernel')} d{width} {dtype}", *words])
            compared.add(name)
            said += differences(recorded[name], launch)
    print("\n".join(said) or f"{len(compared)} launches are what their variants record", file=sys.stderr)
    return 1 if said or len(compared) < 28 else 0


if __name__ == "__main__":
    raise SystemExit(main())
