"""The launches of the index."""

import torch
import triton
from torch import Tensor

from megarec_kernels.hash_index import EMPTY, HashIndex, programs

BLOCK = 128  # a key for each thread of 4 warps: a program ends with its longest walk


def run_find_rows(index: HashIndex, keys: Tensor) -> Tensor:
    """As `find_rows`."""
    keys = keys.contiguous()
    found = torch.empty_like(keys)
    num, last_slot = keys.numel(), len(index.slots) - 1
    if num:
        with torch.cuda.device_of(keys):
            programs.probe_slots[(triton.cdiv(num, BLOCK),)](
                index.slots, index.key_of_row, keys, found, num, last_slot, EMPTY=EMPTY, BLOCK=BLOCK
            )
    return found


def run_place_rows(index: HashIndex, first: int) -> None:
    """Puts the rows from `first` to `index.num_rows - 1`, at least one, into slots."""
    num, last_slot = index.num_rows - first, len(index.slots) - 1
    with torch.cuda.device_of(index.slots):
        programs.place_rows[(triton.cdiv(num, BLOCK),)](
            index.slots, index.key_of_row, first, num, last_slot, EMPTY=EMPTY, BLOCK=BLOCK
        )
