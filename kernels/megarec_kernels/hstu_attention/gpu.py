"""HSTU attention on a CUDA device: launches the Triton kernels."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarec_kernels.hstu_attention.backward import keys_kernel, queries_kernel
from megarec_kernels.hstu_attention.blocks import Blocks, choose_blocks
from megarec_kernels.hstu_attention.forward import forward_kernel
from megarec_kernels.hstu_attention.work import Work

NUM_BUCKET_SUMS = 128  # 2^31 seconds are in bucket 71


@dataclass(frozen=True, kw_only=True)
class GpuSettings:
    """What the kernels need besides tensors with gradients.

    Attributes:
        scale: the factor of `q . k`.
        divisor: what sums are divided by.
        work: what was made once for the pack.
        deterministic: whether the gradient of queries has a pass of its own.
    """

    scale: float
    divisor: float
    work: Work
    deterministic: bool


class TritonHSTUAttention(torch.autograd.Function):
    """As `cpu.JaggedHSTUAttention`, for float32, float16 and bfloat16."""

    @staticmethod
    def forward(  # noqa: PLR0917 (torch hands arguments over by position)
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_bias: Tensor | None,
        time_bias: Tensor | None,
        settings: GpuSettings,
    ) -> Tensor:
        """The outputs, `[T, N, Hv]`."""
        ctx.save_for_backward(q, k, v, position_bias, time_bias)
        ctx.settings = settings
        return _Launch(q, k, v, position_bias, time_bias, settings=settings).forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `q`, `k`, `v` and the two biases."""
        launch = _Launch(*ctx.saved_tensors, settings=ctx.settings)
        return *launch.backward(gradients[0], wanted=ctx.needs_input_grad[3:5]), None


class _Launch:
    """The arguments that the kernels have in common."""

    def __init__(self, *tensors: Tensor | None, settings: GpuSettings) -> None:
        q, k, v, position_bias, time_bias = tensors
        assert q is not None and k is not None and v is not None
        self.settings = settings
        self.inputs = tuple(x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        self.biases = position_bias, time_bias
        self.widths = q.shape[2], _power_of_two(q.shape[2]), v.shape[2], _power_of_two(v.shape[2])
        work = settings.work
        self.has = position_bias is not None, time_bias is not None, work.seen_before is not None
        self.fast = q.dtype != torch.float32 and not triton.knobs.runtime.interpret
        self.precision = "tf32x3" if q.dtype == torch.float32 else "ieee"
        float_vectors = [q.new_zeros(1, dtype=torch.float32) if x is None else x.float() for x in self.biases]
        # Triton wants a tensor for every pointer; one that is not read may be any.
        self.facts = [
            *float_vectors,
            *(work.tasks if x is None else x for x in (work.cells, *work.token_facts)),
        ]

    def _blocks(self, kernel: Any, *, grads: bool = False) -> Blocks:
        return choose_blocks(
            kernel,
            max(self.widths[1], self.widths[3]),
            biases=self.has[0] or self.has[1],
            grads=grads,
            wide=self.inputs[0].dtype == torch.float32,
            short=self.settings.work.max_length <= 64,
        )

    def forward(self) -> Tensor:
        q, k, v = self.inputs
        blocks = self._blocks("forward")
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        tasks, _ = self.settings.work.tasks_of_queries(q.shape[1], blocks)
        if len(tasks):
            forward_kernel[(len(tasks),)](
                q, k, v, out, tasks, *self.facts,
                *_strides(q, k, v, out),
                self.settings.scale, 1.0 / self.settings.divisor,
                WIDTHS=self.widths, ROWS=blocks.rows, KEYS=blocks.keys, HAS=self.has, FAST=self.fast,
                PRECISION=self.precision, num_warps=blocks.num_warps, num_stages=blocks.num_stages,
            )  # fmt: skip
        return self._without_dead(out)

    def backward(self, grad_out: Tensor, *, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and of the biases that are `wanted`."""
        q = self.inputs[0]
        grad_out = grad_out if grad_out.stride(2) == 1 else grad_out.contiguous()
        grads = wanted[0] and self.has[0], wanted[1] and self.has[1]
        grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in self.inputs[1:])
        if self.settings.deterministic:
            grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            bias_sums = self._run("queries", grad_out, grad_q, grads=grads)
            self._run("keys", grad_out, grad_q, grad_k, grad_v, grads=(False, False))
        else:
            grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
            bias_sums = self._run("keys", grad_out, grad_q, grad_k, grad_v, grads=grads)
            grad_q = grad_q.mul_(self.settings.scale / self.settings.divisor).to(q.dtype)
        grad_biases = [self._bias_gradient(*x) for x in zip(bias_sums, self.biases, grads, strict=True)]
        return *(self._without_dead(x) for x in (grad_q, grad_k, grad_v)), *grad_biases

    def _run(self, kernel: Any, grad_out: Tensor, *outputs: Tensor, grads: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        """Runs a backward kernel; gives the sums of its programs for the gradients of the biases."""
        work, (q, k, v) = self.settings.work, self.inputs
        blocks = self._blocks(kernel, grads=any(grads))
        over_keys = kernel == "keys"
        tasks, spans = (work.tasks_of_keys if over_keys else work.tasks_of_queries)(q.shape[1], blocks)
        num_distances = -(-work.num_places // blocks.keys) * blocks.keys if grads[0] else 0
        position_sums = q.new_zeros(max(len(tasks), 1), max(num_distances, 1), dtype=torch.float32)
        time_sums = q.new_zeros(max(len(tasks), 1) if grads[1] else 1, NUM_BUCKET_SUMS, dtype=torch.float32)
        if len(tasks):
            flags = {"ATOMIC": not self.settings.deterministic} if over_keys else {}
            (keys_kernel if over_keys else queries_kernel)[(len(tasks),)](
                q, k, v, grad_out, *outputs, tasks, spans, *self.facts, position_sums, time_sums,
                *_strides(q, k, v, grad_out, *outputs), num_distances,
                self.settings.scale, 1.0 / self.settings.divisor,
                WIDTHS=self.widths, ROWS=blocks.rows, KEYS=blocks.keys, HAS=self.has, GRADS=grads,
                BUCKETS=NUM_BUCKET_SUMS, FAST=self.fast, PRECISION=self.precision,
                num_warps=blocks.num_warps, num_stages=blocks.num_stages, **flags,
            )  # fmt: skip
        return position_sums, time_sums

    def _bias_gradient(self, sums: Tensor, bias: Tensor | None, wanted: bool) -> Tensor | None:
        if bias is None or not wanted:
            return None
        total = sums.sum(dim=0, dtype=torch.float64) / self.settings.divisor
        gradient = torch.zeros(bias.shape, dtype=torch.float64, device=bias.device)
        shared = min(len(total), len(bias))
        gradient[:shared] = total[:shared]
        return gradient.to(bias.dtype)

    def _without_dead(self, rows: Tensor) -> Tensor:
        rows[self.settings.work.num_tokens :] = 0
        return rows


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:2])


def _power_of_two(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())
