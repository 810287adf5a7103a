"""What a pack asks for and what it costs, against plain loops over its events."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megarec.base.errors import UserError
from megarec.base.random import derive_key, integers_numpy
from megarec.data.dataset import Dataset, open_dataset
from megarec.data.packs import Pack
from megarec.data.stream import TrainStream
from megarec.models.inputs import EVENT_PARTS
from megarec.models.registry import build_model
from megarec.models.rows import RowMap
from megarec.models.shape import InputShape, bucket_time_gap, input_shape
from megarec.parallel.parts import local_parts
from megarec.parallel.placement import initialize
from megarec.train.batches import BatchMaker, PackBatch, PackWork, StepBatch
from megarec.train.config import ObjectiveConfig, TrainConfig
from megarec.train.objective import Objective
from megarec.train.trainer import stream_config
from tests.inference.synthetic import NUM_ITEMS, write_world
from tests.train.runs import SMALL_ARGUS, SMALL_HSTU, make_config

SEED = 5
RTOL = 1e-6  # log Q is kept in fp32: half a unit of 2^-23 of up to 5, and more where its terms cancel
OBJECTIVES = {
    "shared, standard": ObjectiveConfig(num_uniform_negatives=6, chunk_rows=5),
    "shared, negatives only": ObjectiveConfig(num_uniform_negatives=6, correction="negatives_only", chunk_rows=5),
    "in-pack alone, plain": ObjectiveConfig(num_uniform_negatives=0, correction="none"),
    "per position": ObjectiveConfig(negatives="per_position", num_uniform_negatives=4, correction="none"),
    "full": ObjectiveConfig(next_item="full", next_item_weight=0.7, chunk_items=7),
    "feedback alone": ObjectiveConfig(next_item="none", feedback_weight=2.0),
    "next item alone": ObjectiveConfig(num_uniform_negatives=6, feedback_weight=0.0, correction="none"),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("world") / "data"
    write_world(path, num_users=40)
    return open_dataset(path)


class World:
    """One pack, its tensors, and a model in fp64 that reads rows from one matrix."""

    def __init__(self, dataset: Dataset, objective: ObjectiveConfig, model: dict[str, Any]) -> None:
        config: TrainConfig = make_config(dataset.path, Path("nowhere"), model=model)
        self.objective = objective
        self.pack: Pack = TrainStream(dataset, stream_config(config), lanes=[0]).next_step()[0]
        self.shape: InputShape = input_shape(dataset.fields, config.model)
        self.first_row, rows = {}, 0
        for name, count in self.shape.tables.items():
            self.first_row[name], rows = rows, rows + count
        self.row_map = RowMap(self.shape, self.first_row, dataset.item_side())
        self.counts = dataset.item_counts()
        self.batch: PackBatch = BatchMaker(self.row_map, self.counts, objective, seed=SEED).make(self.pack)
        self.model = build_model(replace(config.model, dropout=0.0), self.shape, local_parts()).double()
        initialize(self.model, SEED)
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(rows, config.model.table_width, dtype=torch.float64, generator=generator)
        self.matrix.requires_grad_()

    def lookup(self, rows: Tensor) -> Tensor:
        return (self.matrix[rows.clamp(min=0)] * (rows >= 0).unsqueeze(-1)).sum(-2)

    def targets(self) -> list[tuple[int, int]]:
        """(event, item) of every event whose next item is known, by a walk over the histories."""
        ends = self.pack.cu_seqlens
        found = []
        for first, last in pairwise(ends):
            for event in range(first, last):
                item = int(self.pack.next_fields["item"][event])
                if event + 1 < last:
                    assert item == self.pack.fields["item"][event + 1]
                if self.pack.has_target[event] and item > 0:
                    found.append((event, item))
        return found

    def negatives(self) -> np.ndarray[Any, Any]:
        """The uniform draws, `[K]`, or `[T, K]` for every event."""
        count = self.objective.num_uniform_negatives
        counters = np.arange(count)
        if self.objective.negatives == "per_position":
            counters = np.arange(len(self.pack.position))[:, None] * count + counters
        key = derive_key(SEED, "pack", self.pack.lane, self.pack.number)
        return 1 + integers_numpy(derive_key(key, "negatives"), counters, NUM_ITEMS)

    def next_item_loss(self, query: Tensor, vectors: Tensor) -> Tensor:
        """The sum over targets, one at a time; `query` `[T, D]`, `vectors` `[num_items + 1, D]` by item id."""
        total = torch.zeros((), dtype=torch.float64)
        targets = self.targets()
        distinct = sorted({item for _, item in targets})
        uniform = self.objective.num_uniform_negatives
        popularity = np.maximum(self.counts, 1.0)
        popularity[0] = 0.0
        popularity = popularity / popularity.sum()
        for event, item in targets:
            score = vectors @ query[event] * self.model.inverse_temperature()
            if self.objective.next_item == "full":
                total = total + torch.logsumexp(score[1:], 0) - score[item]
                continue
            if self.objective.negatives == "per_position":
                others = [int(n) for n in self.negatives()[event] if n != item]
            else:
                others = [n for n in (*distinct, *self.negatives().tolist()) if n != item]

            def log_q(i: int) -> float:
                share = len(distinct) * popularity[i] + uniform / NUM_ITEMS
                return math.log(share / (len(distinct) + uniform))

            negative = torch.stack([score[n] for n in others])
            correction = self.objective.correction
            if correction == "standard":
                negative = negative - torch.tensor([log_q(n) for n in others])
                positive = score[item] - log_q(item)
            elif correction == "negatives_only":
                negative = negative - torch.tensor([log_q(n) for n in others]) + math.log(1 - math.exp(log_q(item)))
                positive = score[item]
            else:
                positive = score[item]
            loss = torch.logsumexp(torch.cat([positive[None], negative]), 0) - positive
            if correction == "negatives_only":
                probability = positive.exp() / (positive.exp() + negative.exp().mean())
                loss = (1 - probability).detach() * (torch.logsumexp(negative, 0) - positive)
            total = total + loss
        return total


MODELS = {"argus": SMALL_ARGUS, "hstu": SMALL_HSTU, "own item tables": {**SMALL_ARGUS, "tie_item_tables": False}}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_pack_loss_equals_loops(dataset: Dataset, name: str, model: dict[str, Any]) -> None:
    world = World(dataset, OBJECTIVES[name], model)
    config = world.objective
    objective = Objective([world.model], config, world.shape.feedback_heads, device=torch.device("cpu"))
    counts = objective.count_targets([world.batch])
    global_counts = counts * 3 + 1  # other packs of the step have targets too
    loss, report = objective.forward(
        PackWork(pack=world.batch, rows=world.batch.rows), 0, None, lookup=world.lookup, global_counts=global_counts
    )
    gradient = torch.autograd.grad(loss, [world.matrix, *world.model.parameters()], allow_unused=True)

    states, events = _encode(world)
    sums: dict[str, Tensor] = {}
    if config.next_item != "none":
        query = world.model.next_item_query(states, events, world.lookup)
        rows = torch.from_numpy(world.row_map.item_tower(np.arange(NUM_ITEMS + 1)))
        sums["next_item"] = world.next_item_loss(query, world.model.item_vectors(rows, world.lookup))
    if config.feedback_weight:
        logits = world.model.feedback_logits(states, events, world.lookup)
        for head in world.shape.feedback_heads:
            sums[head] = _feedback_sum(world, logits[head], head)
    assert list(report) == list(sums) == list(objective.names)
    expected = torch.zeros((), dtype=torch.float64)
    for number, (head, total) in enumerate(sums.items()):
        share = total / global_counts[number]
        torch.testing.assert_close(report[head], share.detach(), rtol=RTOL, atol=1e-12)
        weight = config.next_item_weight if head == "next_item" else config.feedback_weight
        expected = expected + weight * share
    torch.testing.assert_close(loss, expected, rtol=RTOL, atol=1e-12)
    wanted = torch.autograd.grad(expected, [world.matrix, *world.model.parameters()], allow_unused=True)
    for mine, theirs in zip(gradient, wanted, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            mine if mine is not None else zero.expand_as(theirs) if theirs is not None else zero,
            theirs if theirs is not None else torch.zeros_like(mine) if mine is not None else zero,
            rtol=RTOL,
            atol=1e-9,
            check_dtype=False,
        )
    num_targets = {"next_item": len(world.targets())}
    for number, head in enumerate(objective.names):
        live = world.pack.next_fields.get(head)
        known = num_targets.get(head, 0 if live is None else int(((live > 0) & world.pack.has_target).sum()))
        assert counts[number] == known > 0


def _encode(world: World) -> tuple[Tensor, Any]:
    from megarec.models.inputs import Events

    columns, rows = world.batch.columns, world.batch.rows
    events = Events(
        cu_seqlens=columns["cu_seqlens"],
        position=columns["position"],
        timestamp=columns["timestamp"],
        next_timestamp=columns["next_timestamp"],
        prefix_rows=rows["prefix"],
        context_rows=rows["context"],
        item_rows=rows["item"],
        feedback_rows=rows["feedback"],
        next_context_rows=rows["next_context"],
        next_item_rows=rows["next_item"],
    )
    return world.model.encode(events, world.lookup), events


def _feedback_sum(world: World, logits: Tensor, head: str) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for event in range(len(world.pack.position)):
        value = int(world.pack.next_fields[head][event])
        if not world.pack.has_target[event] or value <= 0:
            continue
        if logits.shape[1] == 1:
            sign = 1.0 if value == 2 else -1.0
            total = total - torch.nn.functional.logsigmoid(sign * logits[event, 0])
        else:
            total = total - torch.log_softmax(logits[event], 0)[value - 1]
    return total


def test_rows_follow_the_slots(dataset: Dataset) -> None:
    world = World(dataset, OBJECTIVES["full"], SMALL_ARGUS)
    side, pack = dataset.item_side(), world.pack
    buckets = next(f for f in world.shape.context if f.name == "time_gap").num_ids - 1
    for event in range(int(pack.cu_seqlens[-1])):
        item = int(pack.fields["item"][event])
        expected = [world.first_row["item"] + item, world.first_row["artist"] + int(side["artist"][item])]
        expected += [-1 if tag < 0 else world.first_row["tags"] + int(tag) for tag in side["tags"][item]]
        assert world.batch.rows["item"][event].tolist() == expected
        gap = 0
        if pack.position[event]:
            gap = int(bucket_time_gap(np.diff(pack.timestamp)[event - 1 : event], buckets)[0])
        device = int(pack.fields["device"][event])
        assert world.batch.rows["context"][event].tolist() == [
            world.first_row["device"] + device,
            world.first_row["time_gap"] + gap,
        ]
    dead = slice(int(pack.cu_seqlens[-1]), None)
    for part in ("item", "feedback", "next_item"):
        assert (world.batch.rows[part][dead] == -1).all()


def test_a_target_that_nobody_knows_has_no_next_item_loss(dataset: Dataset) -> None:
    world = World(dataset, OBJECTIVES["shared, standard"], SMALL_ARGUS)
    pack, known = world.pack, world.targets()
    next_item = pack.next_fields["item"].copy()
    next_item[known[0][0]] = 0
    changed = replace(pack, next_fields={**pack.next_fields, "item": next_item})
    batch = BatchMaker(world.row_map, world.counts, world.objective, seed=SEED).make(changed)
    assert batch.columns["target_event"].tolist() == [event for event, _ in known[1:]]
    assert (batch.columns["candidate_id"] > 0).all()


def test_one_exchange_serves_all_packs(dataset: Dataset) -> None:
    first = World(dataset, OBJECTIVES["shared, standard"], SMALL_ARGUS).batch
    second = World(dataset, OBJECTIVES["per position"], SMALL_ARGUS).batch
    step = StepBatch(packs=[first, second], position={}, epochs=0.0)
    flat = step.all_rows()
    for pack, work in zip(step.packs, step.work(flat * 10), strict=True):
        assert work.pack is pack
        assert list(work.rows) == [*EVENT_PARTS, "candidates"]
        for part, rows in work.rows.items():
            assert torch.equal(rows, pack.rows[part] * 10)


@pytest.mark.parametrize("weights", [{"next_item": "none"}, {"next_item_weight": 0.0}], ids=["off", "weightless"])
def test_a_run_that_learns_nothing_is_refused(dataset: Dataset, weights: dict[str, Any]) -> None:
    world = World(dataset, OBJECTIVES["feedback alone"], {**SMALL_ARGUS, "feedback_heads": []})
    with pytest.raises(UserError, match="nothing is learned"):
        Objective([world.model], ObjectiveConfig(**weights), world.shape.feedback_heads, device=torch.device("cpu"))
