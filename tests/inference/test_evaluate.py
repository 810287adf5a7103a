"""The whole evaluation against a slow twin in plain Python: every rule of the protocol, every metric."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from megarec.base.errors import UserError
from megarec.data.dataset import Dataset
from megarec.data.reader import BlockReader
from megarec.inference import evaluate as evaluate_module
from megarec.inference.baselines.oracle import read_oracle
from megarec.inference.evaluate import Tally, evaluate, tally
from megarec.inference.feedback_measures import measure_feedback
from megarec.inference.histories import Histories, Prediction, Targets
from megarec.metrics.protocol import Protocol
from tests.inference.synthetic import CONFIGS, MAX_EVENTS, NUM_ITEMS, make_model, raw_item, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_world(tmp_path_factory.mktemp("world") / "data", num_targets=4, unknown_targets=True)


@dataclass
class Tied:
    """Few different scores, that depend on the user and the item alone; a feedback logit per target."""

    name: str = "tied"

    def scores_of(self, user: int) -> list[float]:
        return [float((item * 7 + user * 3) % 4) for item in range(NUM_ITEMS + 1)]

    def predict(self, histories: Histories, targets: Targets) -> Prediction:
        scores = torch.tensor([self.scores_of(user) for user in histories.user.tolist()])
        logit = torch.from_numpy(np.sin(targets.fields["item"] + targets.timestamp))[:, None]
        return Prediction(scores=scores, feedback={"listened": logit})


@dataclass
class User:
    number: int
    history: list[int]
    targets: list[int]
    listened: list[bool]


def read_users(world: Dataset) -> list[User]:
    reader, users = BlockReader(world, "eval"), []
    for number in range(reader.num_blocks):
        block = reader.read(number)
        assert block.target_offsets is not None
        for i, user in enumerate(block.user.tolist()):
            history = block.columns["item"][block.offsets[i] : block.offsets[i + 1]].tolist()
            targets = block.target_columns["item"][block.target_offsets[i] : block.target_offsets[i + 1]].tolist()
            listened = block.target_columns["listened"][block.target_offsets[i] : block.target_offsets[i + 1]] == 2
            users.append(User(user, history, targets, listened.tolist()))
    return [u for u in users if u.history and u.targets]


def slow_metrics(users: list[User], protocol: Protocol, candidates: list[int]) -> dict[str, float]:
    sums: dict[str, float] = {}
    shown: dict[int, set[int]] = {k: set() for k in protocol.cutoffs}
    for user in users:
        asked = [i for i, flag in zip(user.targets, user.listened, strict=True) if flag or not protocol.target_flag]
        scores = Tied().scores_of(user.number)
        window = user.history[-(protocol.max_history_events or 0) :]
        hidden = {"none": set(), "window": set(window), "full": set(user.history)}[protocol.filter_seen]
        order = sorted((i for i in candidates if i not in hidden), key=lambda i: (-scores[i], i))
        ranks = sorted(order.index(i) + 1 for i in set(asked) if i in order)
        num_wanted = len(set(asked) - {0}) + asked.count(0)
        if not num_wanted:
            continue
        sums["users"] = sums.get("users", 0) + 1
        deepest = (protocol.mrr_depth or math.inf) + 1
        sums["mrr"] = sums.get("mrr", 0.0) + 1 / min([*ranks, deepest])
        for k in protocol.cutoffs:
            hits = [r for r in ranks if r <= k]
            ideal = sum(1 / math.log2(r + 1) for r in range(1, min(k, num_wanted) + 1))
            for name, value in (
                ("hr", float(bool(hits))),
                ("recall", len(hits) / min(k, num_wanted)),
                ("ndcg", sum(1 / math.log2(r + 1) for r in hits) / ideal),
            ):
                sums[f"{name}@{k}"] = sums.get(f"{name}@{k}", 0.0) + value
            shown[k] |= set(order[:k])
    num_users = sums.pop("users")
    metrics = {name: total / num_users for name, total in sums.items()}
    return metrics | {f"coverage@{k}": len(items) / len(candidates) for k, items in shown.items()}


@pytest.mark.parametrize("filter_seen", ["none", "window", "full"])
@pytest.mark.parametrize(
    "fields",
    [
        {"max_history_events": 3},
        {"max_history_events": 512, "mrr_depth": 4},
        {"max_history_events": 9, "catalog": "trained", "target_flag": "listened"},
    ],
)
def test_ranking_equals_the_slow_twin(
    world: Dataset, filter_seen: Any, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = np.arange(NUM_ITEMS + 1) % 3  # every third item has no train event
    monkeypatch.setattr(Dataset, "item_counts", lambda dataset: counts)
    metrics = ("hr@1", "ndcg@5", "recall@10", "coverage@20", "hr@200", "mrr")  # 200 is more than the catalog holds
    protocol = Protocol(filter_seen=filter_seen, metrics=metrics, **fields)
    users = read_users(world)
    result = evaluate(Tied(), world, protocol)
    trained_only = protocol.catalog == "trained"
    candidates = [i for i in range(1, NUM_ITEMS + 1) if counts[i] or not trained_only]
    numbers = {name: value for name, value in result.flat().items() if "/" not in name}
    assert numbers == pytest.approx(slow_metrics(users, protocol, candidates), abs=1e-12)
    assert [*result.reported()] == [*metrics, "listened/auc"]
    assert result.counts["users"] == len(users)
    assert result.counts["users_without_history"] == 1
    assert result.counts["users_without_target"] == 1
    assert (result.counts["impossible_targets"] > 0) == (filter_seen != "none" or trained_only)
    assert result.counts["unknown_targets"] > 0
    estimate = result.ranking["hr@5"]
    variance = estimate.value * (1 - estimate.value) / (result.counts["ranked_users"] - 1)
    assert estimate.standard_error == pytest.approx(math.sqrt(variance))


def test_batches_and_readers_change_nothing(world: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(Tied(), world, Protocol())
    monkeypatch.setattr(evaluate_module, "MAX_SCORES", 3 * (NUM_ITEMS + 1))
    assert evaluate(Tied(), world, Protocol()).flat() == pytest.approx(whole.flat(), rel=1e-12)
    joined = Tally()
    for rank in range(3):
        joined.join(tally(Tied(), world, Protocol(), rank=rank, world=3))
    assert joined.result("tied", world, Protocol()) == replace(
        whole, ranking=joined.result("", world, Protocol()).ranking
    )
    few = evaluate(Tied(), world, Protocol(), max_users=5)
    assert few.counts["users"] + few.counts["users_without_history"] == 5
    shares = Tally()
    for rank in range(3):
        shares.join(tally(Tied(), world, Protocol(), max_users=5, rank=rank, world=3))
    assert shares.result("tied", world, Protocol()).flat() == pytest.approx(few.flat(), rel=1e-12)


def test_feedback_is_measured_where_it_is_known(world: Dataset) -> None:
    reader, outcome, score, owner = BlockReader(world, "eval"), [], [], []
    for number in range(reader.num_blocks):
        block = reader.read(number)
        assert block.target_offsets is not None
        columns = block.target_columns
        owner += np.repeat(block.user, np.diff(block.target_offsets)).tolist()
        outcome += columns["listened"].tolist()
        score += np.sin(columns["item"] + columns["timestamp"]).tolist()
    rows = [(o, s) for o, s, u in zip(outcome, score, owner, strict=True) if o and u > 1]
    pairs = [(s, t) for o, s in rows if o == 2 for p, t in rows if p == 1]
    auc = sum(1.0 if s > t else 0.5 if s == t else 0.0 for s, t in pairs) / len(pairs)
    measures = evaluate(Tied(), world, Protocol()).feedback["listened"]
    assert measures["auc"] == pytest.approx(auc)
    assert measures["count"] == len(rows)
    share = sum(o == 2 for o, _ in rows) / len(rows)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    loss = sum(math.log1p(math.exp(-s if o == 2 else s)) for o, s in rows) / len(rows)
    assert measures["normalized_entropy"] == pytest.approx(loss / entropy)
    assert measures["calibration"] == pytest.approx(sum(1 / (1 + math.exp(-s)) for _, s in rows) / len(rows) / share)


@dataclass
class Watcher:
    """Notes what it is asked."""

    name: str = "watcher"
    asked: Histories | None = None

    def predict(self, histories: Histories, targets: Targets) -> Prediction:
        self.asked = histories
        return Prediction(scores=torch.zeros(len(histories.user), NUM_ITEMS + 1))


def test_the_question_holds_what_the_protocol_says_and_no_feedback(world: Dataset) -> None:
    watcher = Watcher()
    evaluate(watcher, world, Protocol())
    assert watcher.asked is not None and list(watcher.asked.query_fields) == ["device"]
    last = watcher.asked.timestamp[watcher.asked.cu_seqlens[1:] - 1]
    assert (watcher.asked.query_time > last).all()
    evaluate(watcher, world, Protocol(query_time="last_event", query_context="missing"))
    assert watcher.asked.query_fields == {}
    assert np.array_equal(watcher.asked.query_time, watcher.asked.timestamp[watcher.asked.cu_seqlens[1:] - 1])


def test_a_model_is_measured(world: Dataset) -> None:
    result = evaluate(make_model(CONFIGS["hstu"], world), world, Protocol(max_history_events=MAX_EVENTS))
    assert set(result.feedback) == {"listened", "ratio"}
    assert "auc" not in result.feedback["ratio"] and result.feedback["ratio"]["normalized_entropy"] > 0
    assert 0 <= result.ranking["ndcg@10"].value <= 1


def test_nobody_to_measure_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no user"):
        evaluate(Tied(), write_world(tmp_path / "data", num_users=2), Protocol())


def write_oracle(path: Path, dataset: Dataset, *, late: int = 0) -> dict[int, int]:
    """Gives every target probability 0.5, the item after it 0.3, an unknown item 0.2; returns the targets."""
    reader, rows, targets = BlockReader(dataset, "eval"), [], {}
    for number in range(reader.num_blocks):
        block = reader.read(number)
        for user, item, time in zip(
            block.user[np.diff(block.target_offsets) > 0],  # type: ignore[arg-type]
            block.target_columns["item"].tolist(),
            block.target_columns["timestamp"].tolist(),
            strict=True,
        ):
            targets[int(user)] = item
            items = [raw_item(item), raw_item(1 + item % NUM_ITEMS), 5]
            rows.append((f"u{user}", time + late, items, [0.5, 0.3, 0.2], 0.25))
    columns = ["uid", "timestamp", "item_ids", "probabilities", "p_listened"]
    pl.DataFrame(rows, schema=columns, orient="row").write_parquet(path)
    return targets


def test_the_oracle_ranks_by_the_truth(tmp_path: Path) -> None:
    dataset = write_world(tmp_path / "data")
    write_oracle(tmp_path / "oracle.parquet", dataset)
    result = evaluate(read_oracle(tmp_path / "oracle.parquet", dataset), dataset, Protocol())
    assert result.ranking["mrr"].value == 1.0
    assert result.counts["users"] == 22
    write_oracle(tmp_path / "late.parquet", dataset, late=1)
    with pytest.raises(UserError, match="other times"):
        evaluate(read_oracle(tmp_path / "late.parquet", dataset), dataset, Protocol())
    with pytest.raises(UserError, match="not an oracle's file"):
        read_oracle(dataset.path / "dataset.json", dataset)
    many = write_world(tmp_path / "many", num_targets=2)
    with pytest.raises(UserError, match="last event only"):
        evaluate(read_oracle(tmp_path / "oracle.parquet", many), many, Protocol())


def test_measures_of_more_than_two_outcomes_and_of_none() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]))
    measures = measure_feedback(logits, np.array([1, 3, 0]), np.zeros(3, np.int64))
    assert measures == pytest.approx(
        {"count": 2.0, "normalized_entropy": -(math.log(0.5) + math.log(0.8)) / 2 / math.log(2)}
    )
    assert measure_feedback(np.zeros((2, 1)), np.array([0, 0]), np.zeros(2, np.int64)) == {"count": 0.0}
    assert "auc" not in measure_feedback(np.zeros((2, 1)), np.array([2, 2]), np.zeros(2, np.int64))
