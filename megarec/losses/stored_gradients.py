"""Losses whose gradients are computed together with the loss, chunk by chunk, so that no logits outlive their chunk."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def want_gradients(*inputs: Tensor) -> bool:
    """Whether a backward can follow."""
    return torch.is_grad_enabled() and any(value.requires_grad for value in inputs)


def attach_gradients(loss: Tensor, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Tensor:
    """The scalar `loss` as a node of autograd with the known `gradients` for `inputs`."""
    return _StoredGradients.apply(loss, inputs, *gradients, *inputs)


class _StoredGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, inputs: tuple[Tensor, ...], *gradients_and_inputs: Tensor) -> Tensor:
        ctx.dtypes = [value.dtype for value in inputs]
        ctx.save_for_backward(*gradients_and_inputs[: len(inputs)])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [(stored * outer[0]).to(dtype) for stored, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return None, None, *([None] * len(gradients)), *gradients
