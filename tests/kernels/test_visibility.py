"""Both attentions where a token does not see everything before it: candidates, and any other visibility."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from megarec_kernels import tiles
from megarec_kernels.hstu_attention import hstu_attention
from megarec_kernels.hstu_attention.reference import hstu_attention_reference
from megarec_kernels.softmax_attention import softmax_attention
from megarec_kernels.softmax_attention.reference import softmax_attention_reference
from megarec_kernels.softmax_attention.sdpa import attend_tiles
from megarec_kernels.visibility import Visibility, candidate_suffix, contextual_prefix, semi_local
from test_attention import (
    DIVISOR,
    RELATIVE_ERROR,
    SCALE,
    Inputs,
    leaves,
    make_inputs,
    outputs_and_gradients,
    relative_error,
)
from torch import Tensor

# (tokens of the history, candidates) of each user
CASES = {
    "awkward": [(0, 0), (1, 0), (0, 1), (0, 4), (5, 1), (63, 3), (64, 40), (7, 0), (3, 2)],
    "long": [(600, 130), (2, 1), (129, 128)],
    "one user": [(37, 5)],
    "candidates alone": [(0, 9), (2, 1)],  # the softmax of one key is constant: alone, its gradient is rounding
    "no candidate": [(12, 0), (130, 0), (1, 0)],
    "edges of blocks": [(128, 1), (127, 1), (126, 130), (256, 1), (120, 9)],
    "equal": [(16, 4)] * 9,
    "nobody": [],
}


def make_case(
    case: list[tuple[int, int]], group: int, *, dtype: torch.dtype = torch.float64
) -> tuple[Inputs, Visibility]:
    x = make_inputs([history + candidates * group for history, candidates in case], dtype=dtype)
    number = torch.tensor([candidates for _, candidates in case], dtype=torch.int64)
    return x, candidate_suffix(x["cu_seqlens"], number, group=group, num_tokens=len(x["q"]))


def random_visibility(x: Inputs) -> Visibility:
    """Any that is allowed, and tokens that see themselves alone."""
    generator = torch.Generator().manual_seed(7)
    index = torch.cat([torch.arange(b - a) for a, b in pairwise([*x["cu_seqlens"].tolist(), len(x["q"])])])

    def below(bound: Tensor) -> Tensor:
        return (torch.rand(len(bound), generator=generator, dtype=torch.float64) * bound).long()

    lonely = torch.rand(len(index), generator=generator) < 0.2
    return Visibility(
        seen_before=below(index + 2).masked_fill(lonely, 0),
        group_first=torch.where(lonely, index, below(index + 1)),
        place=below(torch.full_like(index, 200)),
    )


def hstu(x: Inputs, visibility: Visibility) -> Tensor:
    return hstu_attention(**x, scale=SCALE, divisor=DIVISOR, visibility=visibility)


def hstu_twin(x: Inputs, visibility: Visibility) -> Tensor:
    return hstu_attention_reference(**x, scale=SCALE, divisor=DIVISOR, visibility=visibility)


def softmax(x: Inputs, visibility: Visibility) -> Tensor:
    return softmax_attention(x["q"], x["k"], x["k"] * 2 + 1, x["cu_seqlens"], scale=SCALE, visibility=visibility)


def softmax_off_the_cpu(x: Inputs, visibility: Visibility) -> Tensor:
    plan = tiles.plan_tiles(x["cu_seqlens"])
    return attend_tiles(x["q"], x["k"], x["k"] * 2 + 1, scale=SCALE, plan=plan, visibility=visibility)


def softmax_twin(x: Inputs, visibility: Visibility) -> Tensor:
    values = x["k"] * 2 + 1
    return softmax_attention_reference(x["q"], x["k"], values, x["cu_seqlens"], scale=SCALE, visibility=visibility)


Method = Callable[[Inputs, Visibility], Tensor]
METHODS: dict[str, tuple[Method, Method]] = {
    "hstu": (hstu, hstu_twin),
    "softmax": (softmax, softmax_twin),
    "softmax off the CPU": (softmax_off_the_cpu, softmax_twin),
}


def run(method: Method, x: Inputs, visibility: Visibility) -> list[Tensor]:
    # Nothing, with a graph: a twin without users has none.
    return outputs_and_gradients(
        lambda inputs: method(inputs, visibility) + sum(i[:0].sum() for i in leaves(inputs)), x
    )


def in_fp64(x: Inputs) -> Inputs:
    return {
        name: value.detach().double().requires_grad_() if value.is_floating_point() else value
        for name, value in x.items()
    }


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_candidates_equal_the_reference(kind: str, dtype: torch.dtype, group: int, name: str) -> None:
    x, visibility = make_case(CASES[name], group, dtype=dtype)
    found, truth = run(METHODS[kind][0], x, visibility), run(METHODS[kind][1], in_fp64(x), visibility)
    assert relative_error(found, truth) <= RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_any_visibility_equals_the_reference(kind: str, name: str) -> None:
    x, _ = make_case(CASES[name], 1)
    visibility = random_visibility(x)
    found, truth = run(METHODS[kind][0], x, visibility), run(METHODS[kind][1], x, visibility)
    assert relative_error(found, truth) <= RELATIVE_ERROR[torch.float64]


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_windows_and_prefixes_that_see_all_equal_the_reference(kind: str, name: str) -> None:
    x, _ = make_case(CASES[name], 1)
    for visibility in (
        semi_local(x["cu_seqlens"], num_first=3, num_last=40, num_tokens=len(x["q"])),
        contextual_prefix(x["cu_seqlens"], num_prefix=5, num_tokens=len(x["q"])),
    ):
        found, truth = run(METHODS[kind][0], x, visibility), run(METHODS[kind][1], x, visibility)
        assert relative_error(found, truth) <= RELATIVE_ERROR[torch.float64]


def test_windows_and_prefixes_are_what_they_say() -> None:
    cu_seqlens = torch.tensor([0, 5, 5, 7])
    window = semi_local(cu_seqlens, num_first=1, num_last=2, num_tokens=9)
    prefix = contextual_prefix(cu_seqlens, num_prefix=2, num_tokens=9)
    seen = [
        [[j for j in range(5) if j < a or g <= j <= i] for i, (a, g) in enumerate(zip(*bounds, strict=True))]
        for bounds in ((x.seen_before[:5].tolist(), x.group_first[:5].tolist()) for x in (window, prefix))
    ]
    assert seen[0] == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]
    assert seen[1] == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    for mistake in ({"num_first": -1, "num_last": 2}, {"num_first": 0, "num_last": 0}):
        with pytest.raises(ValueError, match="num_first"):
            semi_local(cu_seqlens, num_tokens=9, **mistake)
    with pytest.raises(ValueError, match="num_prefix"):
        contextual_prefix(cu_seqlens, num_prefix=-1, num_tokens=9)


@pytest.mark.parametrize("kind", METHODS)
def test_bf16_errs_no_more_than_twice_the_eager_bf16_twin(kind: str) -> None:
    x, visibility = make_case(CASES["awkward"], 2, dtype=torch.bfloat16)
    truth = run(METHODS[kind][1], in_fp64(x), visibility)
    found, eager = run(METHODS[kind][0], x, visibility), run(METHODS[kind][1], x, visibility)
    assert relative_error(found[:1], truth[:1]) <= 2 * relative_error(eager[:1], truth[:1])
    assert relative_error(found[1:], truth[1:]) <= 3 * relative_error(eager[1:], truth[1:])


def one_at_a_time(method: Method, x: Inputs, case: list[tuple[int, int]], group: int) -> Tensor:
    """Each candidate alone behind a copy of its history: `[T, N, H]`, candidates where they stand in `x`."""
    out = torch.zeros_like(method(x, causal(x)))
    for first, (history, candidates) in zip(x["cu_seqlens"].tolist(), case, strict=False):
        for candidate in range(max(candidates, 1)):
            own = torch.arange(group if candidates else 0) + history + candidate * group
            token = first + torch.cat([torch.arange(history), own])
            copy = {n: v[token] if v.shape[:1] == x["q"].shape[:1] else v for n, v in x.items()}
            copy["cu_seqlens"] = torch.tensor([0, len(token)])
            out[token] = method(copy, causal(copy))
    return out


def causal(x: Inputs) -> Visibility:
    return candidate_suffix(
        x["cu_seqlens"], torch.zeros(len(x["cu_seqlens"]) - 1, dtype=torch.int64), group=1, num_tokens=len(x["q"])
    )


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("group", [1, 2])
def test_all_candidates_in_one_pass_are_each_alone(kind: str, group: int) -> None:
    """The twins written from the mask cannot tell whether the mask is what was meant; this can."""
    x, visibility = make_case(CASES["awkward"], group)
    x = {name: value.detach() for name, value in x.items()}
    wanted = one_at_a_time(METHODS[kind][1], x, CASES["awkward"], group)
    assert relative_error([METHODS[kind][0](x, visibility)], [wanted]) <= RELATIVE_ERROR[torch.float64]


@pytest.mark.parametrize("kind", METHODS)
def test_without_candidates_it_is_causal_attention(kind: str) -> None:
    x, visibility = make_case(CASES["no candidate"], 1)

    def plain(x: Inputs, _: Visibility) -> Tensor:
        if kind == "hstu":
            return hstu_attention(**x, scale=SCALE, divisor=DIVISOR)
        return softmax_attention(x["q"], x["k"], x["k"] * 2 + 1, x["cu_seqlens"], scale=SCALE)

    assert relative_error(run(METHODS[kind][0], x, visibility), run(plain, x, visibility)) <= 1e-13


def test_gradcheck() -> None:
    x, visibility = make_case([(3, 2), (0, 2), (4, 0)], 1)
    x["position_bias"] = x["position_bias"].detach()[:5].requires_grad_()
    names = [name for name, value in x.items() if value.requires_grad]
    for method, _ in METHODS.values():
        assert torch.autograd.gradcheck(
            lambda *values, method=method: method({**x, **dict(zip(names, values, strict=True))}, visibility), leaves(x)
        )


FAULTS: dict[str, Callable[[Visibility], Visibility]] = {
    "a candidate sees those before it": lambda v: replace(v, group_first=torch.zeros_like(v.group_first)),
    "a candidate misses the newest event": lambda v: replace(
        v, seen_before=torch.where(v.seen_before == v.group_first + 1, v.seen_before, v.seen_before - 1).clamp(min=0)
    ),
    "places are counted on through the candidates": lambda v: replace(
        v, place=torch.cat([torch.arange(12), torch.arange(len(v.place) - 12)])
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str) -> None:
    case = [(6, 3), (4, 2)]
    x, visibility = make_case(case, 2)
    x = {name: value.detach() for name, value in x.items()}
    wanted = one_at_a_time(hstu_twin, x, case, 2)
    assert relative_error([hstu(x, FAULTS[fault](visibility))], [wanted]) > 1e-3


def test_a_position_bias_needs_the_places_that_are_used_alone() -> None:
    x, visibility = make_case([(6, 30)], 1)
    x["position_bias"] = x["position_bias"].detach()[:7]
    hstu(x, visibility)
    x["position_bias"] = x["position_bias"][:6]
    with pytest.raises(ValueError, match="position_bias has 6 distances, the longest history 7 places"):
        hstu(x, visibility)


@pytest.mark.parametrize("kind", ["hstu", "softmax"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seen_before": torch.tensor([1, 4, 3])}, "more than its history"),
        ({"group_first": torch.tensor([0, 1, 3])}, "hides it from itself"),
        ({"place": torch.tensor([0, 1, -1])}, "negative"),
        ({"group_first": torch.tensor([0, -1, 2])}, "negative"),
        ({"place": torch.tensor([0, 1])}, r"place must be int64 \[T\]"),
        ({"seen_before": torch.tensor([0.0, 1.0, 2.0])}, r"seen_before must be int64 \[T\]"),
    ],
)
def test_a_wrong_visibility_is_refused(kind: str, changes: dict[str, Tensor], message: str) -> None:
    x = make_inputs([3], dead=0)
    good = Visibility(seen_before=torch.tensor([1, 2, 3]), group_first=torch.arange(3), place=torch.arange(3))
    METHODS[kind][0](x, good)
    with pytest.raises(ValueError, match=message):
        METHODS[kind][0](x, replace(good, **changes))


@pytest.mark.parametrize("number", [[3], [-1], [1, 1]])
def test_candidates_that_cannot_be_are_refused(number: list[int]) -> None:
    with pytest.raises(ValueError, match="num_candidates"):
        candidate_suffix(torch.tensor([0, 5]), torch.tensor(number), group=2, num_tokens=5)


def test_tokens_of_candidates_are_numbered_as_stated() -> None:
    """One history of two tokens with two candidates of two, one of a token alone, and two dead tokens."""
    found = candidate_suffix(torch.tensor([0, 6, 7]), torch.tensor([2, 0]), group=2, num_tokens=9)
    assert found.seen_before.tolist() == [1, 2, 2, 2, 2, 2, 1, *found.seen_before[7:].tolist()]
    assert found.group_first.tolist()[:7] == [0, 1, 2, 2, 4, 4, 0]
    assert found.place.tolist()[:7] == [0, 1, 2, 3, 2, 3, 0]
