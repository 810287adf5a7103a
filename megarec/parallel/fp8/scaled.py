"""The product of a linear map in FP8, plain torch: the twin that Transformer Engine's is held against.

Per-tensor current scaling: a tensor is multiplied by `448 / amax` (e4m3; `57344 / amax` for e5m2), rounded to eight
bits, multiplied, and the product divided by both scales. Operands of the forward product are e4m3, gradients e5m2, as
in Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv 2209.05433).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MULTIPLE = 16
"""What every side of a product must be a multiple of, as on a GPU."""

ReduceAmax = Callable[[Tensor], Tensor]


def keep_amax(amax: Tensor) -> Tensor:
    """For a tensor that this rank holds whole."""
    return amax


def quantize(x: Tensor, dtype: torch.dtype, reduce_amax: ReduceAmax = keep_amax) -> tuple[Tensor, Tensor]:
    """`x` in eight bits and what to multiply it by to get `x` back.

    The scale is the largest number of `dtype` over the largest of |x|, and 1 where all of `x` is 0. An infinity or NaN
    in `x` makes every number that is computed from it NaN.

    Args:
        x: fp32 or bf16.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        reduce_amax: from the largest of |x| to that of all pieces of the tensor, where ranks share it. May be
            collective.

    Returns:
        the rounded `x * scale`, and `1 / scale`, an fp32 scalar.
    """
    finfo = torch.finfo(dtype)
    amax = reduce_amax(x.detach().abs().amax().float())
    largest_scale = torch.finfo(torch.float32).max / 4  # so that its inverse is a number too
    largest = torch.full_like(amax, finfo.max)  # a number over a tensor would be its reciprocal times the number
    scale = torch.where(amax == 0, 1.0, largest / amax).clamp(max=largest_scale)
    return (x.float() * scale).clamp(finfo.min, finfo.max).to(dtype), 1.0 / scale


class ScaledProduct(torch.autograd.Function):
    """`y = x w^T`, and its gradients, with FP8 operands, summed in fp32 and rounded to the dtype of `x` once.

    ```
    y = s_x s_w (x8 w8^T)      dx = s_g s_w (g8 w8)      dw = s_g s_x (g8^T x8)
    ```
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, reduce_amax: tuple[ReduceAmax, ReduceAmax]
    ) -> Tensor:
        """As `scaled_product`, of a matrix."""
        reduce_tokens, reduce_weight = reduce_amax
        x8, x_inverse = quantize(x, torch.float8_e4m3fn, reduce_tokens)
        w8, w_inverse = quantize(weight, torch.float8_e4m3fn, reduce_weight)
        ctx.save_for_backward(x8, x_inverse, w8, w_inverse)
        ctx.reduce_tokens, ctx.weight_dtype = reduce_tokens, weight.dtype
        return _multiply((x8, x_inverse), (w8.t(), w_inverse), x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        """From the gradient of `y` `[T, N]` to those of `x` and `weight`."""
        x8, x_inverse, w8, w_inverse = ctx.saved_tensors
        g8, g_inverse = quantize(gradient, torch.float8_e5m2, ctx.reduce_tokens)
        dx = _multiply((g8, g_inverse), (_by_columns(w8), w_inverse), gradient.dtype)
        dw = _multiply((g8.t().contiguous(), g_inverse), (_by_columns(x8), x_inverse), ctx.weight_dtype)
        return dx, dw, None


def scaled_product(
    x: Tensor, weight: Tensor, *, reduce_tokens: ReduceAmax = keep_amax, reduce_weight: ReduceAmax = keep_amax
) -> Tensor:
    """`x w^T` in FP8, with gradients in FP8.

    Args:
        x: `[*, K]`, fp32 or bf16.
        weight: `[N, K]`, of the same dtype.
        reduce_tokens: as `reduce_amax` of `quantize`, for `x` and for the gradient of the result.
        reduce_weight: likewise for `weight`.

    Returns:
        `[*, N]` in the dtype of `x`.

    Raises:
        ValueError: a side of the product, the number of tokens among them, is not a multiple of 16.
    """
    rows = x.reshape(-1, x.shape[-1])
    if any(size % MULTIPLE for size in (*rows.shape, *weight.shape)):
        raise ValueError(
            f"{tuple(rows.shape)} times {tuple(weight.shape)} transposed: no FP8, a size is no multiple of {MULTIPLE}"
        )
    result: Tensor = ScaledProduct.apply(rows, weight, (reduce_tokens, reduce_weight))
    return result.view(*x.shape[:-1], len(weight))


def multiply_fp8(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """The product of two pairs of `quantize`, by torch's FP8 product: on a GPU, by its FP8 units.

    On a CPU two operands in e4m3 take a hundred times as long as they should (measured with torch 2.13: 25 ms for
    128 x 64 x 32).
    """
    (a, a_inverse), (b, b_inverse) = one, other
    return torch._scaled_mm(a, b, scale_a=a_inverse, scale_b=b_inverse, out_dtype=dtype)


def multiply_fp32(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """The same in fp32, in which numbers of eight bits and their products are exact."""
    (a, a_inverse), (b, b_inverse) = one, other
    return (a.float() @ b.float() * a_inverse * b_inverse).to(dtype)


def _multiply(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    return (multiply_fp8 if one[0].is_cuda else multiply_fp32)(one, other, dtype)


def _by_columns(x: Tensor) -> Tensor:
    """The same matrix with its columns in a row in memory, as a GPU wants the second operand."""
    return x.t().contiguous().t()
