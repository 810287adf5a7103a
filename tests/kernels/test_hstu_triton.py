"""The Triton kernels of HSTU attention against the reference: interpreted where there is no GPU, in bf16 on one."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from megarec_kernels.hstu_attention import bucket_times, hstu_attention
from megarec_kernels.hstu_attention.reference import hstu_attention_reference, time_bucket
from megarec_kernels.tiles import plan_tiles
from megarec_kernels.visibility import Visibility, candidate_suffix, contextual_prefix, semi_local
from test_attention import (
    DIVISOR,
    NUM_BUCKETS,
    SCALE,
    Inputs,
    make_inputs,
    outputs_and_gradients,
    relative_error,
)
from test_visibility import random_visibility
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")
from megarec_kernels.hstu_attention import gpu
from megarec_kernels.hstu_attention.blocks import Blocks
from megarec_kernels.hstu_attention.times import time_cells
from megarec_kernels.hstu_attention.work import Work, order_tasks, reach_of_keys

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
LENGTHS = {
    "awkward": [0, 1, 2, 63, 0, 16, 17],
    "mixed": [100, 3],
    "one user": [37],
    "all empty": [0, 0, 0],
    "nobody": [],
}
VISIBILITIES: dict[str, Callable[[Inputs], Visibility]] = {
    "candidates": lambda x: candidate_suffix(
        x["cu_seqlens"], x["cu_seqlens"].diff().clamp(max=5), group=1, num_tokens=len(x["q"])
    ),
    "candidates of two tokens": lambda x: candidate_suffix(
        x["cu_seqlens"], (x["cu_seqlens"].diff() // 2).clamp(max=3), group=2, num_tokens=len(x["q"])
    ),
    "window": lambda x: semi_local(x["cu_seqlens"], num_first=3, num_last=9, num_tokens=len(x["q"])),
    "window of one": lambda x: semi_local(x["cu_seqlens"], num_first=0, num_last=1, num_tokens=len(x["q"])),
    "prefix sees all": lambda x: contextual_prefix(x["cu_seqlens"], num_prefix=4, num_tokens=len(x["q"])),
    "any": random_visibility,
}


@pytest.fixture(autouse=True)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 16, so that a short history has several; a test may ask for others, or for those of a user."""
    rows, keys = getattr(request, "param", (16, 16))
    if rows:
        side = min(rows, keys)
        sizes = {"biases": (side, side)}

        def choose(kernel: str, *_: Any, **__: Any) -> Blocks:
            rows_and_keys = sizes.get(kernel, (rows, keys))
            return Blocks(rows=rows_and_keys[0], keys=rows_and_keys[1], num_warps=4, num_stages=1)

        monkeypatch.setattr(gpu, "choose_blocks", choose)
    yield


def attend(
    x: Inputs,
    *,
    visibility: Visibility | None = None,
    deterministic: bool = True,
    position: bool = True,
    time: bool = True,
    scale: float = SCALE,
) -> Tensor:
    moved = {name: value.to(DEVICE) for name, value in x.items()}
    plan = plan_tiles(moved["cu_seqlens"])
    buckets = bucket_times(plan, moved["timestamp"], moved["query_timestamp"], num_buckets=NUM_BUCKETS)
    out = gpu.attend(
        (moved["q"], moved["k"], moved["v"]),
        (moved["position_bias"] if position else None, moved["time_bias"] if time else None),
        (plan, buckets if time else None, visibility),
        scale=scale,
        divisor=DIVISOR,
        deterministic=deterministic,
    )
    return out.to(x["q"].device)


def reference(x: Inputs, *, visibility: Visibility | None = None, position: bool = True, time: bool = True) -> Tensor:
    kept = {
        name: value
        for name, value in x.items()
        if (position or name != "position_bias") and (time or name not in ("time_bias", "timestamp", "query_timestamp"))
    }
    nothing = sum((value * 0).sum() for value in x.values() if value.requires_grad)
    return hstu_attention_reference(**kept, scale=SCALE, divisor=DIVISOR, visibility=visibility) + nothing


def in_fp64(x: Inputs) -> Inputs:
    return {
        name: value.detach().double().requires_grad_() if value.is_floating_point() else value
        for name, value in x.items()
    }


def error_of(x: Inputs, **settings: Any) -> float:
    """The largest error of an output or a gradient, relative to the largest number of its tensor."""
    asked = {name: settings[name] for name in ("visibility", "position", "time") if name in settings}
    truth = outputs_and_gradients(lambda inputs: reference(inputs, **asked), in_fp64(x))
    found = outputs_and_gradients(lambda inputs: attend(inputs, **settings), x)
    if len(found) < len(truth):  # biases that are left out get no gradient
        truth = [value for value in truth if value.any() or not value.numel()][: len(found)]
    return relative_error(found, truth)


# A sum of n products errs by about eps sqrt(n), n <= 5000 pairs for a time bucket; scores are off by 4 eps themselves.
TOLERANCE = 1e-5


@pytest.mark.parametrize("deterministic", [True, False], ids=["two passes", "atomic"])
@pytest.mark.parametrize("name", LENGTHS)
def test_output_and_all_gradients_equal_the_reference(name: str, deterministic: bool) -> None:
    assert error_of(make_inputs(LENGTHS[name], dtype=torch.float32), deterministic=deterministic) <= TOLERANCE


@pytest.mark.parametrize("deterministic", [True, False], ids=["two passes", "atomic"])
@pytest.mark.parametrize("name", VISIBILITIES)
def test_what_is_not_seen_counts_for_nothing(name: str, deterministic: bool) -> None:
    x = make_inputs([1, 33, 0, 40], dtype=torch.float32, heads=1)
    assert error_of(x, visibility=VISIBILITIES[name](x), deterministic=deterministic) <= TOLERANCE


@pytest.mark.parametrize(("position", "time"), [(True, False), (False, True), (False, False)])
def test_each_bias_may_be_left_out(position: bool, time: bool) -> None:
    x = make_inputs([40, 5], dtype=torch.float32, heads=1)
    assert error_of(x, position=position, time=time) <= TOLERANCE


@pytest.mark.parametrize("small_blocks", [(32, 16), (16, 32)], indirect=True, ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_blocks_need_not_be_squares(small_blocks: None, masked: bool) -> None:
    x = make_inputs([70, 33], dtype=torch.float32, heads=1)
    visibility = VISIBILITIES["window"](x) if masked else None
    for deterministic in (True, False):
        assert error_of(x, visibility=visibility, deterministic=deterministic) <= TOLERANCE


@pytest.mark.parametrize("small_blocks", [(0, 0)], indirect=True, ids=["blocks of a user"])
@pytest.mark.parametrize("length", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_blocks_that_a_user_gets(small_blocks: None, length: int) -> None:
    assert error_of(make_inputs([length, 64], dtype=torch.float32, heads=1)) <= TOLERANCE


@pytest.mark.parametrize("small_blocks", [(0, 0)], indirect=True, ids=["blocks of a user"])
def test_fp16_errs_no_more_than_twice_the_eager_twin(small_blocks: None) -> None:
    x = make_inputs([100, 64, 3], dtype=torch.float16, heads=1)
    truth = outputs_and_gradients(reference, in_fp64(x))
    found, eager = outputs_and_gradients(attend, x), outputs_and_gradients(reference, x)
    assert relative_error(found[:1], truth[:1]) <= 2 * relative_error(eager[:1], truth[:1])
    assert relative_error(found[1:], truth[1:]) <= 3 * relative_error(eager[1:], truth[1:])


def test_rows_of_a_wider_tensor_are_read_where_they_are() -> None:
    x = make_inputs([20, 7], dtype=torch.float32)
    packed = torch.cat([x["v"], x["q"], x["k"]], dim=2).detach().requires_grad_()
    views = dict(zip("vqk", packed.split([4, 6, 6], dim=2), strict=True))
    assert not views["q"].is_contiguous()
    out = attend({**x, **views})
    assert torch.equal(out, attend(x))
    weights = torch.sin(torch.arange(out.numel())).view_as(out)
    (found,) = torch.autograd.grad((out * weights).sum(), [packed])
    expected = torch.autograd.grad((attend(x) * weights).sum(), [x["v"], x["q"], x["k"]])
    assert torch.equal(found, torch.cat(expected, dim=2))


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_blocks_come_by_descriptors_where_they_can(width: int, dtype: torch.dtype) -> None:
    x = make_inputs([40, 17], dtype=dtype)
    generator = torch.Generator().manual_seed(width)
    packed = torch.randn(len(x["q"]), 2, 3 * width, generator=generator).to(dtype)
    x |= {name: part.requires_grad_() for name, part in zip("vqk", packed.split(width, dim=2), strict=True)}
    assert gpu.use_tma(x["q"], x["k"], x["v"])
    truth = outputs_and_gradients(reference, in_fp64(x))
    found, eager = outputs_and_gradients(attend, x), outputs_and_gradients(reference, x)
    assert relative_error(found, truth) <= max(TOLERANCE, 3 * relative_error(eager, truth))


def test_gradients_that_come_expanded_or_unaligned() -> None:
    x = make_inputs([20, 7], dtype=torch.float32)
    x |= {name: torch.randn(len(x["q"]), 2, 16, generator=torch.Generator().manual_seed(1)) for name in "qkv"}
    x |= {name: x[name].requires_grad_() for name in "qkv"}
    whole = torch.randn(len(x["q"]), 2, 19, generator=torch.Generator().manual_seed(2))
    for grad_out in (
        torch.ones(16).expand(len(x["q"]), 2, 16),
        torch.ones(()).expand(len(x["q"]), 2, 16),
        whole[:, :, 1:17],
    ):
        names = [x[name] for name in ("q", "k", "v", "position_bias", "time_bias")]
        found = torch.autograd.grad(attend(x), names, grad_out)
        expected = torch.autograd.grad(attend(x), names, grad_out.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_same_inputs_give_the_same_bits() -> None:
    first, second = (outputs_and_gradients(attend, make_inputs([40, 9], dtype=torch.float32)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class NaNBehindVectors(TorchDispatchMode):
    """Each vector of fp32 that an operation makes lies in front of NaN."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mul.Tensor and made.dim() == 1 and made.dtype == torch.float32:
            return torch.cat([made, made.new_full((256,), math.nan)])[: len(made)]
        return made


def test_what_lies_behind_a_position_bias_does_not_leak() -> None:
    x = make_inputs([37, 20], dtype=torch.float32)
    x["position_bias"] = x["position_bias"].detach()[:37].requires_grad_()
    expected = outputs_and_gradients(reference, x)
    with NaNBehindVectors():
        found = outputs_and_gradients(attend, x)
    assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("form", ["an odd address", "one row for all tokens", "heads first", "one number"])
def test_gradients_may_lie_anyhow(form: str) -> None:
    x = make_inputs([40, 3], dtype=torch.float32)
    for name in "qkv":  # heads that the copy engine takes
        x[name] = torch.cat([x[name]] * 6, dim=2).detach()[:, :, :16].clone().requires_grad_()
    out = attend(x)
    gradient = torch.sin(torch.arange(out.numel() + 1.0))
    lying: Tensor = {
        "an odd address": gradient[1:].view_as(out),
        "one row for all tokens": gradient[: 2 * 16].view(1, 2, 16).expand_as(out),
        "heads first": gradient[1:].view(2, len(out), 16).transpose(0, 1),
        "one number": gradient[1].expand_as(out),
    }[form]
    names = ["q", "k", "v", "position_bias", "time_bias"]
    found, expected = (
        torch.autograd.grad(attend(x), [x[name] for name in names], value) for value in (lying, lying.clone())
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_dead_tokens_full_of_nan_do_not_leak(masked: bool) -> None:
    clean, poisoned = (make_inputs([20, 17], dtype=torch.float32) for _ in range(2))
    visibility = VISIBILITIES["candidates"](clean) if masked else None
    with torch.no_grad():
        for name in "qkv":
            poisoned[name][-5:] = math.nan
    results = []
    for x in (clean, poisoned):
        out = attend(x, visibility=visibility)
        grad_out = torch.ones_like(out)
        grad_out[-5:] = math.nan if x is poisoned else 0.0
        names = ["q", "k", "v", "position_bias", "time_bias"]
        results.append([out, *torch.autograd.grad(out, [x[name] for name in names], grad_out)])
    for found, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(found, expected)
    assert not results[1][0][-5:].any()


def test_what_one_history_holds_does_not_reach_another() -> None:
    x = make_inputs([19, 30], dtype=torch.float32)
    before = attend(x)
    with torch.no_grad():
        for name in "qkv":
            x[name][:19] = math.nan
    assert torch.equal(attend(x)[19:49], before[19:49])


@pytest.mark.parametrize("fault", ["scale", "a block of keys", "the bucket of a cell", "a visible query"])
def test_a_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs([40, 9], dtype=torch.float32)
    visibility = VISIBILITIES["window"](x)
    change: dict[str, Any] = {}
    if fault == "scale":
        change["scale"] = SCALE * 1.01
    elif fault == "a block of keys":
        monkeypatch.setattr("megarec_kernels.hstu_attention.work.order_tasks", lambda *a, **k: order_tasks(*a, **k)[1:])
    elif fault == "the bucket of a cell":
        monkeypatch.setattr("megarec_kernels.hstu_attention.times.time_cells", lambda n: time_cells(n).roll(4))
    else:
        monkeypatch.setattr(
            "megarec_kernels.hstu_attention.work.reach_of_keys", lambda *a, **k: reach_of_keys(*a, **k) * 0
        )
    truth = outputs_and_gradients(lambda inputs: reference(inputs, visibility=visibility), in_fp64(x))
    found = outputs_and_gradients(lambda inputs: attend(inputs, visibility=visibility, **change), x)
    # What no program wrote is what the memory held: any number, or none.
    found = [torch.where(value.isfinite(), value, 1e3) for value in found]
    assert relative_error(found, truth) > 1e-3


@pytest.mark.parametrize("num_buckets", [0, 1, 24, 69, 71, 128])
def test_the_bucket_of_every_number_of_seconds_is_found(num_buckets: int) -> None:
    octaves = (2.0 ** (torch.arange(248, dtype=torch.float64) / 8)).long()
    bounds = (0.301 * torch.arange(1, 72, dtype=torch.float64)).exp().long()
    near = torch.cat([octaves, bounds])[:, None] + torch.arange(-200, 200)
    seconds = torch.cat([near.flatten(), torch.arange(100_000), torch.tensor([2**31 - 2])]).clamp(0, 2**31 - 2)
    cells = time_cells(num_buckets)
    packed = cells[(seconds.clamp(min=1).float().view(torch.int32) >> 20).long() - (127 << 3)]
    found = (packed & 0xFFFFFFFF) + (seconds >= packed >> 32)
    assert torch.equal(found, time_bucket(seconds, num_buckets))


def test_milliseconds_are_refused() -> None:
    x = make_inputs([3], dtype=torch.float32)
    x["timestamp"] = torch.tensor([0, 1, 10**12, 0, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="timestamp"):
        attend(x)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_biases_in_parts_are_those_in_one(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs([40, 9, 33], dtype=torch.float32)
    visibility = VISIBILITIES["candidates"](x) if masked else None
    whole = outputs_and_gradients(lambda y: attend(y, visibility=visibility), x)
    monkeypatch.setattr("megarec_kernels.hstu_attention.work.MAX_SUMS", 200)
    parts = outputs_and_gradients(lambda y: attend(y, visibility=visibility), x)
    plan = plan_tiles(x["cu_seqlens"])
    cut = Work(plan, times=None, visibility=visibility).parts(2, 16)
    assert len(cut) > 2 and all(
        (part.stop - part.start) * width <= 200 or part.stop - part.start <= 2 for part, width in cut
    )
    assert relative_error(parts, whole) <= TOLERANCE


def test_timestamps_are_bucketed_once_for_all_layers() -> None:
    x = make_inputs([5, 3])
    plan = plan_tiles(x["cu_seqlens"])
    for _ in range(3):
        hstu_attention(**x, scale=SCALE, divisor=DIVISOR, plan=plan)  # type: ignore[arg-type]
    assert len(plan._made) == 1


@pytest.mark.parametrize("last_first", [True, False])
def test_tasks_are_all_blocks_once_the_heaviest_history_first(last_first: bool) -> None:
    bounds = [0, 5, 5, 40, 73]
    tasks = order_tasks(bounds, num_heads=2, block=16, last_first=last_first)
    expected = {
        (first, last - first, block, head)
        for first, last in pairwise(bounds)
        for block in range(-(-(last - first) // 16))
        for head in range(2)
    }
    assert sorted(map(tuple, tasks.tolist())) == sorted(expected)
    assert tasks[:, 1].tolist() == sorted(tasks[:, 1].tolist(), reverse=True)
    assert tasks[0].tolist() == [5, 35, 2 if last_first else 0, 0]


def test_a_query_block_is_visited_once_and_wherever_it_sees_a_key() -> None:
    x = make_inputs([1, 33, 0, 50], dtype=torch.float32)
    for visibility in (make(x) for make in VISIBILITIES.values()):
        tasks = order_tasks(x["cu_seqlens"].tolist(), num_heads=1, block=16, last_first=False)
        reach = reach_of_keys(tasks, visibility, block=16, rows=8)
        for (first, length, block, _), (a, b, c, d) in zip(tasks.tolist(), reach.tolist(), strict=True):
            assert a <= b <= c <= d <= length or a == b or c == d
            assert not set(range(a, b)) & set(range(c, d))
            for row in range(length):
                seen_before, group_first = (
                    int(y[first + row]) for y in (visibility.seen_before, visibility.group_first)
                )
                keys = range(16 * block, min(16 * block + 16, length))
                if any(j < seen_before or group_first <= j <= row for j in keys):
                    assert a <= row < b or c <= row < d


def test_what_keys_are_seen_by_is_found_without_a_look_at_every_pair() -> None:
    """Time and memory of a pack of long histories: a token with every block of keys would be 4e7 numbers."""
    cu_seqlens = torch.tensor([0, 12_000, 24_000])
    visibility = semi_local(cu_seqlens, num_first=3, num_last=100, num_tokens=24_000)
    tasks = order_tasks(cu_seqlens.tolist(), num_heads=4, block=64, last_first=False)
    largest = LargestTensor()
    with largest:
        reach = reach_of_keys(tasks, visibility, block=64, rows=64)
    assert largest.numel < 1e5 + 24_000
    assert reach[tasks[:, 2] == 5].unique(dim=0).tolist() == [[0, 0, 320, 512]]


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor has that an operation makes."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(x.numel() for x in tree_leaves(made) if isinstance(x, Tensor)), 0)
        return made


def test_a_backward_asks_the_device_nothing_that_another_layer_has_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs([20, 7], dtype=torch.float32)
    visibility, plan = VISIBILITIES["window"](x), plan_tiles(x["cu_seqlens"])
    work = Work(plan, times=None, visibility=visibility)
    work.plain_tokens(2, 16)
    work.reach_of_keys(2, 16, 16)
    monkeypatch.setattr(Tensor, "cpu", lambda _: pytest.fail("waits for the device"))
    work.plain_tokens(2, 16)
    work.reach_of_keys(2, 16, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("small_blocks", [(0, 0)], indirect=True, ids=["blocks of a user"])
@pytest.mark.parametrize("width", [32, 50, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("masked", [None, "candidates", "window", "prefix sees all"])
def test_on_a_gpu(small_blocks: None, width: int, dtype: torch.dtype, masked: str | None) -> None:
    x = make_inputs([0, 1, 63, 100, 1000, 64], dtype=dtype)
    generator = torch.Generator().manual_seed(width)
    for name in "qkv":
        values = torch.randn(len(x["q"]), 2, width, generator=generator) * width**-0.25
        x[name] = values.to(dtype).requires_grad_()
    visibility = None if masked is None else VISIBILITIES[masked](x)
    truth = outputs_and_gradients(lambda inputs: reference(inputs, visibility=visibility), in_fp64(x))
    eager = outputs_and_gradients(lambda inputs: reference(inputs, visibility=visibility), x)
    for deterministic in (True, False):
        method = partial(attend, visibility=visibility, deterministic=deterministic)
        found = [outputs_and_gradients(method, x) for _ in range(2)]
        for tensor, twin, exact in zip(found[0], eager, truth, strict=True):
            assert relative_error([tensor], [exact]) <= max(3 * relative_error([twin], [exact]), TOLERANCE)
        if deterministic:
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
