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
