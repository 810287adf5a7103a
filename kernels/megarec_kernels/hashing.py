"""Counter-based random bits on torch tensors: a value is a function of (key, counter), never of a generator's state.

The mixer is the 64-bit finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), applied twice so that neighbouring counters share no structure. It has the bits of
`megarec.base.random`.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def hash_torch(key: int, counters: Tensor) -> Tensor:
    """64 random bits per counter, as the `int64` with the same bits as `hash_numpy`."""
    x = counters.to(torch.int64) * signed(GOLDEN) + signed(key)
    for _ in range(2):
        x = (x ^ shift_right(x, 30)) * signed(MIX_1)
        x = (x ^ shift_right(x, 27)) * signed(MIX_2)
        x = x ^ shift_right(x, 31)
    return x


def keep_mask_torch(
    key: int, token: Tensor, num_channels: int, drop_probability: float, *, first_channels: int | None = None
) -> Tensor:
    """The dropout mask `[T, num_channels]` (bool) of tokens with global numbers `token` `[T]`.

    One hash serves four channels with 16 bits each, so the drop probability is a multiple of 2^-16. With
    `first_channels` only so many columns of the same mask are made.
    """
    num_made = num_channels if first_channels is None else first_channels
    words = torch.arange((num_made + 3) // 4, device=token.device)
    bits = hash_torch(key, token.to(torch.int64).unsqueeze(1) * ((num_channels + 3) // 4) + words)
    lanes = bits.unsqueeze(2).expand(-1, -1, 4) >> torch.tensor([0, 16, 32, 48], device=token.device)
    draws = (lanes & 0xFFFF).reshape(token.shape[0], len(words) * 4)[:, :num_made]
    return draws >= round(drop_probability * 65536)


def signed(x: int) -> int:
    """The `int64` with the bits of the unsigned `x`."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of `int64`: torch's own carries the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
