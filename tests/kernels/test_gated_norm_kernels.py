"""Gated norm in Triton: on a GPU, or by its interpreter."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from earned import DEVICE, Method, assert_earned, draw
from megarec_kernels.dropout import DropoutMask
from megarec_kernels.gated_norm import Concat, Over, gated_norm
from megarec_kernels.gated_norm.reference import gated_norm_reference
from torch import Tensor

pytest.importorskip("triton")

from megarec_kernels.gated_norm.gpu import run_gated_norm

CONCATS: list[Concat] = ["none", "u_and_norm", "u_and_attention"]
OVERS: list[Over] = ["all_heads", "per_head"]
SHAPES = [(5, 2, 12), (3, 1, 20), (0, 2, 4), (63, 3, 4), (1, 4, 300)]  # tokens, heads, channels of a head


def kernel(x: dict[str, Tensor], *, statistics: bool, over: Over, **settings: object) -> tuple[Tensor, ...]:
    u = x["uvqk"][:, :, : x["attention"].shape[2]]  # a view of packed rows
    weights = x.get("scale"), x.get("shift"), *(given(x) if statistics else (None, None))
    return (run_gated_norm(u, x["attention"], weights, over=over, eps=1e-5, **settings),)  # type: ignore[arg-type]


def plain(x: dict[str, Tensor], *, statistics: bool, method=gated_norm_reference, **settings) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    u = x["uvqk"][:, :, : x["attention"].shape[2]]
    weights = x.get("scale"), x.get("shift")
    return (method(u, x["attention"], *weights, eps=1e-5, statistics=given(x) if statistics else None, **settings),)


def given(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Statistics that are not those of the heads at hand."""
    return x["mean"] * 0.1, 0.5 + x["rstd"].square()


def case(
    shape: tuple[int, int, int],
    over: Over,
    concat: Concat,
    *,
    affine: bool,
    drop: bool,
    statistics: bool,
    dtype=torch.float32,
) -> tuple[dict[str, Tensor], dict[str, object]]:
    tokens, heads, width = shape
    shapes: dict[str, tuple[int, ...]] = {"uvqk": (tokens, heads, 3 * width), "attention": (tokens, heads, width)}
    if affine:
        shapes |= dict.fromkeys(("scale", "shift"), (heads * width if over == "all_heads" else heads,))
    inputs = draw(shapes, dtype)
    if statistics:
        inputs |= draw({"mean": (tokens,), "rstd": (tokens,)}, seed=3)
    out_width = heads * width * (1 if concat == "none" else 3)
    token = torch.arange(tokens, device=DEVICE) * 1_000_003
    mask = DropoutMask(key=99, token=token, probability=0.25, num_channels=2 * out_width, first_channel=out_width)
    return inputs, {"over": over, "concat": concat, "mask": mask if drop else None, "statistics": statistics}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("concat", CONCATS)
@pytest.mark.parametrize("over", OVERS)
def test_gated_norm(shape: tuple[int, int, int], over: Over, concat: Concat) -> None:
    for affine, drop in product((False, True), repeat=2):
        inputs, settings = case(shape, over, concat, affine=affine, drop=drop, statistics=False)
        assert_earned(partial(kernel, **settings), partial(plain, **settings), inputs)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("concat", CONCATS)
def test_statistics_of_all_ranks_are_taken_and_get_gradients(concat: Concat, affine: bool) -> None:
    for shape in SHAPES:
        inputs, settings = case(shape, "all_heads", concat, affine=affine, drop=True, statistics=True)
        assert_earned(partial(kernel, **settings), partial(plain, **settings), inputs)


def test_weights_and_statistics_may_be_strided() -> None:
    u, attention = (torch.randn(6, 2, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    of_channels, of_tokens = (torch.rand(size, 2, device=DEVICE).add(0.5).unbind(1) for size in (16, 6))
    results = []
    for strided in (True, False):
        weights = [x if strided else x.contiguous() for x in (*of_channels, *of_tokens)]
        weights = [x.detach().requires_grad_() for x in weights]
        inputs = [u, attention, *weights]
        out = run_gated_norm(u, attention, tuple(weights), over="all_heads", eps=1e-6, concat="none", mask=None)
        results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_in_fp16() -> None:
    inputs, settings = case(
        (20, 2, 12), "all_heads", "u_and_norm", affine=True, drop=True, statistics=False, dtype=torch.float16
    )
    assert_earned(partial(kernel, **settings), partial(plain, **settings), inputs)


def test_many_rows_are_shared_out_and_their_sums_added_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megarec_kernels.gated_norm.gpu.MAX_PROGRAMS", 3)
    for over in OVERS:
        inputs, settings = case((700, 2, 4), over, "none", affine=True, drop=False, statistics=False)
        assert_earned(partial(kernel, **settings), partial(plain, **settings), inputs)


def swap(method: Method, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return method(x | {"scale": x["shift"], "shift": x["scale"]})


@pytest.mark.parametrize("fault", ["over", "mask", "weights", "concat"])
def test_a_planted_fault_is_caught(fault: str) -> None:
    inputs, settings = case((6, 2, 8), "per_head", "u_and_norm", affine=True, drop=True, statistics=False)
    wrong = partial(kernel, **settings)
    if fault == "mask":
        wrong = partial(kernel, **settings | {"mask": replace(settings["mask"], key=98)})
    elif fault == "concat":
        wrong = partial(kernel, **settings | {"concat": "u_and_attention"})
    elif fault == "weights":
        wrong = partial(swap, wrong)
    else:
        inputs, settings = case((6, 2, 8), "per_head", "u_and_norm", affine=False, drop=True, statistics=False)
        wrong = partial(kernel, **settings | {"over": "all_heads"})
    with pytest.raises(AssertionError):
        assert_earned(wrong, partial(plain, **settings), inputs)


def test_a_wrong_argument_is_named() -> None:
    u = torch.ones(3, 2, 4)
    settings = {"over": "per_head", "eps": 1e-5, "concat": "none"}
    with pytest.raises(ValueError, match="attention must have the shape of u"):
        gated_norm(u, u[:2], None, None, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scale must be \[2\] over per_head"):
        gated_norm(u, u, torch.ones(8), torch.ones(8), **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="statistics"):
        gated_norm(u, u, None, None, statistics=(u[:, 0, 0], u[:, 0, 0]), **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask has 4 channels"):
        mask = DropoutMask(key=1, token=torch.arange(3), probability=0.5, num_channels=4)
        gated_norm(u, u, None, None, mask=mask, **settings)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 4, 256), (40, 8, 512), (40, 8, 520), (100, 2, 25)], ids=str)
def test_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for over, concat, affine, drop in product(OVERS, CONCATS, (False, True), (False, True)):
        inputs, settings = case(shape, over, concat, affine=affine, drop=drop, statistics=False, dtype=dtype)
        assert_earned(partial(plain, method=gated_norm, **settings), partial(plain, **settings), inputs)
