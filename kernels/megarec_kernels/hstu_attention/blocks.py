"""How large the blocks of the Triton kernels are: fixed by head width, biases and length, never found by timing."""

from dataclasses import dataclass
from typing import Literal

Kernel = Literal["forward", "queries", "keys", "biases"]
MAX_ROWS = 128  # of a block of queries
SHORT = 64  # tokens of the longest history up to which a pack is short: one block holds any of its histories


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Queries and keys of a block of pairs, warps of a program, and loads in flight."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def choose_blocks(kernel: Kernel, width: int, *, biases: bool, wide: bool, short: bool, atomic: bool = False) -> Blocks:
    """The blocks of a kernel.

    They are the largest whose sums stay in registers: what the compiler spills is measured and bounded without a GPU
    (`kernels/bench/compile.py`).

    Args:
        kernel: the forward kernel, or the backward one over queries, over keys, or of the biases.
        width: of a head, the wider of queries and values, rounded up to a power of two.
        biases: whether scores have a bias.
        wide: whether numbers are fp32.
        atomic: whether the kernel over keys adds to the gradients of queries too.
        short: whether no history has more than `SHORT` tokens.
    """
    if wide:
        side = 32 if width <= 64 else 16
        return Blocks(rows=side, keys=side, num_warps=4, num_stages=1)
    if kernel == "biases":
        return Blocks(rows=64, keys=64, num_warps=4 if width <= 64 else 8, num_stages=2)
    if kernel == "keys":
        rows = 32 if width > 128 or (width > 64 and (biases or atomic)) else 64
        keys = 64 if width > 128 or short else 128
        return Blocks(rows=rows, keys=keys, num_warps=8, num_stages=3 if rows == 64 else 2)
    keys = 64 if width <= 128 else 32
    if short:
        return Blocks(rows=64, keys=keys, num_warps=4, num_stages=2)
    return Blocks(
        rows=MAX_ROWS, keys=keys, num_warps=8, num_stages=2 if biases or width > 128 or kernel == "queries" else 3
    )
