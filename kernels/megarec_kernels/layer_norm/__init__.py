"""Layer norm, alone and behind a residual add."""

import torch
from torch import Tensor

from megarec_kernels.devices import has_kernel
from megarec_kernels.dropout import DropoutMask, check_mask
from megarec_kernels.layer_norm.reference import add_layer_norm_reference, layer_norm_reference

MAX_WIDTH = 8192  # a row stays in the registers of one program


def layer_norm(x: Tensor, scale: Tensor | None, shift: Tensor | None, *, eps: float) -> Tensor:
    """`(x - mean) / sqrt(variance + eps)` over the last dimension, then `scale` and `shift` if given.

    On CUDA one pass forward and one backward, sums in fp32; the gradients of `scale` and `shift` are partial sums of
    neighbouring rows, added in order: the same inputs give the same bits.

    Args:
        x: `[*, D]`.
        scale: `[D]`, or None together with `shift`.
        shift: `[D]`.
        eps: added to the variance.

    Returns:
        `[*, D]` in the dtype of `x`.

    Raises:
        ValueError: a shape is wrong; names the argument.
    """
    _check(x, scale, shift)
    if has_kernel(x, scale, shift) and x.shape[-1] <= MAX_WIDTH:
        from megarec_kernels.layer_norm.gpu import run_layer_norm

        return run_layer_norm(x, scale, shift, eps=eps)
    return layer_norm_reference(x, scale, shift, eps=eps)


def add_layer_norm(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    eps: float,
    mask: DropoutMask | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual stream `x + dropout(y)` and its `layer_norm`, in one pass each way.

    With nothing to add the stream is x, and still the backward pass adds the gradients of both in the same pass.

    Args:
        x: `[T, D]`.
        y: `[T, D]`, what is added; None: nothing.
        scale: as in `layer_norm`.
        shift: as in `layer_norm`.
        eps: added to the variance.
        mask: what is dropped of y; None: nothing.

    Returns:
        The stream and its norm, both `[T, D]`.

    Raises:
        ValueError: a shape is wrong; names the argument.
    """
    _check(x, scale, shift)
    if x.dim() != 2 or (y is not None and y.shape != x.shape):
        raise ValueError(
            f"x and y must be [T, D] alike, got {list(x.shape)} and {None if y is None else list(y.shape)}"
        )
    if mask is not None:
        if y is None:
            raise ValueError("mask is of y, which is None")
        check_mask(mask, *x.shape)
    known = mask is None or mask.starts_a_word
    if has_kernel(x, y, scale, shift) and x.shape[-1] <= MAX_WIDTH and known:
        from megarec_kernels.layer_norm.gpu import run_add_layer_norm

        return run_add_layer_norm(x, y, scale, shift, eps=eps, mask=mask)
    return add_layer_norm_reference(x, y, scale, shift, eps=eps, mask=mask)


def _check(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> None:
    if x.dim() < 1:
        raise ValueError("x must be [*, D], got a scalar")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together, or neither")
    for name, weight in (("scale", scale), ("shift", shift)):
        if weight is not None and weight.shape != torch.Size([x.shape[-1]]):
            raise ValueError(f"{name} must be [{x.shape[-1]}], the width of x, got {list(weight.shape)}")
