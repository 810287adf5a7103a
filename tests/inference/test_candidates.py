"""All targets of a user in one pass over the history give what each gives alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from megarec_kernels import visibility
from torch import Tensor

from megarec.data.dataset import Dataset
from megarec.data.evaluation import evaluation_batches
from megarec.inference.evaluate import ask
from megarec.inference.histories import Histories, Targets
from megarec.inference.model import LocalModel
from megarec.layers import tokens
from megarec.metrics.protocol import Protocol
from megarec.models.choice import ModelConfig
from megarec.models.inputs import Events
from tests.inference.synthetic import CONFIGS, MAX_EVENTS, make_model, write_world

CASES: dict[str, ModelConfig] = {
    **CONFIGS,
    **{f"{name}, time gaps": replace(config, time_gap_buckets=12) for name, config in CONFIGS.items()},
    **{
        f"{name}, product": replace(config, heads=replace(config.heads, feedback_head="product_swish"))
        for name, config in CONFIGS.items()
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_world(tmp_path_factory.mktemp("world") / "data", num_targets=5)


def questions(world: Dataset) -> tuple[Histories, Targets]:
    """Five targets a user: three at one time, then one later, then one at the first time again."""
    batch = next(iter(evaluation_batches(world, max_history_events=MAX_EVENTS, users_per_batch=8)))
    users = np.flatnonzero(np.diff(batch.cu_seqlens))
    histories, targets = ask(batch, Protocol(max_history_events=MAX_EVENTS), users, context=["device"])
    time = targets.timestamp[targets.offsets[:-1]].repeat(5) + np.tile([0, 0, 0, 5_000, 0], len(users))
    return histories, replace(targets, timestamp=time)


def alone(model: LocalModel, histories: Histories, targets: Targets) -> dict[str, Tensor]:
    """Each target by itself: the slow twin."""
    rows = []
    for target, user in enumerate(targets.user_of_target()):
        one = Targets(
            offsets=np.array([0, 1]),
            timestamp=targets.timestamp[[target]],
            fields={name: column[[target]] for name, column in targets.fields.items()},
        )
        rows.append(model.feedback_logits(histories.slice(user, user + 1), one))
    return {head: torch.cat([row[head] for row in rows]) for head in rows[0]}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("max_candidates", [1, 2, 256])
def test_together_is_each_alone(world: Dataset, name: str, max_candidates: int) -> None:
    histories, targets = questions(world)
    model = make_model(CASES[name], world, max_candidates=max_candidates)
    found, wanted = model.feedback_logits(histories, targets), alone(model, histories, targets)
    assert found.keys() == wanted.keys() and found
    for head in found:
        assert found[head].dtype == torch.float64
        torch.testing.assert_close(found[head], wanted[head], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_pass_reads_a_history_once(world: Dataset, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    histories, targets = questions(world)
    model = make_model(CONFIGS[name], world)
    read: list[int] = []
    encode = model._model.encode
    monkeypatch.setattr(model._model, "encode", lambda e, lookup: read.append(len(e.position)) or encode(e, lookup))
    model.feedback_logits(histories, targets)
    kept = np.minimum(np.diff(histories.cu_seqlens), MAX_EVENTS - CONFIGS[name].keep_last_event)
    times = 2 if CONFIGS[name].name == "hstu" else 1  # a time bias reads each of a user's two times
    assert sum(read) == times * kept.sum() + CONFIGS[name].keep_last_event * len(targets.timestamp)


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name].token_layout != "fused"])
def test_candidates_that_saw_each_other_would_be_seen(
    world: Dataset, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories, targets = questions(world)
    model = make_model(CONFIGS[name], world)
    wanted = alone(model, histories, targets)

    def all_before(*args: object, **kwargs: object) -> visibility.Visibility:
        right = visibility.candidate_suffix(*args, **kwargs)  # type: ignore[arg-type]
        return replace(right, group_first=torch.zeros_like(right.group_first))

    monkeypatch.setattr(tokens, "candidate_suffix", all_before)
    found = model.feedback_logits(histories, targets)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found["listened"], wanted["listened"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("part", ["position", "context_rows", "timestamp"])
def test_candidates_behind_one_another_would_be_seen(
    world: Dataset, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories, targets = questions(world)
    name = "item_action" if part == "timestamp" else "context_item_feedback"
    model = make_model(CASES[f"{name}, time gaps"], world)
    wanted = alone(model, histories, targets)
    make_events = model._events

    def faulty(followed: Histories, *, next_item: np.ndarray, num_candidates: np.ndarray) -> Events:
        right = make_events(followed, next_item=next_item, num_candidates=num_candidates)
        chain = make_events(followed, next_item=next_item)
        wrong = chain.next_timestamp if part == "timestamp" else getattr(chain, part)
        return replace(right, **{part: wrong.clamp(max=MAX_EVENTS - 1) if part == "position" else wrong})

    monkeypatch.setattr(model, "_events", faulty)
    found = model.feedback_logits(histories, targets)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found["listened"], wanted["listened"], rtol=1e-6, atol=1e-6)


def test_without_targets_there_is_nothing_to_answer(world: Dataset) -> None:
    histories, targets = questions(world)
    none = Targets(
        offsets=np.zeros(len(histories.user) + 1, np.int64),
        timestamp=targets.timestamp[:0],
        fields={name: column[:0] for name, column in targets.fields.items()},
    )
    assert make_model(CONFIGS["argus"], world).feedback_logits(histories, none) == {}
