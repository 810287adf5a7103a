"""How large the blocks of the Triton kernels are: fixed by head width and biases, found by compiling, never by timing."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Queries and keys of a square of pairs, warps of a program, and loads in flight."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def choose_blocks(
    kernel: Literal["forward", "queries", "keys"], width: int, *, biases: bool, grads: bool, wide: bool, short: bool
) -> Blocks:
    """The blocks of a kernel.

    Args:
        kernel: the forward kernel, or the backward one over blocks of queries or of keys.
        width: of a head, the wider of queries and values, rounded up to a power of two.
        biases: whether scores have a bias.
        grads: whether the kernel sums the gradients of biases; its blocks are then squares.
        wide: whether numbers are fp32.
        short: whether no history has more than 64 tokens.
    """
    if wide:
        return Blocks(rows=32, keys=32, num_warps=4, num_stages=1 if width > 64 else 2)
    if kernel == "forward":
        if short:
            return Blocks(rows=64, keys=64 if width <= 128 else 32, num_warps=4, num_stages=2)
        if width > 128:
            return Blocks(rows=128, keys=32 if biases else 64, num_warps=8, num_stages=2)
        return Blocks(rows=128, keys=64, num_warps=8, num_stages=2 if biases else 3)
    if grads:
        side = 64 if width <= 64 else 64
        return Blocks(rows=side, keys=side, num_warps=4 if width <= 64 else 8, num_stages=2)
    if kernel == "queries":
        return Blocks(rows=64 if short else 128, keys=64 if width <= 128 else 32, num_warps=4 if short else 8, num_stages=2)
    return Blocks(rows=64 if width <= 128 else 32, keys=64 if short else 128, num_warps=4 if short else 8, num_stages=2)
