"""Counter-based random numbers: a value is a function of (seed, purpose, index), never of call order or rank.

The mixer is the 64-bit finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), applied twice so that neighbouring counters share no structure. The numpy and the
torch versions give the same bits, so a table row, a shuffle or a dropout mask is the same wherever it is made.
"""

import hashlib

import numpy as np
import numpy.typing as npt

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def derive_key(seed: int, *labels: str | int) -> int:
    """A 64-bit key for one purpose: `derive_key(seed, "dropout", step, lane, pack)`.

    Text and integers are both allowed; different label lists give independent keys.
    """
    key = _mix_int(seed & _MASK)
    for label in labels:
        if isinstance(label, str):
            number = int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "little")
        else:
            number = label & _MASK
        key = _mix_int((key ^ number) + GOLDEN & _MASK)
    return key


def hash_numpy(key: int, counters: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """64 random bits per counter, as `uint64`, in the shape of `counters`."""
    with np.errstate(over="ignore"):
        x = counters.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(key)
        for _ in range(2):
            x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
            x ^= x >> np.uint64(31)
    return x


def uniform_numpy(key: int, counters: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Uniform in [0, 1) with 53 bits per counter."""
    return (hash_numpy(key, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers_numpy(key: int, counters: npt.NDArray[np.integer], bound: int) -> npt.NDArray[np.int64]:
    """Integers uniform in [0, bound) per counter; bias below `bound` / 2^53."""
    return np.minimum((uniform_numpy(key, counters) * bound).astype(np.int64), bound - 1)


def permutation(key: int, size: int) -> npt.NDArray[np.int64]:
    """A permutation of `range(size)`: the order of the hashes, ties by index."""
    return np.argsort(hash_numpy(key, np.arange(size, dtype=np.uint64)), kind="stable").astype(np.int64)


def _mix_int(x: int) -> int:
    for _ in range(2):
        x = (x ^ (x >> 30)) * MIX_1 & _MASK
        x = (x ^ (x >> 27)) * MIX_2 & _MASK
        x ^= x >> 31
    return x
