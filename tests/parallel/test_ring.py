"""Attention in a ring of 2, 3 and 4 ranks against the kernels of one process: output and all gradients in fp64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megarec_kernels import rectangles
from megarec_kernels.hstu_attention import bucket_times, hstu_attention
from megarec_kernels.hstu_attention import cpu as hstu
from megarec_kernels.softmax_attention import rectangle as softmax
from megarec_kernels.softmax_attention import softmax_attention
from megarec_kernels.visibility import Visibility, candidate_suffix
from torch import Tensor

from megarec.parallel.context import ring as ring_module
from megarec.parallel.context.ring import Ring
from megarec.parallel.groups import ProcessInfo, start, stop
from megarec.parallel.layout import LayoutConfig
from tests.ranks import run_ranks

T, HEADS, WIDTH, BUCKETS = 480, 1, 6, 12
PACKS: dict[str, list[int]] = {
    "mixed": [0, 1, 63, 100, 2, 0, 200, 30],
    "one user": [480],
    "short ones": [1, 2, 3] * 30,
    "nobody": [],
}
# A sum of n products errs by about eps sqrt(n); n is up to 480 keys and the bias gradients sum 1e5 pairs.
ERROR = 1e-12


def make_pack(name: str) -> tuple[dict[str, Tensor], Tensor, Visibility | None]:
    """The differentiable inputs, `cu_seqlens`, and candidates at the ends of the mixed histories."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"q": (T, HEADS, WIDTH), "k": (T, HEADS, WIDTH), "v": (T, HEADS, WIDTH)}
    shapes |= {"outer": (T, HEADS, WIDTH), "position_bias": (T,), "time_bias": (BUCKETS + 1,)}
    values = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}
    lengths = torch.tensor(PACKS[name], dtype=torch.int64)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    values["timestamp"] = torch.randint(0, 5000, (T,), generator=generator)
    values["asked"] = values["timestamp"] + 7
    number = (lengths // 8).clamp(max=5)
    visibility = candidate_suffix(cu_seqlens, number, group=2, num_tokens=T) if name == "mixed" else None
    return values, cu_seqlens, visibility


def run(attention: Callable[..., Tensor], kind: str, x: dict[str, Tensor], **settings: Any) -> list[Tensor]:
    """Output and gradients of q, k, v and the biases."""
    names = ["q", "k", "v", *(["position_bias", "time_bias"] if kind == "hstu" else [])]
    leaves = [x[name].clone().requires_grad_() for name in names]
    if kind == "hstu":
        settings |= {"divisor": 9.0, "position_bias": leaves[3], "time_bias": leaves[4]}
    out = attention(*leaves[:3], settings.pop("cu_seqlens"), scale=0.4, **settings)
    return [out.detach(), *torch.autograd.grad(out, leaves, x["outer"])]


def rounded(x: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: value.to(dtype) if n in ("q", "k", "v", "outer") else value for n, value in x.items()}


def on_one(kind: str, name: str, *, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    x, cu_seqlens, visibility = make_pack(name)
    x = rounded(x, dtype)
    settings: dict[str, Any] = {"cu_seqlens": cu_seqlens, "visibility": visibility}
    if kind == "hstu":
        return run(hstu_attention, kind, x, **settings, timestamp=x["timestamp"], query_timestamp=x["asked"])
    return run(softmax_attention, kind, x, **settings)


def on_rank(process: ProcessInfo, kind: str, name: str, fault: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """This rank's tokens, and of them what `run` gives; the gradients of biases are this rank's part of a sum."""
    if fault:
        FAULTS[fault]()
    groups = start(LayoutConfig(context=process.world), process)
    x, cu_seqlens, visibility = make_pack(name)
    ring = Ring(group=groups.context)
    plan = ring.plan(cu_seqlens, num_tokens=T, visibility=visibility)
    own = plan.shares[groups.context.rank]
    local = rounded({n: x[n][own] if n in ("q", "k", "v", "outer") else x[n] for n in x}, dtype)
    settings: dict[str, Any] = {"cu_seqlens": cu_seqlens, "plan": plan, "visibility": visibility}
    if kind == "hstu":
        settings["time_buckets"] = bucket_times(plan, x["timestamp"], x["asked"], num_buckets=BUCKETS)
    attention = ring.hstu if kind == "hstu" else ring.softmax
    first, again = (run(attention, kind, local, **settings) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # bit for bit
    stop()
    return own, first


def in_ring(kind: str, name: str, *, ranks: int, fault: str = "", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """What all ranks found, put together."""
    found = run_ranks(on_rank, ranks, kind, name, fault, dtype)
    whole = [torch.zeros(T, HEADS, WIDTH, dtype=dtype) for _ in range(4)]
    for own, values in found:
        for tensor, value in zip(whole, values, strict=False):
            tensor[own] = value
    return [*whole, *(sum(parts) for parts in zip(*(values[4:] for _, values in found), strict=True))]  # type: ignore[misc]


def error(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest, relative to the largest element of each tensor."""
    assert [value.shape for value in found] == [value.shape for value in truth]
    pairs = zip(found, truth, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("kind", ["hstu", "softmax"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_ring_equals_one_process(kind: str, ranks: int, name: str) -> None:
    assert error(in_ring(kind, name, ranks=ranks), on_one(kind, name)) <= ERROR


@pytest.mark.parametrize("kind", ["hstu", "softmax"])
def test_bf16_errs_no_more_than_twice_one_process_in_bf16(kind: str) -> None:
    truth, one = on_one(kind, "mixed"), on_one(kind, "mixed", dtype=torch.bfloat16)
    found = in_ring(kind, "mixed", ranks=3, dtype=torch.bfloat16)
    assert all(value.dtype == torch.bfloat16 for value in found[:4])
    assert 0 < error(found, truth) <= 2 * error(one, truth)


def skip_a_step() -> None:
    original = Ring.plan

    def plan(self: Ring, *args: Any, **settings: Any) -> ring_module.RingPlan:
        whole = original(self, *args, **settings)
        return replace(whole, steps=(whole.steps[0], range(0), *whole.steps[2:]))

    Ring.plan = plan  # type: ignore[method-assign]


def count_distances_from_rows() -> None:
    def distance(self: rectangles.Rectangle, _: Any, block: tuple[int, int, int]) -> Tensor:
        first, last, num_keys = block
        rows = torch.arange(first, last)[:, None] - torch.arange(num_keys)
        return rows.clamp_(min=0).expand(self.num_users, -1, -1)

    rectangles.Rectangle.distance = distance  # type: ignore[method-assign]


def add_without_merging() -> None:
    def add(merged: tuple[Tensor, Tensor], inputs: Any, parts: Any, **settings: Any) -> None:
        own = torch.zeros_like(merged[0]), torch.full_like(merged[1], -torch.inf)
        original(own, inputs, parts, **settings)
        merged[0].add_(own[0])
        merged[1].copy_(torch.logaddexp(*(x[1] for x in (merged, own))))

    original = softmax.merge_outputs
    softmax.merge_outputs = add  # type: ignore[assignment]


def send_gradients_the_other_way() -> None:
    ranks_of = torch.distributed.get_process_group_ranks
    original = ring_module._Passing.__init__

    def send(self: Any, leaving: Any, group: Any, *, tag: int) -> None:
        turn = (lambda group: ranks_of(group)[::-1]) if tag else ranks_of
        ring_module.dist.get_process_group_ranks = turn  # type: ignore[attr-defined]
        original(self, leaving, replace(group, rank=group.size - 1 - group.rank) if tag else group, tag=tag)

    ring_module._Passing.__init__ = send  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    "a step is skipped": skip_a_step,
    "distances are counted from rows": count_distances_from_rows,
    "parts are added and not merged": add_without_merging,
    "gradients go to the rank before": send_gradients_the_other_way,
}


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("a step is skipped", "hstu"),
        ("a step is skipped", "softmax"),
        ("distances are counted from rows", "hstu"),
        ("parts are added and not merged", "softmax"),
        ("gradients go to the rank before", "hstu"),
        ("gradients go to the rank before", "softmax"),
    ],
)
def test_a_planted_fault_is_seen(fault: str, kind: str) -> None:
    assert error(in_ring(kind, "mixed", ranks=3, fault=fault), on_one(kind, "mixed")) > 1e-3


def order_of_work(process: ProcessInfo) -> list[str]:
    groups = start(LayoutConfig(context=3), process)
    log: list[str] = []

    def logged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **settings: (log.append(name), function(*args, **settings))[1]

    passing = ring_module._Passing
    passing.__init__ = logged("send", passing.__init__)  # type: ignore[method-assign]
    passing.wait = logged("wait", passing.wait)  # type: ignore[method-assign]
    hstu.attend = logged("work", hstu.attend)
    hstu.attend_backward = logged("work", hstu.attend_backward)
    x, cu_seqlens, _ = make_pack("one user")
    ring = Ring(group=groups.context)
    plan = ring.plan(cu_seqlens, num_tokens=T, visibility=None)
    local = {n: value[plan.shares[groups.context.rank]] if len(value) == T else value for n, value in x.items()}
    local |= {"position_bias": x["position_bias"]}
    settings = {"time_buckets": bucket_times(plan, x["timestamp"], x["asked"], num_buckets=BUCKETS)}
    run(ring.hstu, "hstu", local, cu_seqlens=cu_seqlens, plan=plan, **settings)
    stop()
    return log


def test_what_the_next_step_needs_travels_during_this_one() -> None:
    forward = ["send", "work", "wait", "send", "work", "wait", "work"]
    # Behind each work the sum of the step before is waited for, and the new one sent on.
    backward = ["send", "work", "send", "wait", "send", "work", "wait", "send", "wait", "work", "wait", "send", "wait"]
    assert run_ranks(order_of_work, 3) == [forward + backward] * 3
