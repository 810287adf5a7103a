"""Shares of a pack's tokens for a ring: as many tokens, and as many pairs of a query and a key."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from megarec_kernels.visibility import candidate_suffix
from torch import Tensor

from megarec.parallel.context.balance import deal_chunks, imbalance, share_tokens
from megarec.parallel.context.ring import _count_pairs


def zipf_pack(generator: np.random.Generator, *, num_tokens: int, longest: int) -> Tensor:
    """Histories of Zipf(1.2) length end to end, as many as fit."""
    bounds = [0]
    while True:
        length = min(int(generator.zipf(1.2)), longest)
        if bounds[-1] + length > num_tokens:
            return torch.tensor(bounds)
        bounds.append(bounds[-1] + length)


def test_zipf_packs_are_level_on_four_ranks() -> None:
    generator, num_tokens = np.random.default_rng(0), 8192
    found = {"neighbours": [], "first and last": [], "shares": []}
    for _ in range(50):
        pairs = _count_pairs(zipf_pack(generator, num_tokens=num_tokens, longest=4096), num_tokens, None)
        eighths = torch.arange(num_tokens).view(8, -1)
        zigzag = torch.stack([torch.cat([eighths[rank], eighths[7 - rank]]) for rank in range(4)])
        found["neighbours"].append(imbalance(pairs, torch.arange(num_tokens).view(4, -1)))
        found["first and last"].append(imbalance(pairs, zigzag))
        found["shares"].append(imbalance(pairs, share_tokens(pairs, 4)))
    print({name: f"mean {np.mean(ratios):.3f}, worst {max(ratios):.3f}" for name, ratios in found.items()})
    assert max(found["shares"]) <= 1.05
    assert max(found["first and last"]) > 1.05  # the packs are uneven enough for this to mean something


def longest_way(cu_seqlens: Tensor, shares: Tensor) -> float:
    """When the last rank of a ring is done, over the mean of their work; a pair takes one unit, sending nothing.

    Rank r begins a step when it has ended the one before, rank r - 1 has begun to send it the keys (and with that its
    own step before) and rank r + 1 has begun to take those it sent.
    """
    ranks, owner = len(shares), torch.empty(shares.numel(), dtype=torch.int64)
    owner[shares.flatten()] = torch.arange(len(shares)).repeat_interleave(shares.shape[1])
    pairs = torch.zeros(ranks, ranks, dtype=torch.float64)  # of the queries of one and the keys of another
    for first, last in pairwise(cu_seqlens.tolist()):
        own = torch.nn.functional.one_hot(owner[first:last], ranks).double()
        pairs += own.T @ own.cumsum(0)
    begun, ended = torch.zeros(ranks), torch.zeros(ranks)
    for step in range(ranks):
        if step:
            begun = torch.stack([ended, begun.roll(1), begun.roll(-1)]).amax(0)
        ended = begun + pairs[torch.arange(ranks), (torch.arange(ranks) - step) % ranks]
    return float(ended.max() / pairs.sum() * ranks)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ranks_of_a_ring_hardly_wait_for_each_other(num_ranks: int) -> None:
    generator, num_tokens = np.random.default_rng(0), 8192
    found: dict[str, list[float]] = {"shares": [], "large chunks": []}
    for _ in range(50):
        pack = zipf_pack(generator, num_tokens=num_tokens, longest=4096)
        pairs = _count_pairs(pack, num_tokens, None)
        found["shares"].append(longest_way(pack, share_tokens(pairs, num_ranks)))
        found["large chunks"].append(longest_way(pack, deal_chunks(pairs.view(-1, 512).sum(1), 512, num_ranks)))
    print({name: f"mean {np.mean(ratios):.3f}, worst {max(ratios):.3f}" for name, ratios in found.items()})
    assert max(found["shares"]) <= 1.05
    assert num_ranks == 2 or max(found["large chunks"]) > 1.05  # though their sums over the steps may be level


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_token_has_one_owner(num_ranks: int) -> None:
    pairs = _count_pairs(torch.tensor([0, 5, 5, 90]), 96, None)
    shares = share_tokens(pairs, num_ranks)
    assert shares.shape == (num_ranks, 96 // num_ranks)
    assert shares.flatten().sort().values.tolist() == list(range(96))
    assert (shares.diff(dim=1) > 0).all()


def test_nobody_at_all() -> None:
    assert share_tokens(torch.zeros(8, dtype=torch.int64), 2).flatten().sort().values.tolist() == list(range(8))


def test_pairs_are_those_that_are_seen() -> None:
    cu_seqlens = torch.tensor([0, 6, 7, 12])
    visibility = candidate_suffix(cu_seqlens, torch.tensor([2, 0, 1]), group=2, num_tokens=14)
    counts = []
    for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        for i in range(last - first):
            token = first + i
            before, group = int(visibility.seen_before[token]), int(visibility.group_first[token])
            counts.append(sum(j < before or group <= j for j in range(i + 1)))
    assert _count_pairs(cu_seqlens, 14, visibility).tolist() == [*counts, 0, 0]
    assert _count_pairs(cu_seqlens, 14, None).tolist() == [1, 2, 3, 4, 5, 6, 1, 1, 2, 3, 4, 5, 0, 0]
