"""Where the tokens of a pack are, for both kinds of context parallelism.

Before and behind the blocks a rank has a slice of neighbouring tokens. For attention by heads it keeps the slices of
its tensor-parallel ranks inside the blocks too. For a ring the tokens change ranks once before the first block and
once behind the last, to the shares of the plan, in which every rank has as many pairs to compute.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megarec_kernels.hstu_attention import hstu_attention
from megarec_kernels.softmax_attention import softmax_attention
from torch import Tensor

from megarec.parallel.context.heads import by_heads
from megarec.parallel.context.ring import Ring, RingPlan
from megarec.parallel.groups import Group, ParallelGroups
from megarec.parallel.mcore import (
    all_to_all,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megarec.parallel.parts import Attention, plan_all_tokens
from megarec.parallel.slices import Slices


def token_parts(groups: ParallelGroups) -> dict[str, Any]:
    """The fields of `Parts` that say which tokens are where, and how attention sees all of them."""
    context, in_ring = groups.context, groups.layout.context_by == "ring" and groups.context.size > 1
    if in_ring:
        ring = Ring(group=context)
        attention = Attention(plan=ring.plan, hstu=ring.hstu, softmax=ring.softmax)
    else:
        attention = Attention(
            plan=plan_all_tokens, hstu=by_heads(hstu_attention, context), softmax=by_heads(softmax_attention, context)
        )
    return {
        "attention": attention,
        "slices": Slices(
            index=groups.slices.rank,
            count=groups.slices.size,
            gather=partial(gather_from_sequence_parallel_region, group=groups.slices.process_group),
            sum=partial(_reduce, dist.ReduceOp.SUM, groups.slices),
            max=partial(_reduce, dist.ReduceOp.MAX, groups.slices),
        ),
        "inner_rows": partial(_inner_rows, groups, in_ring=in_ring),
        "outer_rows": partial(_outer_rows, groups, in_ring=in_ring),
        "enter_blocks": partial(_enter_blocks, groups, in_ring=in_ring),
        "leave_blocks": partial(_leave_blocks, groups, in_ring=in_ring),
        "heads_size": 1 if in_ring else context.size,
        "heads_rank": 0 if in_ring else context.rank,
    }


def _inner_rows(groups: ParallelGroups, x: Tensor, plan: Any, *, in_ring: bool) -> Tensor:
    if in_ring:
        return x[plan.shares[groups.context.rank]]
    return Slices(index=groups.context.rank, count=groups.context.size).own(x)


def _outer_rows(groups: ParallelGroups, x: Tensor, plan: Any, *, in_ring: bool) -> Tensor:
    x = _inner_rows(groups, x, plan, in_ring=in_ring)
    if not groups.layout.sequence_parallel:
        return x
    return Slices(index=groups.tensor.rank, count=groups.tensor.size).own(x)


def _enter_blocks(groups: ParallelGroups, x: Tensor, plan: Any, *, in_ring: bool) -> Tensor:
    sequence_parallel = groups.layout.sequence_parallel
    if in_ring or not sequence_parallel:
        x = _gather(x, groups.tensor)
    if in_ring:
        x = _to_shares(x, plan, groups.context)
    return _scatter(x, groups.tensor) if in_ring and sequence_parallel else x


def _leave_blocks(groups: ParallelGroups, x: Tensor, plan: Any, *, in_ring: bool) -> Tensor:
    sequence_parallel = groups.layout.sequence_parallel
    if in_ring and sequence_parallel:
        x = _gather(x, groups.tensor)
    if in_ring:
        x = _to_slices(x, plan, groups.context)
    return _scatter(x, groups.tensor) if in_ring or not sequence_parallel else x


def _gather(x: Tensor, group: Group) -> Tensor:
    """Slices to all of them. Every rank computes the gradient of all, so each takes its slice of it, unsummed."""
    if group.size == 1:
        return x
    gathered: Tensor = gather_from_sequence_parallel_region(
        x, tensor_parallel_output_grad=False, group=group.process_group
    )
    return gathered


def _scatter(x: Tensor, group: Group) -> Tensor:
    if group.size == 1:
        return x
    own: Tensor = scatter_to_sequence_parallel_region(x, group=group.process_group)
    return own


def _to_shares(x: Tensor, plan: RingPlan, group: Group) -> Tensor:
    """Rows of this rank's slice of the tokens, to rows of its share; both in the order of the pack."""
    order, leaving, arriving = _moves(plan, group)
    moved: Tensor = all_to_all(group.process_group, x[order], arriving, leaving)
    return moved


def _to_slices(x: Tensor, plan: RingPlan, group: Group) -> Tensor:
    order, leaving, arriving = _moves(plan, group)
    moved: Tensor = all_to_all(group.process_group, x, leaving, arriving)
    return moved[order.argsort()]


def _moves(plan: RingPlan, group: Group) -> tuple[Tensor, list[int], list[int]]:
    """The rows of this rank's slice by the ranks they go to, how many go to each, and how many come from each."""
    size = plan.shares.shape[1]
    owner = torch.empty(plan.shares.numel(), dtype=torch.int64, device=plan.shares.device)
    owner[plan.shares.flatten()] = torch.arange(group.size, device=owner.device).repeat_interleave(size)
    goes_to = owner[group.rank * size : (group.rank + 1) * size]
    leaving = torch.bincount(goes_to, minlength=group.size).tolist()
    arriving = torch.bincount(plan.shares[group.rank] // size, minlength=group.size).tolist()
    return torch.argsort(goes_to, stable=True), leaving, arriving


def _reduce(operation: Any, group: Group, x: Tensor) -> Tensor:
    reduced = x.detach().clone()
    dist.all_reduce(reduced, op=operation, group=group.process_group)
    return reduced
