"""HSTU attention on a CUDA device: launches the Triton kernels."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from megarec_kernels.hstu_attention.backward import biases_kernel, keys_kernel, queries_kernel
from megarec_kernels.hstu_attention.blocks import MAX_ROWS, SHORT, Blocks, Kernel, choose_blocks
from megarec_kernels.hstu_attention.forward import forward_kernel
from megarec_kernels.hstu_attention.times import TimeBuckets
from megarec_kernels.hstu_attention.work import Work
from megarec_kernels.tiles import TilePlan
from megarec_kernels.visibility import Visibility

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


def attend(
    inputs: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    pack: tuple[TilePlan, TimeBuckets | None, Visibility | None],
    *,
    scale: float,
    divisor: float,
    deterministic: bool,
) -> Tensor:
    """As `hstu_attention`: of q, k, v, the position and the time bias, and what is known of the pack."""
    plan, time_buckets, visibility = pack
    work = plan.once(
        ("work", time_buckets, visibility),
        lambda: Work(plan, times=None if time_buckets is None else time_buckets.of_tokens, visibility=visibility),
    )
    settings = GpuSettings(scale=scale, divisor=divisor, work=work, deterministic=deterministic)
    with torch.cuda.device_of(inputs[0]):  # Triton launches on the current device
        out: Tensor = TritonHSTUAttention.apply(*inputs, *biases, settings)
    return out


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
        self.widths = widths_of(q.shape[2], v.shape[2])
        work = settings.work
        self.has = position_bias is not None, time_bias is not None, work.seen_before is not None
        self.fast = q.dtype != torch.float32 and not triton.knobs.runtime.interpret
        self.factors = 0.5 * settings.scale, 1.0 / settings.divisor  # kernels work on halved scores
        self.tma = use_tma(*self.inputs)
        self.precision = "tf32x3" if q.dtype == torch.float32 else "ieee"
        # Queries of a block that are behind their history read distances behind the bias: those must be numbers.
        float_vectors = [
            q.new_zeros(1, dtype=torch.float32) if x is None else 0.5 * F.pad(x.float(), (0, MAX_ROWS))
            for x in self.biases
        ]
        self.facts = [*float_vectors, work.cells, *work.token_facts]

    def forward(self) -> Tensor:
        """The outputs, `[T, N, Hv]`."""
        q, k, v = self.inputs
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        blocks = self._blocks("forward")
        tasks = self.settings.work.tasks("queries", q.shape[1], blocks.rows)
        self._run(
            forward_kernel, blocks, len(tasks), q, k, v, *self._described(blocks.keys, k, v), out, tasks, *self.facts,
            *_strides(q, k, v, out), *self.factors, ROWS=blocks.rows, KEYS=blocks.keys,
        )  # fmt: skip
        return self._without_dead(out)

    def backward(self, grad_out: Tensor, *, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and of the biases that are `wanted`."""
        q, k, v = self.inputs
        work, num_heads = self.settings.work, q.shape[1]
        if grad_out.stride(2) != 1 or (self.tma and not use_tma(grad_out)):
            grad_out = grad_out.clone(memory_format=torch.contiguous_format)
        grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        deterministic = self.settings.deterministic
        if deterministic:
            grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            blocks = self._blocks("queries")
            tasks = work.tasks("queries", num_heads, blocks.rows)
            self._run(
                queries_kernel, blocks, len(tasks), q, k, v, grad_out, *self._described(blocks.keys, k, v),
                grad_q, tasks, *self.facts,
                *_strides(q, k, v, grad_out, grad_q), *self.factors, ROWS=blocks.rows, KEYS=blocks.keys,
            )  # fmt: skip
        else:
            grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        blocks = self._blocks("keys")
        tasks = work.tasks("keys", num_heads, blocks.keys)
        self._run(
            keys_kernel, blocks, len(tasks), q, k, v, grad_out, *self._described(blocks.rows, q, grad_out),
            grad_q, grad_k, grad_v, tasks,
            work.reach_of_keys(num_heads, blocks.keys, blocks.rows),
            *self.facts, *_strides(q, k, v, grad_out, grad_q, grad_k, grad_v), *self.factors,
            ROWS=blocks.rows, KEYS=blocks.keys, ATOMIC=not deterministic,
        )  # fmt: skip
        if not deterministic:
            grad_q = grad_q.mul_(self.settings.scale / self.settings.divisor).to(q.dtype)
        grads = tuple(self._without_dead(x) for x in (grad_q, grad_k, grad_v))
        return *grads, *self._bias_gradients(grad_out, (wanted[0] and self.has[0], wanted[1] and self.has[1]))

    def _bias_gradients(self, grad_out: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        if not any(wanted):
            return None, None
        q, k, v = self.inputs
        work, num_heads = self.settings.work, q.shape[1]
        blocks = self._blocks("biases")
        tasks, plain = work.tasks("queries", num_heads, blocks.rows), work.plain_tokens(num_heads, blocks.rows)
        totals = [None if bias is None else torch.zeros_like(bias, dtype=torch.float64) for bias in self.biases]
        for part, num_distances in work.parts(num_heads, blocks.rows):
            num_programs, width = part.stop - part.start, num_distances if wanted[0] else 0
            position_sums = q.new_zeros(num_programs, width, dtype=torch.float32)
            time_sums = q.new_empty(num_programs, NUM_BUCKET_SUMS if wanted[1] else 0, dtype=torch.float32)
            self._run(
                biases_kernel, blocks, num_programs, q, k, v, grad_out, *self._described(blocks.keys, k, v),
                position_sums, time_sums, tasks[part], plain[part] if self.has[2] else plain, *self.facts,
                *_strides(q, k, v, grad_out), width, self.factors[0],
                SIDE=blocks.rows, GRADS=wanted, BUCKETS=NUM_BUCKET_SUMS,
            )  # fmt: skip
            for total, sums in zip(totals, (position_sums, time_sums), strict=True):
                if total is not None:
                    shared = min(len(total), sums.shape[1])
                    total[:shared] += sums[:, :shared].sum(dim=0, dtype=torch.float64)
        position, time = (
            (total / self.settings.divisor).to(bias.dtype) if total is not None and bias is not None and want else None
            for total, bias, want in zip(totals, self.biases, wanted, strict=True)
        )
        return position, time

    def _blocks(self, kernel: Kernel) -> Blocks:
        return choose_blocks(
            kernel,
            max(self.widths[1], self.widths[3]),
            biases=self.has[0] or self.has[1],
            wide=self.inputs[0].dtype == torch.float32,
            short=self.settings.work.max_length <= SHORT,
            atomic=not self.settings.deterministic,
        )

    def _run(self, kernel: Any, blocks: Blocks, num_programs: int, *arguments: Any, **constants: Any) -> None:
        if num_programs:
            kernel[(num_programs,)](
                *arguments, WIDTHS=self.widths, HAS=self.has, TMA=self.tma, FAST=self.fast, PRECISION=self.precision,
                num_warps=blocks.num_warps, num_stages=blocks.num_stages, **constants,
            )  # fmt: skip

    def _described(self, rows: int, *tensors: Tensor) -> list[TensorDescriptor | None]:
        """Descriptors by which the copy engine brings blocks of `rows` rows of a head, `[T, N H]` with gaps between."""
        if not self.tma:
            return [None] * len(tensors)
        return [
            TensorDescriptor(
                x, [len(x), (x.shape[1] - 1) * x.stride(1) + x.shape[2]], [x.stride(0), 1], [rows, x.shape[2]]
            )
            for x in tensors
        ]

    def _without_dead(self, rows: Tensor) -> Tensor:
        rows[self.settings.work.num_tokens :] = 0
        return rows


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:2])


def use_tma(*tensors: Tensor) -> bool:
    """Whether the copy engine can bring blocks of these tensors.

    It wants addresses that are multiples of 16 bytes, and rows of all heads that do not overlap. Heads whose width is
    no power of two are read with the neighbour's channels, and so with a mask.
    """
    return all(
        x.data_ptr() % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
        and x.stride(0) >= (x.shape[1] - 1) * x.stride(1) + x.shape[2]
        and x.shape[2] >= 16
        and x.shape[2] & (x.shape[2] - 1) == 0
        and len(x) > 0
        for x in tensors
    )


def widths_of(width: int, value_width: int) -> tuple[int, int, int, int]:
    """Of a head's queries and of its values, each with the power of two, at least 16, that a block of them has."""
    powers = [max(16, 1 << (x - 1).bit_length()) for x in (width, value_width)]
    return width, powers[0], value_width, powers[1]
