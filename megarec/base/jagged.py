"""Histories of unequal length laid end to end: values `[T]` and the boundaries `cu_seqlens` `[B + 1]`."""

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


def lengths_to_offsets(lengths: npt.NDArray[np.integer]) -> Int64:
    """Boundaries `[B + 1]` of segments with the given `lengths` `[B]`; starts with 0."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def segment_positions(lengths: npt.NDArray[np.integer]) -> Int64:
    """0, 1, 2, ... restarted at every segment, for all segments end to end: `[sum(lengths)]`."""
    offsets = lengths_to_offsets(lengths)
    return np.arange(offsets[-1], dtype=np.int64) - np.repeat(offsets[:-1], lengths)


def gather_indices(starts: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer]) -> Int64:
    """Indices that copy the slices `[start, start + length)` end to end: `[sum(lengths)]`."""
    return segment_positions(lengths) + np.repeat(starts.astype(np.int64), lengths)


def stable_order(values: npt.NDArray[np.integer], bound: int) -> Int64:
    """The stable order of `values`, each from 0 to `bound - 1`: 16 bits at a time, so in linear time."""
    order: Int64 | None = None
    for shift in range(0, max(1, (bound - 1).bit_length()), 16):
        digit = ((values if order is None else values[order]) >> shift).astype(np.uint16)  # the cast cuts off the rest
        pass_order = np.argsort(digit, kind="stable")  # a radix sort for 16 bits
        order = pass_order if order is None else order[pass_order]
    assert order is not None
    return order
