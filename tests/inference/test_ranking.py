"""Ranks and top items against a plain sort in Python, with many equal scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.base.errors import UserError
from megarec.inference import ranking


def sorted_ids(row: list[float]) -> list[int]:
    return sorted((i for i in range(len(row)) if row[i] != -math.inf), key=lambda i: (-row[i], i))


def tied_scores(users: int, items: int, levels: int) -> torch.Tensor:
    return torch.randint(0, levels, (users, items), generator=torch.Generator().manual_seed(7)).float()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(2, 40), st.sampled_from([1, 2, 6, 1000]), st.integers(1, 50))
def test_top_items_and_ranks_equal_a_python_sort(users: int, items: int, levels: int, k: int) -> None:
    scores = tied_scores(users, items, levels)
    ranking.hide_items(scores, torch.tensor([0]), torch.tensor([items - 1]))
    ids, best = ranking.top_items(scores, k)
    ranks = torch.stack([ranking.rank_targets(scores, torch.full((users,), item)) for item in range(items)], dim=1)
    for row in range(users):
        truth = sorted_ids(scores[row].tolist())
        width = min(k, items)
        assert ids[row].tolist() == (truth + [0] * width)[:width]
        assert best[row].tolist() == [scores[row, i].item() if i else -math.inf for i in ids[row].tolist()]
        for i in range(items):
            assert ranks[row, i].item() == (truth.index(i) + 1 if i in truth else ranking.UNRANKED)


def test_a_plain_topk_breaks_the_tie_rule() -> None:
    """The planted fault: the order torch.topk gives to equal scores is not ours."""
    scores = tied_scores(8, 500, 3)
    ranking.hide_items(scores, torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64))
    ids, _ = ranking.top_items(scores, 20)
    assert [sorted_ids(row)[:20] for row in scores.tolist()] == ids.tolist()
    assert scores.topk(20).indices.tolist() != ids.tolist()


def test_scores_that_are_no_numbers_are_refused() -> None:
    scores = torch.tensor([[0.0, math.nan, 1.0]])
    with pytest.raises(UserError, match="not finite"):
        ranking.hide_items(scores, torch.tensor([0]), torch.tensor([1]))
