"""Causal softmax attention over jagged histories by torch's own kernel for them, FlashAttention on CUDA."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarec_kernels.tiles import TilePlan

MAX_WIDTH = 256


def takes(q: Tensor) -> bool:
    """Whether torch's kernel does: CUDA from Ampere on, bf16 or fp16, heads of 8, 16, ... 256 numbers."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] % 8 == 0
        and q.shape[2] <= MAX_WIDTH
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def attend_histories(q: Tensor, k: Tensor, v: Tensor, *, scale: float, plan: TilePlan) -> Tensor:
    """As `softmax_attention`, without visibility; the host reads nothing from the device.

    The kernel leaves the outputs of dead tokens unwritten, so it is given the living ones alone.
    """
    living = (values[: plan.num_tokens] for values in (q, k, v))
    out: Tensor = _Attention.apply(*living, plan.once("int32", plan.cu_seqlens.int), plan.max_length, scale)
    return F.pad(out, (0, 0, 0, 0, 0, len(q) - plan.num_tokens))


class _Attention(torch.autograd.Function):
    """The kernel and its backward pass, in which torch is told to choose the deterministic algorithm.

    Torch adds up the gradients of queries by atomics otherwise. It asks its global switch when the backward runs, which
    is set for that long.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 (torch hands arguments over by position)
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, scale: float
    ) -> Tensor:
        # Imported here, since the module loads torch's compiler, which takes seconds.
        from torch.nn.attention.varlen import varlen_attn

        with torch.enable_grad():
            given = zip((q, k, v), ctx.needs_input_grad[:3], strict=True)
            query, key, value = (values.detach().requires_grad_(needed) for values, needed in given)
            lengths = cu_seqlens, cu_seqlens, max_length, max_length
            out = varlen_attn(query, key, value, *lengths, scale=scale, window_size=(-1, 0))
            assert isinstance(out, Tensor)  # nothing else was asked for
        ctx.inputs, ctx.out = (query, key, value), out
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [values for values in ctx.inputs if values.requires_grad]
        mode = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("error")
        try:
            found = iter(torch.autograd.grad(ctx.out, wanted, gradients[0].contiguous(), retain_graph=True))
        finally:
            torch.set_deterministic_debug_mode(mode)
        grads = (next(found) if values.requires_grad else None for values in ctx.inputs)
        return *grads, None, None, None
