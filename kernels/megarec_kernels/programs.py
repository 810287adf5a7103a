"""The hash of `megarec_kernels.hashing` inside a kernel."""

import triton
import triton.language as tl

from megarec_kernels import hashing

GOLDEN = tl.constexpr(hashing.GOLDEN)
MIX_1 = tl.constexpr(hashing.MIX_1)
MIX_2 = tl.constexpr(hashing.MIX_2)


@triton.jit
def hash_bits(key, counters):
    """The bits of `hash_torch(key, counters)` as uint64."""
    x = counters.to(tl.uint64) * GOLDEN + key.to(tl.uint64)
    for _ in tl.static_range(2):
        x = (x ^ (x >> 30)) * MIX_1
        x = (x ^ (x >> 27)) * MIX_2
        x = x ^ (x >> 31)
    return x
