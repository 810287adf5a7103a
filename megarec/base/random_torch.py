"""The counter-based random numbers of `megarec.base.random` on torch tensors, with the same bits."""

import math

import torch
from torch import Tensor

from megarec.base.random import GOLDEN, MIX_1, MIX_2


def hash_torch(key: int, counters: Tensor) -> Tensor:
    """64 random bits per counter, as the `int64` with the same bits as `hash_numpy`."""
    x = counters.to(torch.int64) * _signed(GOLDEN) + _signed(key)
    for _ in range(2):
        x = (x ^ _shift_right(x, 30)) * _signed(MIX_1)
        x = (x ^ _shift_right(x, 27)) * _signed(MIX_2)
        x = x ^ _shift_right(x, 31)
    return x


def uniform_torch(key: int, counters: Tensor) -> Tensor:
    """Uniform in [0, 1) with 53 bits per counter, `float64`, as `uniform_numpy`."""
    return _shift_right(hash_torch(key, counters), 11).to(torch.float64) * 2.0**-53


def normal_torch(key: int, counters: Tensor) -> Tensor:
    """Standard normal `float64` per counter (Box-Muller; two hashes per value)."""
    radius_bits = _shift_right(hash_torch(key, counters * 2), 11)
    angle_bits = _shift_right(hash_torch(key, counters * 2 + 1), 11)
    radius = torch.sqrt(-2.0 * torch.log((radius_bits.to(torch.float64) + 1.0) * 2.0**-53))
    return radius * torch.cos(angle_bits.to(torch.float64) * (2.0 * math.pi * 2.0**-53))


def keep_mask_torch(key: int, token: Tensor, num_channels: int, drop_probability: float) -> Tensor:
    """The dropout mask `[T, num_channels]` (bool) of tokens with global numbers `token` `[T]`.

    One hash serves four channels with 16 bits each, so the drop probability is a multiple of 2^-16.
    """
    num_words = (num_channels + 3) // 4
    words = torch.arange(num_words, device=token.device)
    bits = hash_torch(key, token.to(torch.int64).unsqueeze(1) * num_words + words)
    lanes = bits.unsqueeze(2).expand(-1, -1, 4) >> torch.tensor([0, 16, 32, 48], device=token.device)
    draws = (lanes & 0xFFFF).reshape(token.shape[0], num_words * 4)[:, :num_channels]
    return draws >= round(drop_probability * 65536)


def _signed(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of `int64`: torch's own carries the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
