"""An index from 64-bit keys to row numbers, for tables that grow."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megarec_kernels.hash_index import reference

EMPTY = 2**31 - 1  # a slot that holds no row: above every row number
SLOTS_PER_ROW = 2  # at least; a full table is half full of slots, where a search ends after 2.5 of them on average


@dataclass(kw_only=True)
class HashIndex:
    """Which row belongs to which key. Any int64 is a key; rows are numbered through in the order of insertion.

    The slots are what linear probing leaves when rows are inserted one after the other, whatever really happened first.

    Attributes:
        slots: row numbers, `EMPTY` where there is none, `[num_slots]` int32, a power of two.
        key_of_row: `[capacity]` int64.
        num_rows: the rows in use: 0 to `num_rows - 1`.
    """

    slots: Tensor
    key_of_row: Tensor
    num_rows: int = 0


def make_index(capacity: int, *, device: torch.device) -> HashIndex:
    """An index without rows that takes up to `capacity` of them.

    Raises:
        ValueError: `capacity` is not from 1 to 2^30.
    """
    if not 1 <= capacity <= 2**30:
        raise ValueError(f"capacity must be from 1 to 2^30, got {capacity}")
    num_slots = 1 << (SLOTS_PER_ROW * capacity - 1).bit_length()
    return HashIndex(
        slots=torch.full((num_slots,), EMPTY, dtype=torch.int32, device=device),
        key_of_row=torch.zeros(capacity, dtype=torch.int64, device=device),
    )


def find_rows(index: HashIndex, keys: Tensor) -> Tensor:
    """The row of each key, int64 in the shape of `keys` (int64), -1 where a key has none."""
    if keys.is_cuda:
        from megarec_kernels.hash_index.gpu import run_find_rows

        return run_find_rows(index, keys)
    return reference.find_rows_reference(index, keys)


def insert_keys(index: HashIndex, keys: Tensor) -> Tensor:
    """Gives every key that has no row the next one, in the order of keys, and finds the rows of all.

    Rows and slots are a function of the sets of keys that were inserted, call by call: neither the order of `keys` nor
    duplicates nor the timing of threads matter. The host waits for the number of new keys.

    Args:
        index: changed in place.
        keys: int64 of any shape.

    Returns:
        the rows, int64 in the shape of `keys`.

    Raises:
        ValueError: there are more new keys than free rows; nothing has been changed.
    """
    found = find_rows(index, keys)
    new = torch.unique(keys[found < 0])
    if not new.numel():
        return found
    first, last = index.num_rows, index.num_rows + new.numel()
    capacity = len(index.key_of_row)
    if last > capacity:
        raise ValueError(
            f"{new.numel()} new keys, but {capacity - first} of {capacity} rows are free: make an index with more"
        )
    index.key_of_row[first:last] = new
    index.num_rows = last
    if keys.is_cuda:
        from megarec_kernels.hash_index.gpu import run_place_rows

        run_place_rows(index, first)
    else:
        reference.place_rows_reference(index, first)
    return torch.where(found < 0, first + torch.searchsorted(new, keys), found)
