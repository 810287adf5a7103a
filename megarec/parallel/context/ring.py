"""Context parallelism in a ring: a rank keeps its queries, and the keys and values of all ranks pass by.

In step s rank r works on the keys of rank r - s; meanwhile those of the next step are on their way. SiLU attention
adds the parts up; softmax attention merges them by their log-sum-exp. In the backward pass the gradients of keys and
values follow them, one step behind, and come home after the last step. A rank sends keys and values of T / cp tokens
cp - 1 times in each pass, and gradients of as many cp times in the second. Whole heads stay together, so there may be
fewer of them than ranks. The order of all sums is fixed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, starmap
from typing import Any

import torch
import torch.distributed as dist
from megarec_kernels.hstu_attention import cpu as hstu
from megarec_kernels.hstu_attention.cpu import Bias, HSTUSettings
from megarec_kernels.hstu_attention.times import TimeBuckets
from megarec_kernels.rectangles import RectanglePlan, plan_rectangles
from megarec_kernels.softmax_attention import rectangle as softmax
from megarec_kernels.tiles import heads_first, tokens_first
from megarec_kernels.visibility import Visibility
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarec.parallel.context.balance import share_tokens
from megarec.parallel.groups import Group


@dataclass(frozen=True, kw_only=True)
class RingPlan(RectanglePlan):
    """Who has which tokens of a pack, and what this rank computes in every step.

    Attributes:
        tiles: of all steps, one after the other.
        shares: `[cp, T / cp]` int64, the tokens of every rank, ascending.
        steps: the numbers of the rectangles of this rank's queries and of the keys that are here in step s.
    """

    shares: Tensor
    steps: tuple[range, ...]


@dataclass(frozen=True, kw_only=True)
class Ring:
    """The ranks of a ring, as the attention of the blocks that they share (see `parts.Attention`)."""

    group: Group

    def plan(self, cu_seqlens: Tensor, *, num_tokens: int, visibility: Visibility | None) -> RingPlan:
        """Deals the tokens out by how many keys they see."""
        size, rank = self.group.size, self.group.rank
        shares = share_tokens(_count_pairs(cu_seqlens, num_tokens, visibility), size).to(cu_seqlens.device)
        steps = [plan_rectangles(cu_seqlens, shares[rank], shares[(rank - step) % size]) for step in range(size)]
        return RingPlan(
            cu_seqlens=cu_seqlens,
            tiles=sum(steps, start=()),
            shares=shares,
            steps=tuple(starmap(range, pairwise(accumulate(map(len, steps), initial=0)))),
        )

    def hstu(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _: Tensor,
        *,
        scale: float,
        divisor: float,
        plan: RingPlan,
        position_bias: Tensor | None = None,
        time_bias: Tensor | None = None,
        time_buckets: TimeBuckets | None = None,
        visibility: Visibility | None = None,
    ) -> Tensor:
        """As `hstu_attention`, for this rank's tokens, `[T / cp, N, H]`."""
        settings = HSTUSettings(
            scale=scale, divisor=divisor, plan=plan, time_buckets=time_buckets, visibility=visibility
        )
        out: Tensor = _HSTURing.apply(q, k, v, position_bias, time_bias, settings, plan.steps, self.group)
        return out

    def softmax(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _: Tensor,
        *,
        scale: float,
        plan: RingPlan,
        visibility: Visibility | None = None,
        weigh: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Tensor:
        """As `softmax_attention`, for this rank's tokens, `[T / cp, N, H]`; has no dropout of probabilities."""
        if weigh is not None:
            raise AssertionError("attention in a ring has no dropout of probabilities")
        out: Tensor = _SoftmaxRing.apply(q, k, v, scale, plan, visibility, self.group)
        return out


class _HSTURing(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 (torch hands arguments over by position)
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_bias: Tensor | None,
        time_bias: Tensor | None,
        settings: HSTUSettings,
        steps: tuple[range, ...],
        group: Group,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, position_bias, time_bias)
        ctx.settings, ctx.steps, ctx.group = settings, steps, group
        query = heads_first(q)
        bias = Bias(position_bias, time_bias, settings, dtype=query.dtype)
        out = query.new_zeros(len(v), *v.shape[1:]).transpose(0, 1)
        for numbers, keys, values in _pass_by(steps, k, v, group):
            out += hstu.attend((query, keys, values), numbers, bias=bias)
        return tokens_first(out, q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, position_bias, time_bias = ctx.saved_tensors
        settings: HSTUSettings = ctx.settings
        query, grad_out = heads_first(q), heads_first(gradients[0])
        bias = Bias(position_bias, time_bias, settings, dtype=query.dtype)
        grad_q, home = torch.zeros_like(query), _Home(ctx.group)
        for numbers, keys, values in _pass_by(ctx.steps, k, v, ctx.group):
            own, *of_keys = hstu.attend_backward(grad_out, (query, keys, values), numbers, bias=bias)
            grad_q += own
            home.add(of_keys)
        found = (tokens_first(grad, q.dtype) for grad in (grad_q, *home.arrived()))
        return *found, *bias.gradients(), None, None, None


class _SoftmaxRing(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 (torch hands arguments over by position)
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        plan: RingPlan,
        visibility: Visibility | None,
        group: Group,
    ) -> Tensor:
        query = heads_first(q)
        merged = torch.zeros_like(query), query.new_full((*query.shape[:2], 1), -torch.inf)
        for numbers, keys, values in _pass_by(plan.steps, k, v, group):
            inputs, here = (query, keys, values), plan.tiles[numbers.start : numbers.stop]
            softmax.merge_outputs(merged, inputs, here, scale=scale, visibility=visibility)
        ctx.save_for_backward(q, k, v, *merged)
        ctx.scale, ctx.plan, ctx.visibility, ctx.group = scale, plan, visibility, group
        return tokens_first(merged[0], q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *merged = ctx.saved_tensors
        settings = {"merged": merged, "scale": ctx.scale, "visibility": ctx.visibility}
        query, grad_out = heads_first(q), heads_first(gradients[0])
        grad_q, home = torch.zeros_like(query), _Home(ctx.group)
        for numbers, keys, values in _pass_by(ctx.plan.steps, k, v, ctx.group):
            grads = grad_q, torch.zeros_like(keys), torch.zeros_like(values)
            inputs, here = (query, keys, values), ctx.plan.tiles[numbers.start : numbers.stop]
            softmax.add_gradients(grads, grad_out, inputs, here, **settings)
            home.add(grads[1:])
        found = (tokens_first(grad, q.dtype) for grad in (grad_q, *home.arrived()))
        return *found, None, None, None, None


def _pass_by(steps: tuple[range, ...], k: Tensor, v: Tensor, group: Group) -> Iterator[tuple[range, Tensor, Tensor]]:
    """For every step its rectangles, and the keys and values `[N, T / cp, H]` that are here."""
    here: tuple[Tensor, ...] = k.contiguous(), v.contiguous()
    for step, numbers in enumerate(steps, start=1):
        passing = _Passing(here, group, tag=0) if step < group.size else None
        yield numbers, heads_first(here[0]), heads_first(here[1])
        here = passing.wait() if passing else ()


class _Home:
    """Gradients of keys and values on their way home: those of the keys of step s arrive in step s + 1."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._passing: _Passing | None = None

    def add(self, grads_NTH: Sequence[Tensor]) -> None:
        """Adds this step's to what the ranks before found of the same keys, and sends the sums on."""
        grads = tuple(grad.transpose(0, 1).contiguous() for grad in grads_NTH)
        if self._passing is not None:
            grads = tuple(found + own for found, own in zip(self._passing.wait(), grads, strict=True))
        self._passing = _Passing(grads, self._group, tag=1)

    def arrived(self) -> tuple[Tensor, ...]:
        """After the last step: those of this rank's keys and values, `[N, T / cp, H]`."""
        assert self._passing is not None
        return tuple(grad.transpose(0, 1) for grad in self._passing.wait())


class _Passing:
    """Tensors on their way to the next rank, and those of the rank before on their way here."""

    def __init__(self, leaving: tuple[Tensor, ...], group: Group, *, tag: int) -> None:
        self._leaving = leaving  # kept until they are gone
        self._arriving = tuple(torch.empty_like(x) for x in leaving)
        ranks = dist.get_process_group_ranks(group.process_group)
        after, before = ranks[(group.rank + 1) % group.size], ranks[(group.rank - 1) % group.size]
        sends = [dist.P2POp(dist.isend, x, after, group.process_group, tag) for x in leaving]
        receives = [dist.P2POp(dist.irecv, x, before, group.process_group, tag) for x in self._arriving]
        self._works = dist.batch_isend_irecv([*sends, *receives])

    def wait(self) -> tuple[Tensor, ...]:
        for work in self._works:
            work.wait()
        return self._arriving


def _count_pairs(cu_seqlens: Tensor, num_tokens: int, visibility: Visibility | None) -> Tensor:
    """How many keys each token sees, `[T]`; dead ones none."""
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    history = torch.searchsorted(cu_seqlens, token, right=True) - 1
    index = token - cu_seqlens[history]
    seen = index + 1
    if visibility is not None:
        if bool(((visibility.seen_before > index + 1) & (token < cu_seqlens[-1])).any()):
            raise AssertionError("attention in a ring sees no later token")
        before = torch.minimum(visibility.seen_before, index + 1)
        seen = before + (index + 1 - torch.maximum(visibility.group_first, before)).clamp(min=0)
    return torch.where(token < cu_seqlens[-1], seen, 0).cpu()
