"""The launches of the bitmap."""

import torch
import triton
from torch import Tensor

from megarec_kernels.devices import on_its_device
from megarec_kernels.unique_ids.programs import count_words, mark_ids, rank_ids
from megarec_kernels.unique_ids.reference import sort_unique

BITS_PER_ID = 256  # up to this many bits per id at hand, a pass over all words moves fewer bytes than a sort
BLOCK = 1024


@on_its_device
def run_find_unique(ids: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
    """As `find_unique`, by the bitmap or by a sort."""
    if num_ids <= BITS_PER_ID * ids.numel():
        return run_bitmap(ids, num_ids)
    return sort_unique(ids, num_ids)


def run_bitmap(ids: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
    """As `find_unique`, by the bitmap."""
    ids = ids.contiguous()
    num, num_words = ids.numel(), triton.cdiv(num_ids, 32)
    bitmap = torch.zeros(num_words, dtype=torch.int32, device=ids.device)
    mark_ids[(triton.cdiv(num, BLOCK),)](ids, bitmap, num, BLOCK=BLOCK)
    counts = torch.empty_like(bitmap)
    count_words[(triton.cdiv(num_words, BLOCK),)](bitmap, counts, num_words, BLOCK=BLOCK)
    ends = counts.cumsum(0, dtype=torch.int32)
    unique, index = ids.new_empty(int(ends[-1])), torch.empty_like(ids)
    rank_ids[(triton.cdiv(num, BLOCK),)](ids, bitmap, ends, unique, index, num, BLOCK=BLOCK)
    return unique, index
