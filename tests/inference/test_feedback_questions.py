"""Feedback is asked at the target's own time and without what it predicts; the newest events are the ones kept."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megarec.data.dataset import Dataset
from megarec.data.evaluation import evaluation_batches
from megarec.inference.evaluate import ask
from megarec.inference.histories import Histories, Targets
from megarec.metrics.protocol import Protocol
from tests.inference.synthetic import CONFIGS, MAX_EVENTS, make_model, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_world(tmp_path_factory.mktemp("world") / "data", num_targets=2)


def questions(world: Dataset) -> tuple[Histories, Targets]:
    batch = next(iter(evaluation_batches(world, max_history_events=MAX_EVENTS, users_per_batch=8)))
    users = np.flatnonzero(np.diff(batch.cu_seqlens))
    return ask(batch, Protocol(max_history_events=MAX_EVENTS), users, context=["device"])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_targets_own_feedback_is_not_read(world: Dataset, name: str) -> None:
    histories, targets = questions(world)
    other = {field: 3 - targets.fields[field] for field in ("listened",)} | {"ratio": 5 - targets.fields["ratio"]}
    changed = replace(targets, fields=targets.fields | {n: np.clip(v, 0, None) for n, v in other.items()})
    model = make_model(CONFIGS[name], world)
    ours, theirs = model.feedback_logits(histories, targets), model.feedback_logits(histories, changed)
    assert ours.keys() == theirs.keys() and ours
    for head in ours:
        assert torch.equal(ours[head], theirs[head])


def test_each_target_is_asked_at_its_own_time(world: Dataset) -> None:
    config = replace(CONFIGS["argus"], time_gap_buckets=30)
    histories, targets = questions(world)
    model = make_model(config, world)
    before = model.feedback_logits(histories, targets)
    later = targets.timestamp.copy()
    later[1::2] += 1_000_000
    after = model.feedback_logits(histories, replace(targets, timestamp=later))
    same = (before["listened"] == after["listened"]).all(dim=1).numpy()
    assert same[::2].all()
    assert not same[1::2].all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_history_may_fill_every_position(world: Dataset, name: str, tmp_path: Path) -> None:
    config = replace(CONFIGS[name], max_positions=4)
    histories, targets = questions(world)
    assert np.diff(histories.cu_seqlens).max() > 4
    logits = make_model(config, world).feedback_logits(histories, targets)["listened"]
    assert torch.isfinite(logits).all()


def test_the_newest_events_are_kept() -> None:
    histories = Histories(
        user=np.arange(3),
        cu_seqlens=np.array([0, 4, 4, 6]),
        timestamp=np.array([1, 2, 3, 4, 5, 6]),
        fields={"item": np.array([10, 11, 12, 13, 14, 15])},
        query_time=np.zeros(3, np.int64),
    )
    kept = histories.newest(2)
    assert kept.cu_seqlens.tolist() == [0, 2, 2, 4]
    assert kept.timestamp.tolist() == [3, 4, 5, 6]
    assert kept.fields["item"].tolist() == [12, 13, 14, 15]
