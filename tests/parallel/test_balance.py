"""Shares of a pack's tokens for a ring: as many tokens, and as many pairs of a query and a key."""

import numpy as np
import pytest
import torch
from megarec_kernels.visibility import candidate_suffix
from torch import Tensor

from megarec.parallel.context.balance import imbalance, share_tokens
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
