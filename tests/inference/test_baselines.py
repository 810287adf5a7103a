"""Every baseline against a slow twin made of Python sets and dictionaries."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from megarec.base.jagged import lengths_to_offsets
from megarec.data.block import Block
from megarec.inference.baselines import next_item
from megarec.inference.baselines.config import BaselineConfig
from megarec.inference.baselines.feedback import FeedbackRates, count_feedback
from megarec.inference.baselines.next_item import ItemNeighbours, Popularity, TrainEvents, Transitions
from megarec.inference.histories import Histories, Targets

NUM_ITEMS = 23
Log = list[list[tuple[int, int]]]  # per user: (item, timestamp)


def make_log(seed: int, lengths: list[int]) -> Log:
    rng = np.random.default_rng(seed)
    return [
        list(zip(rng.integers(1, NUM_ITEMS, n).tolist(), np.sort(rng.integers(0, 10**6, n)).tolist(), strict=True))
        for n in lengths
    ]


def make_block(log: Log, **columns: np.ndarray) -> Block:
    flat = [event for user in log for event in user]
    return Block(
        user=np.arange(len(log)),
        offsets=lengths_to_offsets(np.array([len(u) for u in log])),
        columns={
            "item": np.array([i for i, _ in flat], dtype=np.uint8),
            "timestamp": np.array([t for _, t in flat], dtype=np.int64),
            **columns,
        },
    )


def make_histories(log: Log, **columns: np.ndarray) -> Histories:
    block = make_block(log, **columns)
    fields = {name: column for name, column in block.columns.items() if name != "timestamp"}
    return Histories(
        user=block.user,
        cu_seqlens=block.offsets,
        timestamp=block.columns["timestamp"],
        fields=fields,
        query_time=np.full(len(log), 10**6),
    )


NO_TARGETS = Targets(offsets=np.zeros(1, np.int64), timestamp=np.zeros(0, np.int64), fields={})
TRAIN = make_log(1, [0, 1, 30, 63, 2, 17, 0, 40])
ASKED = make_log(2, [5, 0, 1, 20])


@pytest.fixture
def events() -> TrainEvents:
    blocks = [make_block(TRAIN[:3]), make_block(TRAIN[3:3]), make_block(TRAIN[3:])]
    return TrainEvents.gather(blocks, num_items=NUM_ITEMS)


def test_train_events_join_blocks(events: TrainEvents) -> None:
    assert np.diff(events.offsets).tolist() == [len(u) for u in TRAIN]
    assert events.item.tolist() == [i for u in TRAIN for i, _ in u]
    nothing = TrainEvents.gather([], num_items=4)
    assert nothing.counts().tolist() == [0, 0, 0, 0]


def test_popularity(events: TrainEvents) -> None:
    histories = make_histories(ASKED)
    counts = Counter(i for u in TRAIN for i, _ in u)
    newest = max(t for u in TRAIN for _, t in u)
    most = Popularity.most_popular(events).predict(histories, NO_TARGETS).scores
    decayed = Popularity.decayed(events, half_life_days=2.0).predict(histories, NO_TARGETS).scores
    assert most is not None and decayed is not None
    for item in range(NUM_ITEMS):
        weight = sum(0.5 ** ((newest - t) / 86400 / 2.0) for u in TRAIN for i, t in u if i == item)
        assert most[:, item].tolist() == [counts[item]] * len(ASKED)
        assert decayed[2, item].item() == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize("cells", [1 << 25, 60])
def test_item_neighbours(events: TrainEvents, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_item, "MAX_CELLS", cells)
    config = BaselineConfig(num_neighbours=4, max_user_items=9)
    users: dict[int, set[int]] = {i: set() for i in range(NUM_ITEMS)}
    for user, log in enumerate(TRAIN):
        for item in list(dict.fromkeys(i for i, _ in reversed(log)))[:9]:
            users[item].add(user)
    nearest: dict[int, dict[int, float]] = {}
    for i in range(NUM_ITEMS):
        cosine = {
            j: len(users[i] & users[j]) / math.sqrt(len(users[i]) * len(users[j]))
            for j in range(NUM_ITEMS)
            if j != i and users[i] & users[j]
        }
        nearest[i] = dict(sorted(cosine.items(), key=lambda pair: (-pair[1], pair[0]))[:4])
    scores = ItemNeighbours.fit(events, config).predict(make_histories(ASKED), NO_TARGETS).scores
    assert scores is not None and scores.shape == (len(ASKED), NUM_ITEMS)
    for row, log in enumerate(ASKED):
        for item in range(NUM_ITEMS):
            expected = sum(nearest[j].get(item, 0.0) for j in {i for i, _ in log})
            assert scores[row, item].item() == pytest.approx(expected, abs=1e-12)


def test_transitions(events: TrainEvents) -> None:
    pairs = Counter((a[0], b[0]) for u in TRAIN for a, b in itertools.pairwise(u))
    total = sum(len(u) for u in TRAIN)
    popularity = {i: sum(i == j for u in TRAIN for j, _ in u) / total for i in range(NUM_ITEMS)}
    asked = [*ASKED, [(0, 5)]]
    scores = Transitions.fit(events, BaselineConfig(prior_events=2.0)).predict(make_histories(asked), NO_TARGETS).scores
    assert scores is not None
    for row, log in enumerate(asked):
        for item in range(NUM_ITEMS):
            last = log[-1][0] if log else -1
            leaving = sum(n for (i, _), n in pairs.items() if i == last)
            expected = (pairs[last, item] + 2.0 * popularity[item]) / (leaving + 2.0)
            assert scores[row, item].item() == pytest.approx(expected, rel=1e-12)
        assert scores[row].sum().item() == pytest.approx(1.0)


def test_feedback_rates() -> None:
    rng = np.random.default_rng(3)
    size = sum(len(u) for u in TRAIN)
    columns = {"listened": rng.integers(0, 3, size), "rating": rng.integers(0, 6, size)}
    counts = count_feedback([make_block(TRAIN, **columns)], num_items=NUM_ITEMS, classes={"listened": 2, "rating": 5})
    asked = rng.integers(0, 3, sum(len(u) for u in ASKED))
    histories = make_histories(ASKED, listened=asked, rating=rng.integers(0, 6, len(asked)))
    targets = Targets(
        offsets=np.array([0, 1, 3, 3, 4]), timestamp=np.zeros(4, np.int64), fields={"item": np.array([3, 0, 7, 3])}
    )
    items = [i for u in TRAIN for i, _ in u]

    def rate(outcomes: list[int]) -> float:
        known = [o for o in columns["listened"].tolist() if o]
        overall = (known.count(2) + 1) / (len(known) + 2)
        seen = [o for o in outcomes if o]
        return (seen.count(2) + 10 * overall) / (len(seen) + 10)

    by_item = FeedbackRates(by="item", counts=counts, prior_events=10.0).predict(histories, targets).feedback
    expected = [
        rate([o for i, o in zip(items, columns["listened"].tolist(), strict=True) if i == t]) for t in (3, 0, 7, 3)
    ]
    assert torch.sigmoid(by_item["listened"][:, 0]).tolist() == pytest.approx(expected)
    assert by_item["rating"].shape == (4, 5)
    assert by_item["rating"].exp().sum(1).tolist() == pytest.approx([1.0] * 4)
    by_user = FeedbackRates(by="user", counts=counts, prior_events=10.0).predict(histories, targets).feedback
    of_user = np.split(asked, histories.cu_seqlens[1:-1])
    expected = [rate(of_user[u].tolist()) for u in (0, 1, 1, 3)]
    assert torch.sigmoid(by_user["listened"][:, 0]).tolist() == pytest.approx(expected)
