"""The counter-based random numbers of `megarec.base.random` on torch tensors, with the same bits."""

import math

import torch
from megarec_kernels.hashing import hash_torch, shift_right
from torch import Tensor


def uniform_torch(key: int, counters: Tensor) -> Tensor:
    """Uniform in [0, 1) with 53 bits per counter, `float64`, as `uniform_numpy`."""
    return shift_right(hash_torch(key, counters), 11).to(torch.float64) * 2.0**-53


def normal_torch(key: int, counters: Tensor) -> Tensor:
    """Standard normal `float64` per counter (Box-Muller; two hashes per value)."""
    radius_bits = shift_right(hash_torch(key, counters * 2), 11)
    angle_bits = shift_right(hash_torch(key, counters * 2 + 1), 11)
    radius = torch.sqrt(-2.0 * torch.log((radius_bits.to(torch.float64) + 1.0) * 2.0**-53))
    return radius * torch.cos(angle_bits.to(torch.float64) * (2.0 * math.pi * 2.0**-53))
