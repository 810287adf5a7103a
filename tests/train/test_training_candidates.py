"""Training on candidates: each is asked as if it alone came next, and nothing else is."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megarec.data.dataset import Dataset, open_dataset
from megarec.data.packs import Pack, PackRule, cut_windows
from megarec.data.stream import TrainStream
from megarec.models.inputs import Events
from megarec.models.registry import build_model
from megarec.models.rows import RowMap
from megarec.models.shape import input_shape
from megarec.parallel.parts import local_parts
from megarec.parallel.placement import initialize
from megarec.train.batches import BatchMaker, PackBatch, PackWork
from megarec.train.checks import check_run
from megarec.train.config import TrainConfig
from megarec.train.objective import Objective
from megarec.train.trainer import stream_config
from tests.data.small_datasets import make_block
from tests.inference.synthetic import write_world
from tests.train.runs import SMALL_ARGUS, SMALL_HSTU, make_config

CANDIDATES = 3
STREAM = {
    "tokens_per_pack": 144,
    "lanes": 1,
    "pool_blocks": 1,
    "max_history_events": 9,
    "candidates_per_window": CANDIDATES,
    "window": f"stride:{CANDIDATES}",
}
LONG_GAPS = {"time_gap_buckets": 24}
MODELS = {
    "argus, three tokens": {**SMALL_ARGUS, **LONG_GAPS, "token_layout": "context_item_feedback"},
    "hstu, two tokens": {**SMALL_HSTU, **LONG_GAPS, "token_layout": "item_action"},
    "hstu, prefix, product": {
        **SMALL_HSTU,
        "token_layout": "item_action",
        "prefix_fields": ["device"],
        "heads": {**SMALL_HSTU["heads"], "feedback_head": "product_swish"},  # type: ignore[dict-item]
    },
    "hstu, no biases": {
        **SMALL_HSTU,
        "token_layout": "item_action",
        "block": {**SMALL_HSTU["block"], "num_time_buckets": 0, "position_bias": False},  # type: ignore[dict-item]
    },
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("world") / "data"
    write_world(path, num_users=30)
    return open_dataset(path)


class World:
    """One pack with candidates and a model in fp64 that reads rows from one matrix."""

    def __init__(self, dataset: Dataset, model: dict[str, Any]) -> None:
        settings = {"model": model, "stream": STREAM, "objective": {"num_uniform_negatives": 4}}
        self.config: TrainConfig = make_config(dataset.path, Path("nowhere"), **settings)
        check_run(self.config, world=1)
        self.shape = input_shape(dataset.fields, self.config.model)
        starts = np.cumsum([0, *self.shape.tables.values()])
        first_row = dict(zip(self.shape.tables, starts.tolist(), strict=False))
        self.row_map = RowMap(self.shape, first_row, dataset.item_side())
        self.maker = BatchMaker(self.row_map, dataset.item_counts(), self.config.objective, seed=5)
        self.pack: Pack = TrainStream(dataset, stream_config(self.config), lanes=[0]).next_step()[0]
        self.model = build_model(replace(self.config.model, dropout=0.0), self.shape, local_parts()).double()
        initialize(self.model, 5)
        generator = torch.Generator().manual_seed(0)
        width = self.config.model.table_width
        self.matrix = torch.randn(int(starts[-1]), width, dtype=torch.float64, generator=generator).requires_grad_()

    @property
    def weights(self) -> list[Tensor]:
        return [self.matrix, *self.model.parameters()]

    def lookup(self, rows: Tensor) -> Tensor:
        return (self.matrix[rows.clamp(min=0)] * (rows >= 0).unsqueeze(-1)).sum(-2)

    def losses(self, batch: PackBatch | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """What the pack adds to the loss, and the sum of each head."""
        batch = batch or self.maker.make(self.pack)
        heads = self.shape.feedback_heads
        objective = Objective([self.model], self.config.objective, heads, device=torch.device("cpu"))
        ones = torch.ones(len(objective.names), dtype=torch.float64)
        return objective.forward(PackWork(pack=batch, rows=batch.rows), 0, None, lookup=self.lookup, global_counts=ones)

    def alone(self) -> dict[str, Tensor]:
        """The sum of each feedback head over all candidates, one history and one candidate at a time."""
        sums = {head: torch.zeros((), dtype=torch.float64) for head in self.shape.feedback_heads}
        for first, last in pairwise(self.pack.cu_seqlens.tolist()):
            num_candidates = min(CANDIDATES, last - first - 1)
            assert num_candidates > 0
            for candidate in range(last - num_candidates, last):
                index = np.array([*range(first, last - num_candidates), candidate])
                for head, logits in self._logits(index).items():
                    sums[head] = sums[head] + _loss(logits, int(self.pack.fields[head][candidate]))
        return sums

    def _logits(self, index: np.ndarray) -> dict[str, Tensor]:
        """The logits of the last of the events `index` behind the others: plain causal attention."""
        pack = self.pack
        fields = {name: column[index] for name, column in pack.fields.items()}
        times = pack.timestamp[index]
        # a history is asked at the time of its first candidate
        asked = np.append(times[1:], times[-1])
        asked[-2] = pack.timestamp[index[-2] + 1]
        rows = self.row_map.events(
            fields,
            next_fields=fields,
            next_item=np.full(len(index), -1),
            gap_seconds=np.diff(times, prepend=times[0] + 1),
            next_gap_seconds=np.zeros(len(index), dtype=np.int64),
        )
        events = Events(
            cu_seqlens=torch.tensor([0, len(index)]),
            position=torch.arange(len(index)),
            timestamp=torch.from_numpy(times),
            next_timestamp=torch.from_numpy(asked),
            **{f"{part}_rows": torch.from_numpy(row) for part, row in rows.items()},  # type: ignore[arg-type]
        )
        logits = self.model.feedback_logits(self.model.encode(events, self.lookup), events, self.lookup)
        return {head: values[-2] for head, values in logits.items()}


def _loss(logits: Tensor, value: int) -> Tensor:
    if value <= 0:
        return torch.zeros((), dtype=torch.float64)
    if len(logits) == 1:
        return -torch.nn.functional.logsigmoid(logits[0] if value == 2 else -logits[0])
    return -torch.log_softmax(logits, 0)[value - 1]


@pytest.mark.parametrize("name", MODELS)
def test_each_candidate_is_asked_alone(dataset: Dataset, name: str) -> None:
    world = World(dataset, {**MODELS[name], "feedback_heads": ["listened", "ratio"]})
    world.config = replace(world.config, objective=replace(world.config.objective, next_item="none"))
    loss, sums = world.losses()
    alone = world.alone()
    assert list(alone) == ["listened", "ratio"]
    for head, total in alone.items():
        assert total > 0
        torch.testing.assert_close(sums[head], total.detach(), rtol=1e-11, atol=1e-12)
    mine = torch.autograd.grad(loss, world.weights, allow_unused=True)
    wanted = torch.autograd.grad(torch.stack(list(alone.values())).sum(), world.weights, allow_unused=True)
    for weight, one, other in zip(world.weights, mine, wanted, strict=True):
        one, other = (torch.zeros_like(weight) if x is None else x for x in (one, other))  # heads without a loss
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def _no_candidates(batch: PackBatch) -> None:
    del batch.columns["num_candidates"]


def _count_on(batch: PackBatch) -> None:
    bounds = batch.columns["cu_seqlens"].tolist()
    for first, last in pairwise(bounds):
        batch.columns["position"][first:last] = torch.arange(last - first)


def _gap_to_the_event_before(world: World, batch: PackBatch) -> None:
    fields = {f.name: world.pack.fields[f.name] for f in world.shape.context if f.name != "time_gap"}
    gaps = np.where(world.pack.position == 0, -1, np.diff(world.pack.timestamp, prepend=0))
    batch.rows["context"].copy_(torch.from_numpy(world.row_map.context(fields, gap_seconds=gaps)))


def _grade_all(world: World, batch: PackBatch) -> None:
    for head in world.shape.feedback_heads:
        labels = np.where(world.pack.has_target, world.pack.next_fields[head], 0)
        batch.columns[f"feedback/{head}"] = torch.from_numpy(labels.astype(np.int64))


FAULTS: dict[str, Callable[[World, PackBatch], None]] = {
    "candidates see each other": lambda _, batch: _no_candidates(batch),
    "places are counted on": lambda _, batch: _count_on(batch),
    "the gap is that to the candidate before": _gap_to_the_event_before,
    "the history is graded too": _grade_all,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(dataset: Dataset, fault: str) -> None:
    world = World(dataset, MODELS["hstu, two tokens"])
    right, batch = world.losses()[1], world.maker.make(world.pack)
    FAULTS[fault](world, batch)
    wrong = world.losses(batch)[1]
    difference = max(float((right[head] - wrong[head]).abs()) for head in world.shape.feedback_heads)
    assert difference > 1e-6  # 2e-10 is what the test above lets pass


@pytest.mark.parametrize(("layout", "num_candidates"), [("fused", 0), ("item_action", 0), ("item_action", 3)])
def test_a_model_reads_the_histories_it_was_trained_on(dataset: Dataset, layout: str, num_candidates: int) -> None:
    stream = {**STREAM, "candidates_per_window": num_candidates}
    config = make_config(dataset.path, Path("nowhere"), model={**SMALL_HSTU, "token_layout": layout}, stream=stream)
    packs = TrainStream(dataset, stream_config(config), lanes=[0])
    longest = 0
    for pack in (packs.next_step()[0] for _ in range(20)):
        lengths = np.diff(pack.cu_seqlens)
        asked = np.maximum(pack.num_candidates, 1) if config.model.keep_last_event else 0
        longest = max(longest, int((lengths - asked).max()))
    packs.close()
    assert config.max_history_events == longest == 9 - max(num_candidates, layout != "fused")


@pytest.mark.parametrize(("stride", "num_candidates"), [(10, 1), (5, 2), (3, 3), (2, 3)])
def test_every_window_has_a_candidate(stride: int, num_candidates: int) -> None:
    rule = PackRule(num_events=64, max_targets=10, stride=stride, keep_last_event=True, candidates=num_candidates)
    lengths = np.arange(1, 40)
    windows, _ = cut_windows(make_block(lengths.tolist(), first_user=0), epoch=0, number=0, rule=rule)
    assert windows.num_targets.min() >= 1
    for user, length in enumerate(lengths.tolist()):
        ends = length - 1 - stride * windows.reference[windows.reference[:, 2] == user, 3]
        assert ends.tolist() == list(range(length - 1, 0, -stride))[: len(ends)]
        assert length < 2 or ends[-1] <= max(stride, num_candidates)  # the next one would have nothing new
