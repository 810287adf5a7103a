"""Distinct ids in plain torch: the path of the CPU and the twin of the kernels."""

import torch
from torch import Tensor

FLAGS_PER_ID = 4  # up to this many flags per id at hand, marking all of them is cheaper than sorting the ids


def find_unique_reference(ids: Tensor, *, num_ids: int) -> tuple[Tensor, Tensor]:
    """As `find_unique`."""
    if num_ids <= FLAGS_PER_ID * ids.numel():
        # One flag more than there are ids: -1 marks the last, which is cut off.
        used = torch.zeros(num_ids + 1, dtype=torch.bool, device=ids.device)
        used[ids.reshape(-1)] = True
        used = used[:-1]
        unique = used.nonzero().squeeze(1)
        position = torch.full((num_ids + 1,), -1, dtype=torch.int64, device=ids.device)
        position[unique] = torch.arange(unique.numel(), device=ids.device)
        return unique, position[ids]
    return sort_unique(ids, num_ids)


def sort_unique(ids: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
    """As `find_unique`, by a sort; of 32-bit keys where they fit, which halves its work."""
    keys = ids.to(torch.int32) if num_ids <= 2**31 else ids
    unique, index = torch.unique(keys, return_inverse=True)
    if unique.numel() and unique[0] < 0:
        unique, index = unique[1:], index - 1
    return unique.to(torch.int64), index
