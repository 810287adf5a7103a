"""Context parallelism in a ring: a rank keeps its queries, and the keys and values of all ranks pass by.

In step s rank r works on the keys of rank r - s; meanwhile those of the next step are on their way. SiLU attention
adds the parts up; softmax attention merges them by their log-sum-exp. In the backward pass the gradients of keys and
values travel along with them and come home after the last step. A rank sends keys and values of T / cp tokens cp - 1
times in each pass, and gradients of as many cp times in the second. Whole heads stay together, so there may be fewer of
them than ranks. The order of all sums is fixed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megarec_kernels.hstu_attention import rectangle as hstu
from megarec_kernels.hstu_attention.rectangle import Biases, Buckets
from megarec_kernels.rectangles import Rectangle, plan_rectangles
from megarec_kernels.softmax_attention import rectangle as softmax
from megarec_kernels.tiles import heads_first, tokens_first
from megarec_kernels.visibility import Visibility
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarec.parallel.context.balance import share_tokens
from megarec.parallel.groups import Group


@dataclass(frozen=True, kw_only=True)
class RingPlan:
    """Who has which tokens of a pack, and what this rank computes in every step.

    Attributes:
        cu_seqlens: `[B + 1]`, where each history begins.
        shares: `[cp, T / cp]` int64, the tokens of every rank, ascending.
        steps: the rectangles of this rank's queries and of the keys that are here in step s.
    """

    cu_seqlens: Tensor
    shares: Tensor
    steps: tuple[tuple[Rectangle, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Ring:
    """The ranks of a ring, as the attention of the blocks that they share (see `parts.Attention`)."""

    group: Group

    def plan(self, cu_seqlens: Tensor, *, num_tokens: int, visibility: Visibility | None) -> RingPlan:
        """Deals the tokens out by how many keys they see."""
        size, rank = self.group.size, self.group.rank
        shares = share_tokens(_count_pairs(cu_seqlens, num_tokens, visibility), size).to(cu_seqlens.device)
        steps = [plan_rectangles(cu_seqlens, shares[rank], shares[(rank - step) % size]) for step in range(size)]
        return RingPlan(cu_seqlens=cu_seqlens, shares=shares, steps=tuple(steps))

    def bucket_times(
        self, plan: RingPlan, timestamp: Tensor, query_timestamp: Tensor, *, num_buckets: int
    ) -> list[Buckets]:
        """The time buckets of every step."""
        return [
            hstu.bucket_rectangles(step, timestamp, query_timestamp, num_buckets=num_buckets) for step in plan.steps
        ]

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
        time_buckets: list[Buckets] | None = None,
        visibility: Visibility | None = None,
    ) -> Tensor:
        """As `hstu_attention`, for this rank's tokens, `[T / cp, N, H]`."""
        settings = _HSTUSettings(
            group=self.group,
            plan=plan,
            visibility=visibility,
            scale=scale,
            divisor=divisor,
            buckets=time_buckets or [() for _ in plan.steps],
        )
        out: Tensor = _HSTURing.apply(q, k, v, position_bias, time_bias, settings)
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
        settings = _Settings(group=self.group, plan=plan, visibility=visibility, scale=scale)
        out: Tensor = _SoftmaxRing.apply(q, k, v, settings)
        return out


@dataclass(frozen=True, kw_only=True)
class _Settings:
    group: Group
    plan: RingPlan
    visibility: Visibility | None
    scale: float


@dataclass(frozen=True, kw_only=True)
class _HSTUSettings(_Settings):
    divisor: float
    buckets: Sequence[Buckets]


class _HSTURing(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 (torch hands arguments over by position)
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_bias: Tensor | None,
        time_bias: Tensor | None,
        settings: _HSTUSettings,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, position_bias, time_bias)
        ctx.settings = settings
        query = heads_first(q) * settings.scale
        biases = _biases(position_bias, time_bias, dtype=query.dtype)
        out = query.new_zeros(*query.shape[:2], v.shape[2])
        passing = _Passing(settings.group, (k, v))
        for rectangles, buckets in zip(settings.plan.steps, settings.buckets, strict=True):
            keys, values = passing.take()
            inputs = query, heads_first(keys), heads_first(values)
            hstu.add_outputs(out, inputs, rectangles, biases=biases, buckets=buckets, visibility=settings.visibility)
        return tokens_first(out.div_(settings.divisor), q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, position_bias, time_bias = ctx.saved_tensors
        settings: _HSTUSettings = ctx.settings
        query = heads_first(q) * settings.scale
        biases = _biases(position_bias, time_bias, dtype=query.dtype)
        grad_out = heads_first(gradients[0]) / settings.divisor
        grad_q, home = torch.zeros_like(query), _Home(settings.group, (heads_first(k), heads_first(v)))
        passing = _Passing(settings.group, (k, v))
        for rectangles, buckets in zip(settings.plan.steps, settings.buckets, strict=True):
            keys, values = passing.take()
            hstu.add_gradients(
                (grad_q, home.here[0], home.here[1]),
                grad_out,
                (query, heads_first(keys), heads_first(values)),
                rectangles,
                biases=biases,
                buckets=buckets,
                visibility=settings.visibility,
            )
            home.send_on()
        grads = (tokens_first(grad, q.dtype) for grad in (grad_q.mul_(settings.scale), *home.here))
        grad_biases = (
            None if grad is None else grad.to(bias.dtype)
            for grad, bias in ((biases.grad_position, position_bias), (biases.grad_time, time_bias))
        )
        return *grads, *grad_biases, None


class _SoftmaxRing(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 (torch hands arguments over by position)
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, settings: _Settings
    ) -> Tensor:
        query = heads_first(q) * settings.scale
        out = query.new_zeros(*query.shape[:2], v.shape[2])
        log_sum = query.new_full((*query.shape[:2], 1), float("-inf"))
        passing = _Passing(settings.group, (k, v))
        for rectangles in settings.plan.steps:
            keys, values = passing.take()
            inputs = query, heads_first(keys), heads_first(values)
            softmax.merge_outputs((out, log_sum), inputs, rectangles, settings.visibility)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.settings = settings
        return tokens_first(out, q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        settings: _Settings = ctx.settings
        query, grad_out = heads_first(q) * settings.scale, heads_first(gradients[0])
        delta = (grad_out * out).sum(2, keepdim=True)
        grad_q, home = torch.zeros_like(query), _Home(settings.group, (heads_first(k), heads_first(v)))
        passing = _Passing(settings.group, (k, v))
        for rectangles in settings.plan.steps:
            keys, values = passing.take()
            softmax.add_gradients(
                (grad_q, home.here[0], home.here[1]),
                (grad_out, delta),
                (query, heads_first(keys), heads_first(values)),
                rectangles,
                log_sum=log_sum,
                visibility=settings.visibility,
            )
            home.send_on()
        grads = (tokens_first(grad, q.dtype) for grad in (grad_q.mul_(settings.scale), *home.here))
        return *grads, None


class _Passing:
    """Keys and values on their way round: `take` gives those of the step and sends them on."""

    def __init__(self, group: Group, here: tuple[Tensor, ...]) -> None:
        self._group = group
        self._here = tuple(x.contiguous() for x in here)
        self._left = group.size - 1
        self._arriving: tuple[Tensor, ...] = ()
        self._sends: list[Any] = []

    def take(self) -> tuple[Tensor, ...]:
        for send in self._sends:
            send.wait()
        here = self._arriving or self._here
        self._sends, self._arriving = [], ()
        if self._left:
            self._left -= 1
            self._arriving, self._sends = _pass_on(here, self._group)
        return here


class _Home:
    """Gradients of the keys that are here, `here`: they follow the keys, and after as many steps as ranks are home."""

    def __init__(self, group: Group, like: tuple[Tensor, ...]) -> None:
        self._group = group
        self.here = tuple(torch.zeros_like(x) for x in like)

    def send_on(self) -> None:
        arriving, sends = _pass_on(self.here, self._group)
        for send in sends:
            send.wait()
        self.here = arriving


def _pass_on(tensors: tuple[Tensor, ...], group: Group) -> tuple[tuple[Tensor, ...], list[Any]]:
    """Begins to send tensors to the next rank and to receive those of the rank before."""
    arriving = tuple(torch.empty_like(x) for x in tensors)
    after = dist.get_global_rank(group.process_group, (group.rank + 1) % group.size)
    before = dist.get_global_rank(group.process_group, (group.rank - 1) % group.size)
    sends = [dist.P2POp(dist.isend, x, after, group.process_group) for x in tensors]
    receives = [dist.P2POp(dist.irecv, x, before, group.process_group) for x in arriving]
    return arriving, dist.batch_isend_irecv([*sends, *receives])


def _biases(position: Tensor | None, time: Tensor | None, *, dtype: torch.dtype) -> Biases:
    def sums(bias: Tensor | None) -> Tensor | None:
        return None if bias is None else torch.zeros_like(bias, dtype=torch.float64)

    return Biases(
        position=None if position is None else position.to(dtype),
        time=None if time is None else time.to(dtype),
        grad_position=sums(position),
        grad_time=sums(time),
    )


def _count_pairs(cu_seqlens: Tensor, num_tokens: int, visibility: Visibility | None) -> Tensor:
    """How many keys each token sees, `[T]`; dead ones none."""
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    history = torch.searchsorted(cu_seqlens, token, right=True) - 1
    index = token - cu_seqlens[history]
    seen = index + 1
    if visibility is not None:
        before = torch.minimum(visibility.seen_before, index + 1)
        seen = before + (index + 1 - torch.maximum(visibility.group_first, before)).clamp(min=0)
    return torch.where(token < cu_seqlens[-1], seen, 0).cpu()
