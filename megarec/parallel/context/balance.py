"""Which tokens of a pack each context-parallel rank asks for: as many on every rank, and as much work."""

import torch
from torch import Tensor

LARGEST_CHUNK = 64  # larger ones may level the sum over all steps of a ring, and neighbours still wait in each
CLOSE_ENOUGH = 1.02  # work of the busiest rank over the mean


def share_tokens(pairs: Tensor, num_ranks: int) -> Tensor:
    """Deals the tokens of a pack out in chunks of neighbours, as large as a level share of the work allows.

    Chunks go to ranks in the order of falling work, each to the rank with the least so far that has room.

    Args:
        pairs: `[T]` int64, how many keys each token sees; 0 for dead ones.
        num_ranks: divides T.

    Returns:
        `[num_ranks, T / num_ranks]` int64, the numbers of every rank's tokens, ascending.
    """
    local_tokens, rest = divmod(len(pairs), num_ranks)
    if rest:
        raise AssertionError(f"{len(pairs)} tokens do not divide over {num_ranks} ranks")
    sizes = [size for size in range(1, min(LARGEST_CHUNK, local_tokens) + 1) if local_tokens % size == 0]
    shares = torch.empty(0)
    for size in reversed(sizes):
        shares = deal_chunks(pairs.view(-1, size).sum(1), size, num_ranks)
        if imbalance(pairs, shares) <= CLOSE_ENOUGH:
            break
    return shares


def imbalance(pairs: Tensor, shares: Tensor) -> float:
    """Pairs of the busiest rank over the mean of all."""
    work = pairs[shares].sum(1).double()
    return float(work.max() / work.mean()) if work.any() else 1.0


def deal_chunks(work: Tensor, size: int, num_ranks: int) -> Tensor:
    """The shares of chunks of `size` tokens that take `work` `[T / size]`, see `share_tokens`."""
    room = len(work) // num_ranks
    chunks: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    amounts = work.tolist()
    for chunk in torch.argsort(work, descending=True, stable=True).tolist():
        rank = min((rank for rank in range(num_ranks) if len(chunks[rank]) < room), key=lambda rank: load[rank])
        chunks[rank].append(chunk)
        load[rank] += amounts[chunk]
    first = torch.tensor([sorted(own) for own in chunks]) * size
    return (first[:, :, None] + torch.arange(size)).flatten(1)
