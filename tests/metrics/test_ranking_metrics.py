"""Ranking metrics against hand examples and a slow twin with sets."""

import math

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from megarec.metrics.ranking import measure_lists, measure_ranks


def test_ranks_by_hand() -> None:
    metrics = measure_ranks(np.array([1, 3, 0, 11, np.inf]), cutoffs=[1, 10])
    assert metrics["hr@1"].value == pytest.approx(1 / 5)
    assert metrics["hr@10"].value == pytest.approx(2 / 5)
    assert metrics["ndcg@10"].value == pytest.approx((1 + 1 / math.log2(4)) / 5)
    assert metrics["mrr"].value == pytest.approx((1 + 1 / 3 + 1 / 11) / 5)
    assert metrics["hr@10"].count == 5


def test_the_standard_error_is_that_of_a_mean() -> None:
    found = measure_ranks(np.array([1] * 3 + [0] * 7), cutoffs=[10])["hr@10"]
    assert found.standard_error == pytest.approx(np.std([1] * 3 + [0] * 7, ddof=1) / math.sqrt(10))
    assert math.isnan(measure_ranks(np.array([4]), cutoffs=[10])["hr@10"].standard_error)
    nothing = measure_ranks(np.array([]), cutoffs=[10])["hr@10"]
    assert math.isnan(nothing.value) and nothing.count == 0


def test_ndcg_of_ranks_equals_sklearn() -> None:
    generator = np.random.default_rng(0)
    scores = generator.permuted(np.tile(np.arange(50.0), (20, 1)), axis=1)
    target = generator.integers(0, 50, 20)
    rank = (scores > scores[np.arange(20), target][:, None]).sum(axis=1) + 1
    relevance = np.eye(50)[target]
    found = measure_ranks(rank, cutoffs=[10])["ndcg@10"].value
    assert found == pytest.approx(ndcg_score(relevance, scores, k=10), abs=1e-12)


def test_lists_by_hand() -> None:
    top_items = np.array([[5, 6, 7], [1, 2, -1], [8, 9, 5]])
    target_items = np.array([6, 9, 6, 2])  # user 0 wants {6, 9}; user 1 wants {2}; user 2 has no target
    found = measure_lists(top_items, np.array([0, 3, 4, 4]), target_items, cutoffs=[1, 3], num_items=10)
    second = 1 / math.log2(3)
    assert found.num_users_without_target == 1
    assert found.estimates["recall@1"].value == 0.0
    assert found.estimates["recall@3"].value == pytest.approx((1 / 2 + 1) / 2)
    assert found.estimates["hr@3"].value == 1.0
    assert found.estimates["ndcg@3"].value == pytest.approx((second / (1 + second) + second) / 2)
    assert found.estimates["ndcg@3"].count == 2
    assert found.coverage == {"coverage@1": 0.2, "coverage@3": 0.5}


def test_dividing_by_the_dcg_of_the_hits_would_be_caught() -> None:
    """The known fault of the public code: it gives 1 to every user with a hit."""
    found = measure_lists(np.array([[3, 4]]), np.array([0, 1]), np.array([4]), cutoffs=[2], num_items=5)
    assert found.estimates["ndcg@2"].value == pytest.approx(1 / math.log2(3))


@pytest.mark.parametrize("seed", range(5))
def test_lists_equal_a_twin_with_sets(seed: int) -> None:
    generator = np.random.default_rng(seed)
    num_users, longest, num_items = 40, 12, 30
    top_items = np.stack([generator.permutation(num_items)[:longest] for _ in range(num_users)])
    for user, length in enumerate(generator.integers(0, longest + 1, num_users)):
        top_items[user, length:] = -1
    num_targets = generator.integers(0, 20, num_users)
    offsets = np.concatenate([[0], np.cumsum(num_targets)])
    targets = generator.integers(0, num_items, offsets[-1])
    found = measure_lists(top_items, offsets, targets, cutoffs=[1, 5, 12], num_items=num_items)
    for k in (1, 5, 12):
        recall, ndcg, shown = [], [], set()
        for user in range(num_users):
            wanted = set(targets[offsets[user] : offsets[user + 1]].tolist())
            if not wanted:
                continue
            best = [item for item in top_items[user, :k].tolist() if item >= 0]
            shown |= set(best)
            recall.append(len(wanted & set(best)) / min(len(wanted), k))
            gain = sum(1 / math.log2(r + 2) for r, item in enumerate(best) if item in wanted)
            ndcg.append(gain / sum(1 / math.log2(r + 2) for r in range(min(len(wanted), k))))
        assert found.estimates[f"recall@{k}"].value == pytest.approx(np.mean(recall), abs=1e-12)
        assert found.estimates[f"ndcg@{k}"].value == pytest.approx(np.mean(ndcg), abs=1e-12)
        assert found.coverage[f"coverage@{k}"] == len(shown) / num_items
    assert found.num_users_without_target == int((num_targets == 0).sum())


def test_no_users() -> None:
    empty = np.empty(0, dtype=np.int64)
    found = measure_lists(
        np.empty((0, 5), dtype=np.int64), np.zeros(1, dtype=np.int64), empty, cutoffs=[5], num_items=9
    )
    assert math.isnan(found.estimates["recall@5"].value)
    assert found.coverage["coverage@5"] == 0.0


@pytest.mark.parametrize("rank", [[-1.0], [math.nan], [[1.0]]])
def test_wrong_ranks_are_refused(rank: list[float]) -> None:
    with pytest.raises(ValueError, match="rank"):
        measure_ranks(np.array(rank), cutoffs=[1])


def test_wrong_lists_are_refused() -> None:
    top, offsets, targets = np.array([[1, 1]]), np.array([0, 1]), np.array([1])
    with pytest.raises(ValueError, match="top_items repeats"):
        measure_lists(top, offsets, targets, cutoffs=[1], num_items=3)
    with pytest.raises(ValueError, match="cutoffs"):
        measure_lists(np.array([[1, 2]]), offsets, targets, cutoffs=[3], num_items=3)
    with pytest.raises(ValueError, match="cutoffs"):
        measure_lists(np.array([[1, 2]]), offsets, targets, cutoffs=[0], num_items=3)
    with pytest.raises(ValueError, match="target_offsets"):
        measure_lists(np.array([[1, 2]]), np.array([0, 2]), targets, cutoffs=[1], num_items=3)
