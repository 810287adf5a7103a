"""The loop over steps and what it is built from; what happens in a step is `step.py`, what happens between, hooks."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from megarec.base.errors import UserError
from megarec.data.dataset import Dataset
from megarec.data.stream import StreamConfig, TrainStream
from megarec.embedding.config import TableSpec
from megarec.embedding.tables import TableGroup
from megarec.models.registry import build_model, pack_flops
from megarec.models.rows import RowMap
from megarec.models.shape import InputShape, input_shape
from megarec.optim.dense import DenseOptimizer
from megarec.optim.schedule import learning_rate
from megarec.parallel.engine import transformer_config, wrap_ddp
from megarec.parallel.fp8.filling import dense_dtype, make_parts
from megarec.parallel.groups import ParallelGroups
from megarec.parallel.placement import initialize
from megarec.parallel.stages import balance_layers, cut_into_stages
from megarec.train.batches import BatchMaker, PackBatch, PackFeed, StepBatch
from megarec.train.config import TrainConfig
from megarec.train.hooks.hook import Hook
from megarec.train.objective import Objective
from megarec.train.replica import share_step
from megarec.train.step import Machinery, StepResult, train_step

MAX_SKIPPED_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one step meant, over all ranks.

    Attributes:
        num_tokens: living tokens.
        flops: model arithmetic, forward and backward.
        epoch: how often the lanes have been read from their start to their end, on average.
        waited_seconds: how long this rank waited for its packs.
    """

    num_tokens: int
    flops: float
    epoch: float
    waited_seconds: float


class Trainer:
    """A training run on this rank.

    Args:
        config: the run.
        groups: who takes part.
        dataset: what is learned from.
        hooks: what happens between steps, in order.

    Attributes:
        step: optimizer steps done.
        position: where the stream stands after those steps, for the lanes of this rank.
        shape: what the model reads and predicts.
        model: this rank's chunks of the model, without their wrappers.
        machinery: what a step works on.
        work: of the last step.
        learning_rate: of the last step.
    """

    def __init__(self, config: TrainConfig, groups: ParallelGroups, dataset: Dataset, hooks: Sequence[Hook]) -> None:
        self.config = config
        self.groups = groups
        self.dataset = dataset
        self.step = 0
        self.work = Work(num_tokens=0, flops=0.0, epoch=0.0, waited_seconds=0.0)
        self.learning_rate = 0.0
        self.shape = input_shape(dataset.fields, config.model)
        self.model, self.machinery = build_machinery(config, groups, self.shape)
        lanes = range(groups.data.rank, config.stream.lanes, groups.data.size)
        self._stream = TrainStream(dataset, stream_config(config), lanes=lanes)
        self.position: dict[str, Any] = self._stream.state()
        self._hooks = hooks
        self._skipped = 0

    @property
    def read_counts(self) -> dict[str, int]:
        """What this rank's lanes have read since the start of the run, as `TrainStream.counts`."""
        return self._stream.counts

    def restore_position(self, step: int, position: dict[str, Any]) -> None:
        """Continues after `step` steps, with the lanes where they stood then."""
        self.step = step
        self._stream.restore(position)
        self.position = self._stream.state()

    def fit(self) -> None:
        """Trains up to `config.num_steps` steps. Collective."""
        row_map = RowMap(self.shape, self.machinery.tables.first_row, self.dataset.item_side())
        maker = BatchMaker(row_map, self.dataset.item_counts(), self.config.objective, seed=self.config.seed)
        reads = self.groups.replica.rank == 0
        feed = PackFeed(self._stream, maker, depth=self.config.stream.prefetch_steps) if reads else None
        try:
            for hook in self._hooks:
                hook.start(self)
            while self.step < self.config.num_steps:
                result = self._take_step(feed)
                for hook in self._hooks:
                    hook.after_step(self, result)
            for hook in self._hooks:
                hook.finish(self)
        finally:
            if feed is not None:
                feed.close()
            self._stream.close()

    def _take_step(self, feed: PackFeed | None) -> StepResult:
        started = time.perf_counter()
        batch = share_step(feed.take() if feed is not None else None, self.groups.replica)
        waited = time.perf_counter() - started
        self.learning_rate = learning_rate(self.step, self.config.optimizer, num_steps=self.config.num_steps)
        result = train_step(self.machinery, batch, learning_rate=self.learning_rate)
        self._skipped = 0 if result.updated else self._skipped + 1
        if self._skipped == MAX_SKIPPED_STEPS:
            raise UserError(
                f"the gradient was not finite in {MAX_SKIPPED_STEPS} steps in a row, the last is {self.step + 1}",
                where=self.config.run_dir,
                fix="Lower optimizer.lr, add warm-up, or use precision=fp32",
            )
        self.step += 1
        self.position = batch.position
        self.work = self._measure(batch, waited)
        return result

    def _measure(self, batch: StepBatch, waited: float) -> Work:
        flops = float(sum(self._flops(pack) for pack in batch.packs))
        tokens = sum(pack.num_events for pack in batch.packs) * self.config.model.tokens_per_event
        tokens += sum(pack.num_windows for pack in batch.packs) * self.config.model.num_prefix_tokens
        totals = torch.tensor([float(tokens), flops, batch.epochs], dtype=torch.float64, device=self.groups.device)
        dist.all_reduce(totals, group=self.groups.data.process_group)
        epoch = float(totals[2]) / self.config.stream.lanes
        return Work(num_tokens=int(totals[0]), flops=float(totals[1]), epoch=epoch, waited_seconds=waited)

    def _flops(self, pack: PackBatch) -> int:
        num_item_vectors = len(pack.columns["candidate_id"])
        num_scores = len(pack.columns["target"]) * num_item_vectors
        if "slots" in pack.columns:
            num_scores = pack.columns["slots"].numel()
        flops = pack_flops(
            self.config.model,
            self.shape,
            pack.columns["cu_seqlens"].numpy(),
            num_item_vectors=num_item_vectors,
            num_scores=num_scores,
            num_candidates=pack.columns["num_candidates"].numpy() if "num_candidates" in pack.columns else None,
        )
        return flops.total(self.config.model.num_layers)


def build_machinery(
    config: TrainConfig, groups: ParallelGroups, shape: InputShape, *, dtype: torch.dtype | None = None
) -> tuple[nn.ModuleList, Machinery]:
    """This rank's chunks of the model with their starting weights, and everything a step works on.

    Args:
        config: the run.
        groups: who takes part.
        shape: what the model reads.
        dtype: of the dense weights and the tables, instead of what `config.precision` says: fp64 for proofs.
    """
    megatron = transformer_config(
        config.layout,
        width=config.model.width,
        num_heads=config.model.block.num_heads,
        dtype=dtype or dense_dtype(config.precision),
    )
    parts = make_parts(groups, megatron, config.precision)
    stages = cut_into_stages(config.layout, layers_per_chunk(config, shape), groups.pipeline.rank)
    chunks = [build_model(config.model, shape, parts, stage).to(groups.device) for stage in stages]
    for chunk in chunks:
        initialize(chunk, config.seed)
    wrapped = wrap_ddp(groups, chunks, megatron)
    tables = TableGroup(
        [TableSpec(name=name, num_rows=rows, init_std=config.tables.init_std) for name, rows in shape.tables.items()],
        width=config.model.table_width,
        group=groups.world,
        seed=config.seed,
        device=groups.device,
        dtype=dtype or torch.float32,
        optimizer=config.tables,
    )
    machinery = Machinery(
        groups=groups,
        chunks=wrapped,
        objective=Objective(chunks, config.objective, shape.feedback_heads, device=groups.device),
        optimizer=DenseOptimizer(groups, wrapped, config.optimizer),
        tables=tables,
        clip_norm=config.optimizer.clip_norm,
        tokens_per_pack=config.stream.tokens_per_pack,
    )
    return nn.ModuleList(chunks), machinery


def layers_per_chunk(config: TrainConfig, shape: InputShape) -> Sequence[int]:
    """How many layers each chunk holds, in the order in which a pack passes them: as set, or such that all cost alike.

    The costs are those of a pack of half-long histories.
    """
    if config.layout.layers_per_chunk is not None:
        return config.layout.layers_per_chunk
    history = max(1, config.stream.max_history_events // 2)
    num_events = config.stream.tokens_per_pack // config.model.tokens_per_event
    num_vectors = num_events + config.objective.num_uniform_negatives
    num_scores = num_events * num_vectors
    if config.objective.negatives == "per_position":
        num_vectors = num_scores = num_events * (1 + config.objective.num_uniform_negatives)
    if config.objective.next_item == "full":
        num_vectors = next(field.num_ids for field in shape.item_tower)
        num_scores = num_events * num_vectors
    flops = pack_flops(
        config.model,
        shape,
        np.arange(num_events // history + 1) * history,
        num_item_vectors=num_vectors,
        num_scores=num_scores,
    )
    return balance_layers(
        config.model.num_layers,
        config.layout.num_chunks,
        first=flops.begin / flops.layer,
        last=flops.end / flops.layer,
    )


def stream_config(config: TrainConfig) -> StreamConfig:
    """The stream's settings with what the model decides filled in."""
    return replace(
        config.stream,
        tokens_per_event=config.model.tokens_per_event,
        prefix_tokens=config.model.num_prefix_tokens,
        keep_last_event=config.model.keep_last_event,
        seed=config.seed,
    )
