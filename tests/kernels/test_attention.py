"""Jagged attention against dense twins written here from the equations, one pair of tokens at a time in meaning."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from megarec_kernels import tiles
from megarec_kernels.hstu_attention import bucket_times, hstu_attention
from megarec_kernels.hstu_attention.cpu import HIDDEN, Bias, HSTUSettings
from megarec_kernels.hstu_attention.reference import hstu_attention_reference
from megarec_kernels.softmax_attention import softmax_attention
from megarec_kernels.softmax_attention.reference import softmax_attention_reference
from megarec_kernels.softmax_attention.sdpa import attend_tiles
from torch import Tensor

SCALE, DIVISOR = 0.3, 17.0
MAX_POSITIONS, NUM_BUCKETS = 1003, 24
LENGTHS = {
    "awkward": [0, 1, 2, 63, 64, 65, 100, 0, 3],
    "long": [1000, 2, 129],
    "one user": [37],
    "all empty": [0, 0, 0],
    "equal": [16] * 9,
    "blocks of rows": [128, 256, 257, 127],
}
# The error of a sum of n products is about eps sqrt(n); n is up to 1000 keys and the bias gradients sum 5e5 pairs.
# Gradients of one element may cancel, so errors are relative to the largest element of the tensor.
RELATIVE_ERROR = {torch.float64: 2e-13, torch.float32: 1e-5}

Inputs = dict[str, Tensor]


def make_inputs(lengths: list[int], *, dtype: torch.dtype = torch.float64, heads: int = 2, dead: int = 5) -> Inputs:
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    total = sum(lengths) + dead

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    gaps = torch.rand(total, generator=generator, dtype=torch.float64).mul(6).exp().long()  # pairs fill all buckets
    timestamp = gaps.cumsum(0)
    return {
        "q": normal(total, heads, 6),
        "k": normal(total, heads, 6),
        "v": normal(total, heads, 4),
        "position_bias": normal(MAX_POSITIONS),
        "time_bias": normal(NUM_BUCKETS + 1),
        "timestamp": timestamp,
        "query_timestamp": timestamp + torch.randint(0, 400, (total,), generator=generator),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
    }


def hstu(x: Inputs, **changes: object) -> Tensor:
    return hstu_attention(**{**x, "scale": SCALE, "divisor": DIVISOR, **changes})  # type: ignore[arg-type]


def softmax(x: Inputs) -> Tensor:
    # The softmax kernel wants one width: keys and values share it here.
    return softmax_attention(x["q"], x["k"], x["k"] * 2 + 1, x["cu_seqlens"], scale=SCALE)


def softmax_off_the_cpu(x: Inputs) -> Tensor:
    plan = tiles.plan_tiles(x["cu_seqlens"])
    return attend_tiles(x["q"], x["k"], x["k"] * 2 + 1, scale=SCALE, plan=plan)


def dense_pairs(x: Inputs) -> tuple[Tensor, Tensor]:
    """Scores `[N, T, T]` of all pairs of tokens and which of them are allowed, without any notion of a history's
    own rectangle: an independent way to the same numbers."""
    user = torch.full((len(x["q"]),), -1)
    for number, (first, last) in enumerate(pairwise(x["cu_seqlens"].tolist())):
        user[first:last] = number
    token = torch.arange(len(user))
    allowed = (user[:, None] == user[None, :]) & (user >= 0) & (token[:, None] >= token[None, :])
    live = (user >= 0)[:, None, None]
    q, k = (torch.where(live, x[name], 0.0) for name in "qk")
    return SCALE * torch.einsum("inh,jnh->nij", q, k), allowed


def dense_hstu(x: Inputs) -> Tensor:
    scores, allowed = dense_pairs(x)
    token = torch.arange(len(allowed))
    scores = scores + x["position_bias"][(token[:, None] - token[None, :]).clamp(0, MAX_POSITIONS - 1)]
    seconds = (x["query_timestamp"][:, None] - x["timestamp"][None, :]).tolist()
    bucket = [[min(int(math.log(max(1, abs(s))) / 0.301), NUM_BUCKETS) for s in row] for row in seconds]
    scores = scores + x["time_bias"][torch.tensor(bucket)]
    weights = torch.where(allowed, scores * torch.sigmoid(scores), 0.0) / DIVISOR
    return torch.einsum("nij,jnh->inh", weights, torch.where(allowed.any(0)[:, None, None], x["v"], 0.0))


def dense_softmax(x: Inputs) -> Tensor:
    scores, allowed = dense_pairs(x)
    weights = torch.where(allowed, (scores - scores.detach().amax(dim=2, keepdim=True)).exp(), 0.0)
    weights = weights / weights.sum(dim=2, keepdim=True).clamp(min=1e-300)
    values = torch.where(allowed.any(0)[:, None, None], x["k"] * 2 + 1, 0.0)
    return torch.einsum("nij,jnh->inh", weights, values)


def jagged_twin_hstu(x: Inputs) -> Tensor:
    return hstu_attention_reference(**x, scale=SCALE, divisor=DIVISOR)


def jagged_twin_softmax(x: Inputs) -> Tensor:
    return softmax_attention_reference(x["q"], x["k"], x["k"] * 2 + 1, x["cu_seqlens"], scale=SCALE)


def leaves(x: Inputs) -> list[Tensor]:
    return [value for value in x.values() if value.requires_grad]


def outputs_and_gradients(method: Callable[[Inputs], Tensor], x: Inputs) -> list[Tensor]:
    out = method(x)
    weights = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view_as(out).to(out.dtype)
    gradients = torch.autograd.grad((out * weights).sum(), leaves(x), allow_unused=True)
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


def relative_error(found: list[Tensor], truth: list[Tensor]) -> float:
    assert [value.shape for value in found] == [value.shape for value in truth]
    errors = [
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()
        for a, b in zip(found, truth, strict=True)
        if b.numel()
    ]
    assert not any(math.isnan(error) for error in errors)
    return max(errors, default=0.0)


METHODS = {
    "hstu": (hstu, jagged_twin_hstu),
    "softmax": (softmax, jagged_twin_softmax),
    "softmax off the CPU": (softmax_off_the_cpu, jagged_twin_softmax),
}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", LENGTHS)
def test_output_and_all_gradients_equal_the_reference(kind: str, dtype: torch.dtype, name: str) -> None:
    jagged, twin = METHODS[kind]
    found = outputs_and_gradients(jagged, make_inputs(LENGTHS[name], dtype=dtype))
    in_fp64 = {
        key: value.detach().double().requires_grad_() if value.is_floating_point() else value
        for key, value in make_inputs(LENGTHS[name], dtype=dtype).items()
    }
    assert relative_error(found, outputs_and_gradients(twin, in_fp64)) <= RELATIVE_ERROR[dtype]
    assert all(value.dtype == dtype for value in found)


@pytest.mark.parametrize("kind", METHODS)
def test_a_pack_without_users_gives_zeros(kind: str) -> None:
    found = outputs_and_gradients(METHODS[kind][0], make_inputs([]))
    assert len(found[0]) == 5
    assert not any(value.any() for value in found)


@pytest.mark.parametrize(("twin", "dense"), [(jagged_twin_hstu, dense_hstu), (jagged_twin_softmax, dense_softmax)])
def test_the_reference_equals_the_equation_over_all_pairs_of_tokens(
    twin: Callable[[Inputs], Tensor], dense: Callable[[Inputs], Tensor]
) -> None:
    x = make_inputs(LENGTHS["awkward"])
    assert relative_error(outputs_and_gradients(twin, x), outputs_and_gradients(dense, x)) <= 1e-13


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_no_more_than_twice_the_eager_twin(kind: str, dtype: torch.dtype) -> None:
    jagged, twin = METHODS[kind]
    x = make_inputs(LENGTHS["awkward"], dtype=dtype)
    in_fp64 = {
        key: value.detach().double().requires_grad_() if value.is_floating_point() else value
        for key, value in x.items()
    }
    truth = outputs_and_gradients(twin, in_fp64)
    found, eager = outputs_and_gradients(jagged, x), outputs_and_gradients(twin, x)
    assert relative_error(found[:1], truth[:1]) <= 2 * relative_error(eager[:1], truth[:1])
    assert relative_error(found[1:], truth[1:]) <= 3 * relative_error(eager[1:], truth[1:])


@pytest.mark.parametrize("position", [True, False])
@pytest.mark.parametrize("time", [True, False])
def test_each_bias_may_be_left_out(position: bool, time: bool) -> None:
    x = make_inputs(LENGTHS["awkward"], heads=1)
    if not position:
        del x["position_bias"]
    if not time:
        del x["time_bias"], x["timestamp"], x["query_timestamp"]
    error = relative_error(outputs_and_gradients(hstu, x), outputs_and_gradients(jagged_twin_hstu, x))
    assert error <= RELATIVE_ERROR[torch.float64]


@pytest.mark.parametrize("kind", METHODS)
def test_inputs_and_gradients_may_lie_anyhow(kind: str) -> None:
    """q and k as parts of one tensor, as a projection gives them, and a gradient that is one number everywhere."""
    x = make_inputs(LENGTHS["long"])
    wide = torch.cat([x["q"], x["k"], x["k"]], dim=2).detach().requires_grad_()
    apart = dict(zip("qk", wide.split(6, dim=2)[:2], strict=True))
    found = torch.autograd.grad(METHODS[kind][0]({**x, **apart}).sum(), wide)[0]
    out = METHODS[kind][0](x)
    truth = torch.autograd.grad(out, [x["q"], x["k"]], torch.ones_like(out))
    assert relative_error(list(found.split(6, dim=2)[:2]), list(truth)) <= RELATIVE_ERROR[torch.float64]


def test_more_time_buckets_than_a_byte_holds() -> None:
    x = make_inputs([40, 3])
    x["time_bias"] = torch.randn(400, dtype=torch.float64, requires_grad=True)
    error = relative_error(outputs_and_gradients(hstu, x), outputs_and_gradients(jagged_twin_hstu, x))
    assert error <= RELATIVE_ERROR[torch.float64]


@pytest.mark.parametrize("kind", METHODS)
def test_gradcheck(kind: str) -> None:
    x = make_inputs([3, 0, 1, 5], dead=1)
    x["position_bias"] = x["position_bias"].detach()[:5].requires_grad_()

    def method(*values: Tensor) -> Tensor:
        names = [name for name, value in x.items() if value.requires_grad]
        return METHODS[kind][0]({**x, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(method, tuple(leaves(x)), fast_mode=False)


@pytest.mark.parametrize("kind", METHODS)
def test_dead_tokens_full_of_nan_do_not_leak(kind: str) -> None:
    clean, poisoned = make_inputs(LENGTHS["awkward"]), make_inputs(LENGTHS["awkward"])
    with torch.no_grad():
        for name in "qkv":
            poisoned[name][-5:] = math.nan
    out = METHODS[kind][0](poisoned)
    assert torch.equal(out, METHODS[kind][0](clean))
    assert not out[-5:].any()
    grad_out = torch.ones_like(out)
    grad_out[-5:] = math.nan
    poisoned_gradients = torch.autograd.grad(out, [poisoned["q"], poisoned["k"]], grad_out)
    clean_gradients = torch.autograd.grad(METHODS[kind][0](clean), [clean["q"], clean["k"]], torch.ones_like(out))
    for found, expected in zip(poisoned_gradients, clean_gradients, strict=True):
        assert torch.equal(found[:-5], expected[:-5])
    if kind == "hstu":
        assert not any(gradient[-5:].any() for gradient in poisoned_gradients)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("changed", [0, 1, 63, 64, 130, 199, 205])
def test_a_token_reaches_only_itself_and_later_tokens_of_its_own_history(kind: str, changed: int) -> None:
    lengths = [200, 10, 150]
    x = make_inputs(lengths)
    before = METHODS[kind][0](x)
    with torch.no_grad():
        for name in ("k", "v"):
            x[name][changed] += 1.0
    reached = (METHODS[kind][0](x) != before).any(dim=2).any(dim=1).nonzero().squeeze(1).tolist()
    end = 200 if changed < 200 else 210
    assert reached == list(range(changed, end))


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("threads", [1, 2])
def test_same_inputs_give_the_same_bits(kind: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (
            outputs_and_gradients(METHODS[kind][0], make_inputs([300, 7, 45, 44], dtype=torch.float32))
            for _ in range(2)
        )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_plan_and_buckets_made_once_give_the_same_bits() -> None:
    x = make_inputs(LENGTHS["awkward"])
    plan = tiles.plan_tiles(x["cu_seqlens"])
    buckets = bucket_times(plan, x["timestamp"], x["query_timestamp"], num_buckets=NUM_BUCKETS)
    shared = hstu(x, plan=plan, time_buckets=buckets, timestamp=None, query_timestamp=None)
    assert torch.equal(shared, hstu(x))


@pytest.mark.parametrize("kind", METHODS)
def test_inference_mode_gives_the_same_bits(kind: str) -> None:
    x = make_inputs(LENGTHS["awkward"])
    with torch.inference_mode():
        found = METHODS[kind][0]({name: value.clone() for name, value in x.items()})
    assert torch.equal(found, METHODS[kind][0](x))


def test_a_plan_made_in_inference_mode_knows_its_cu_seqlens() -> None:
    with torch.inference_mode():
        cu_seqlens = torch.tensor([0, 3, 5])
        plan = tiles.plan_tiles(cu_seqlens)
        assert plan.is_of(cu_seqlens)
        cu_seqlens[1] = 2
        assert not plan.is_of(cu_seqlens)


def test_nothing_that_grows_with_the_square_of_a_length_is_kept_for_the_backward() -> None:
    x = make_inputs([600, 30])
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.append(value.numel()) or value, lambda value: value
    ):
        hstu(x)
        softmax(x)
    assert max(kept) <= 2 * max(x["q"].numel(), MAX_POSITIONS)


@pytest.mark.parametrize("fault", ["sees the next token", "misses itself", "forgets the scale of the queries"])
def test_a_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_table = Bias._make_table

    def shifted(offset: int) -> Callable[..., Tensor]:
        return lambda *args: F.pad(make_table(*args), (offset, -offset), value=HIDDEN)

    x = make_inputs(LENGTHS["awkward"])
    truth = outputs_and_gradients(jagged_twin_hstu, x)
    if fault == "forgets the scale of the queries":
        monkeypatch.setattr("megarec_kernels.hstu_attention.HSTUSettings", _settings_without_scale)
    else:
        offset = 1 if fault == "sees the next token" else -1
        monkeypatch.setattr(Bias, "_make_table", shifted(offset))
    assert relative_error(outputs_and_gradients(hstu, x), truth) > 1e-3


def _settings_without_scale(**settings: object) -> object:
    return HSTUSettings(**{**settings, "scale": 1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", torch.zeros(9, 6)),
        ("q", torch.zeros(9, 2, 6, dtype=torch.int32)),
        ("k", torch.zeros(9, 2, 5, dtype=torch.float64)),
        ("k", torch.zeros(9, 2, 6, dtype=torch.float32)),
        ("v", torch.zeros(8, 2, 4, dtype=torch.float64)),
        ("v", torch.zeros(9, 2, 4, dtype=torch.float32)),
        ("cu_seqlens", torch.tensor([1, 4])),
        ("cu_seqlens", torch.tensor([0, 4, 3])),
        ("cu_seqlens", torch.tensor([0.0, 4.0])),
        ("cu_seqlens", torch.tensor([0, 10])),
        ("position_bias", torch.zeros(3)),
        ("position_bias", torch.zeros(9, 2)),
        ("time_bias", torch.zeros(0)),
        ("time_bias", torch.zeros(4, dtype=torch.int64)),
        ("timestamp", None),
        ("timestamp", torch.zeros(9)),
        ("query_timestamp", torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: Tensor | None) -> None:
    x = make_inputs([4, 0], dead=5)
    with pytest.raises(ValueError, match=name):
        hstu(x, **{name: value})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_factors_of_probabilities_may_be_of_another_dtype(dtype: torch.dtype) -> None:
    x = make_inputs([5, 3], dtype=dtype)

    def weigh(query: Tensor, num_keys: int) -> Tensor:
        return torch.full((len(query), 2, num_keys), 2.0)  # as a mask over 1 - p is

    out = softmax_attention(x["q"], x["k"], x["k"], x["cu_seqlens"], scale=SCALE, weigh=weigh)
    plain = attend_tiles(x["q"], x["k"], x["k"], scale=SCALE, plan=tiles.plan_tiles(x["cu_seqlens"]))
    assert out.dtype == dtype
    assert relative_error([out], [2 * plain]) <= 4 * torch.finfo(dtype).eps * 8**0.5


def test_softmax_refuses_values_of_another_width() -> None:
    x = make_inputs([4])
    with pytest.raises(ValueError, match="v must have the shape of q"):
        softmax_attention(x["q"], x["k"], x["v"], x["cu_seqlens"], scale=SCALE)


def test_a_plan_or_buckets_of_another_pack_are_refused() -> None:
    x = make_inputs([4, 3])
    plan = tiles.plan_tiles(torch.tensor([0, 3, 7]))
    with pytest.raises(ValueError, match="plan"):
        hstu(x, plan=plan)
    buckets = bucket_times(plan, x["timestamp"], x["query_timestamp"], num_buckets=3)
    with pytest.raises(ValueError, match="time_buckets"):
        hstu(x, time_buckets=buckets)
