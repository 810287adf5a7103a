"""The FP8 product against its slow twin."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megarec.parallel.fp8 import scaled
from megarec.parallel.fp8.scaled import quantize, scaled_product
from tests.parallel.fp8.scaled_twin import E4M3, E5M2, LARGEST, assert_product, rounded

SHAPES = [(16, 16, 16), (32, 48, 16), (16, 32, 80), (64, 64, 64), (160, 16, 256)]


def check(rows: int, inner: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows + inner)
    x = (torch.randn(rows, inner, generator=generator) * 3).to(dtype).requires_grad_()
    weight = (torch.randn(columns, inner, generator=generator) * 0.02).to(dtype).requires_grad_()
    gradient = (torch.randn(rows, columns, generator=generator) * 1e-5).to(dtype)
    y = scaled_product(x, weight)
    y.backward(gradient)
    x8, w8, g8 = rounded(x.detach(), E4M3), rounded(weight.detach(), E4M3), rounded(gradient, E5M2)
    assert x.grad is not None and weight.grad is not None
    assert_product(y.detach(), x8, w8.t(), dtype=dtype)
    assert_product(x.grad, g8, w8, dtype=dtype)
    assert_product(weight.grad, g8.t(), x8, dtype=dtype)


PRODUCTS = {"fp8": scaled.multiply_fp8, "fp32": scaled.multiply_fp32}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_are_the_twins(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], dtype: torch.dtype, product: str
) -> None:
    monkeypatch.setattr(scaled, "_multiply", PRODUCTS[product])
    check(*shape, dtype)


@pytest.mark.parametrize(("dtype", "half_gap", "smallest"), [(E4M3, 2.0**-4, 2.0**-10), (E5M2, 2.0**-3, 2.0**-17)])
def test_eight_bits_keep_each_number_within_half_a_gap(dtype: torch.dtype, half_gap: float, smallest: float) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 7
    x8, inverse = quantize(x, dtype)
    error = (x8.double() * inverse.double() - x.double()).abs()
    assert (error <= half_gap * x.double().abs() * (1 + 1e-6) + smallest * float(inverse)).all()
    assert float(x8.double().abs().max()) == LARGEST[dtype]  # the whole range is used


def test_a_scale_is_the_quotient_itself() -> None:
    """Not the reciprocal times the number, which is another in the last bit as often as not and rounds other ways."""
    for amax in torch.rand(200, generator=torch.Generator().manual_seed(1)):
        _, inverse = quantize(amax[None], E4M3)
        assert inverse == 1.0 / torch.tensor(448.0 / float(amax)), amax


def test_of_nothing_comes_nothing() -> None:
    x, weight = torch.zeros(16, 16, requires_grad=True), torch.ones(16, 16, requires_grad=True)
    y = scaled_product(x, weight)
    y.backward(torch.zeros(16, 16))
    assert x.grad is not None and weight.grad is not None
    assert not y.any() and not x.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("tiny", [1e-38, 1e-42])
def test_tiny_numbers_stay_finite(tiny: float) -> None:
    x = torch.full((16, 16), tiny)
    x8, inverse = quantize(x, E4M3)
    assert torch.isfinite(x8.float()).all() and torch.isfinite(inverse) and inverse > 0


@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_not_finite(wrong: float) -> None:
    x = torch.ones(16, 16)
    x[3, 5] = wrong
    assert torch.isnan(scaled_product(x, torch.ones(16, 16))).all()


def test_leading_dimensions_stay() -> None:
    assert scaled_product(torch.ones(4, 8, 16), torch.ones(32, 16)).shape == (4, 8, 32)


@pytest.mark.parametrize("shape", [(15, 16, 16), (16, 24, 16), (16, 16, 8)])
def test_sizes_that_a_gpu_cannot_take_are_refused(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    with pytest.raises(ValueError, match="no multiple of 16"):
        scaled_product(torch.ones(rows, inner), torch.ones(columns, inner))


def forget_scale(x: Tensor, dtype: torch.dtype, *_: Any) -> tuple[Tensor, Tensor]:
    return quantize(x, dtype)[0], torch.ones(())


def not_transposed(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    return scaled.multiply_fp32(one, (other[0].t(), other[1]), dtype)


def gradient_in_e4m3(x: Tensor, dtype: torch.dtype, *_: Any) -> tuple[Tensor, Tensor]:
    return quantize(x, E4M3)


@pytest.mark.parametrize(
    ("name", "fault"),
    [("quantize", forget_scale), ("_multiply", not_transposed), ("quantize", gradient_in_e4m3)],
)
def test_faults_are_seen(monkeypatch: pytest.MonkeyPatch, name: str, fault: Any) -> None:
    check(64, 64, 64, torch.float32)
    monkeypatch.setattr(scaled, name, fault)
    with pytest.raises(AssertionError):
        check(64, 64, 64, torch.float32)
