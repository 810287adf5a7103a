"""One training step: this file alone owns its order."""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megarec.embedding.lookup import lookup
from megarec.embedding.tables import TableGroup
from megarec.optim.dense import DenseOptimizer
from megarec.parallel.engine import finalize, run_schedule
from megarec.parallel.groups import ParallelGroups
from megarec.parallel.mcore import DistributedDataParallel
from megarec.train.batches import StepBatch
from megarec.train.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Machinery:
    """What a step works on.

    Attributes:
        groups: who takes part.
        chunks: the dense weights of this stage inside Megatron-Core's DDP.
        objective: from a pack to its share of the loss.
        optimizer: of the dense weights.
        tables: the sharded embedding tables.
        clip_norm: the global gradient norm is cut to this; 0 for never.
        tokens_per_pack: the fixed size of a pack.
    """

    groups: ParallelGroups
    chunks: list[DistributedDataParallel]
    objective: Objective
    optimizer: DenseOptimizer
    tables: TableGroup
    clip_norm: float
    tokens_per_pack: int


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did, equal on every rank but for `losses`, which sum to the whole over data-parallel ranks.

    Attributes:
        losses: this replica's share of each head's mean loss, `[heads]`.
        grad_norm: the global norm before clipping, dense weights and tables together.
        updated: whether the weights changed; a norm that is not finite changes nothing.
    """

    losses: Tensor
    grad_norm: float
    updated: bool


def train_step(machinery: Machinery, batch: StepBatch, *, learning_rate: float) -> StepResult:
    """Runs forward, backward and update of one global batch. Collective.

    Args:
        machinery: what is trained.
        batch: the packs of this rank's replica.
        learning_rate: of this step.
    """
    m = machinery
    batch = m.objective.share_of(batch)
    fetched = m.tables.fetch(batch.all_rows().to(m.groups.device))
    counts = m.objective.count_targets(batch.packs)
    dist.all_reduce(counts, group=m.groups.world.process_group)
    reports = run_schedule(
        m.chunks,
        partial(m.objective.forward, lookup=partial(lookup, fetched), global_counts=counts),
        batch.work(fetched.index),
        tokens_per_pack=m.tokens_per_pack,
    )
    finalize(m.chunks, m.groups)
    owned = m.tables.collect_gradients(fetched)
    m.optimizer.prepare_grads()
    norm = float((m.optimizer.square_norm() + m.tables.square_norm(owned)).sqrt())
    updated = math.isfinite(norm)  # the norm is equal on every rank, so all ranks vote alike
    if updated:
        coefficient = min(1.0, m.clip_norm / (norm + 1e-6)) if m.clip_norm else 1.0
        m.optimizer.scale_grads(coefficient)
        m.optimizer.step(learning_rate)
        m.tables.update(owned, lr=learning_rate, scale=coefficient)
    m.optimizer.zero()
    losses = torch.zeros_like(counts)
    for report in reports:  # of the last stage
        losses += torch.stack([report[name] for name in m.objective.names])
    dist.all_reduce(losses, group=m.groups.replica.process_group)
    return StepResult(losses=losses, grad_norm=norm, updated=updated)
