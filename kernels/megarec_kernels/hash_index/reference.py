"""The same in plain torch, all keys a slot further at a time: the path of the CPU and the twin of the kernels."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megarec_kernels.hashing import hash_torch

if TYPE_CHECKING:
    from megarec_kernels.hash_index import HashIndex


def find_rows_reference(index: "HashIndex", keys: Tensor) -> Tensor:
    """As `find_rows`."""
    flat = keys.reshape(-1)
    found = torch.full_like(flat, -1)
    sought, slot = torch.arange(len(flat), device=flat.device), _home(index, flat)
    while len(sought):
        row = index.slots[slot].to(torch.int64)
        used = row < len(index.key_of_row)
        sought, slot, row = sought[used], slot[used], row[used]
        hit = index.key_of_row[row] == flat[sought]
        found[sought[hit]] = row[hit]
        sought, slot = sought[~hit], _next(index, slot[~hit])
    return found.view(keys.shape)


def place_rows_reference(index: "HashIndex", first: int) -> None:
    """Puts the rows from `first` on into slots: the lower row keeps a slot, the higher one goes on."""
    row = torch.arange(first, index.num_rows, dtype=torch.int32, device=index.slots.device)
    slot = _home(index, index.key_of_row[first : index.num_rows])
    while len(row):
        before = index.slots[slot]
        index.slots.scatter_reduce_(0, slot, row, "amin")
        goes_on = torch.where(index.slots[slot] == row, before, row)  # whoever took the slot goes on as its occupant
        left = goes_on < len(index.key_of_row)
        row, slot = goes_on[left], _next(index, slot[left])


def _home(index: "HashIndex", keys: Tensor) -> Tensor:
    return hash_torch(0, keys) & (len(index.slots) - 1)


def _next(index: "HashIndex", slot: Tensor) -> Tensor:
    return (slot + 1) & (len(index.slots) - 1)
