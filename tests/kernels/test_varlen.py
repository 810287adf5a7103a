"""Softmax attention by torch's kernel for jagged histories: how it is called here, and on a GPU what it computes."""

import inspect
import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from megarec_kernels.softmax_attention import softmax_attention, varlen
from megarec_kernels.softmax_attention.reference import softmax_attention_reference
from megarec_kernels.tiles import plan_tiles
from megarec_kernels.visibility import candidate_suffix
from test_attention import LENGTHS, relative_error
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

SCALE, DEAD = 0.3, 5


class Kernel:
    """Stands for torch's: plain attention per history, which insists on what the real one needs."""

    def __init__(self) -> None:
        self.calls = 0
        self.deterministic: list[bool] = []
        self.fails = False

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float,
        window_size: tuple[int, int],
    ) -> Tensor:
        assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
        assert window_size == (-1, 0)  # all keys before, none behind
        bounds = list(pairwise(cu_seq_q.tolist()))
        assert max_q == max_k == max(last - first for first, last in bounds)
        assert len(query) == bounds[-1][1]  # rows behind the last history would come back unwritten
        self.calls += 1
        parts = [
            F.scaled_dot_product_attention(
                *(x[first:last].transpose(0, 1) for x in (query, key, value)), is_causal=True, scale=scale
            ).transpose(0, 1)
            for first, last in bounds
        ]
        out = torch.cat(parts)
        out.register_hook(self._in_backward)
        return out

    def _in_backward(self, _: Tensor) -> None:
        self.deterministic.append(torch.are_deterministic_algorithms_enabled())
        if self.fails:
            raise RuntimeError("out of memory")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    planted = Kernel()
    monkeypatch.setattr(torch_varlen, "varlen_attn", planted)
    monkeypatch.setattr(varlen, "takes", lambda _: True)
    yield planted


def make_inputs(
    lengths: list[int], *, dtype: torch.dtype = torch.float64, width: int = 8, device: str = "cpu"
) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    shape = sum(lengths) + DEAD, 2, width
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device)
    return [x.to(device, dtype).requires_grad_() for x in (q, k, v)], cu_seqlens


def outputs_and_gradients(method: Callable[..., Tensor], inputs: list[Tensor], cu_seqlens: Tensor) -> list[Tensor]:
    out = method(*inputs, cu_seqlens, scale=SCALE)
    outer = torch.sin(torch.arange(out.numel(), device=out.device)).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, outer)]


@pytest.mark.parametrize("name", LENGTHS)
def test_outputs_and_gradients_are_those_of_the_reference(kernel: Kernel, name: str) -> None:
    inputs, cu_seqlens = make_inputs(LENGTHS[name])
    found = outputs_and_gradients(softmax_attention, inputs, cu_seqlens)
    truth = outputs_and_gradients(softmax_attention_reference, inputs, cu_seqlens)
    assert relative_error(found, truth) <= 1e-13
    assert kernel.calls == (name != "all empty")


def test_dead_tokens_full_of_nan_do_not_leak(kernel: Kernel) -> None:
    clean, cu_seqlens = make_inputs(LENGTHS["awkward"])
    poisoned = [x.detach().index_fill(0, torch.arange(-DEAD, 0) + len(x), math.nan).requires_grad_() for x in clean]
    truth = outputs_and_gradients(softmax_attention, clean, cu_seqlens)
    out = softmax_attention(*poisoned, cu_seqlens, scale=SCALE)
    outer = torch.sin(torch.arange(out.numel())).view_as(out).to(out.dtype)
    outer[-DEAD:] = math.nan
    found = [out.detach(), *torch.autograd.grad(out, poisoned, outer)]
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
    assert not any(x[-DEAD:].any() for x in found)


def test_gradients_that_nobody_wants_are_left_out(kernel: Kernel) -> None:
    (q, k, v), cu_seqlens = make_inputs([7, 3])
    out = softmax_attention(q, k.detach(), v, cu_seqlens, scale=SCALE)
    truth = softmax_attention_reference(q, k.detach(), v, cu_seqlens, scale=SCALE)
    outer = torch.ones_like(out)
    found, expected = (torch.autograd.grad(x, [q, v], outer, retain_graph=True) for x in (out, truth))
    assert relative_error(list(found), list(expected)) <= 1e-13
    assert all(torch.equal(a, b) for a, b in zip(found, torch.autograd.grad(out, [q, v], outer), strict=True))


def test_the_backward_pass_is_the_deterministic_one_and_the_switch_goes_back(kernel: Kernel) -> None:
    inputs, cu_seqlens = make_inputs([7, 3])
    outputs_and_gradients(softmax_attention, inputs, cu_seqlens)
    kernel.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        outputs_and_gradients(softmax_attention, inputs, cu_seqlens)
    assert kernel.deterministic == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_visibility_and_dropout_take_another_way(kernel: Kernel) -> None:
    inputs, cu_seqlens = make_inputs([7, 3])
    suffix = candidate_suffix(cu_seqlens, torch.tensor([2, 1]), group=1, num_tokens=len(inputs[0]))
    softmax_attention(*inputs, cu_seqlens, scale=SCALE, visibility=suffix)
    softmax_attention(
        *inputs, cu_seqlens, scale=SCALE, weigh=lambda token, keys: torch.ones(len(token), 2, keys, dtype=torch.float64)
    )
    assert kernel.calls == 0


def test_a_cpu_takes_another_way() -> None:
    assert not varlen.takes(torch.zeros(1, 1, 8, dtype=torch.bfloat16))


def test_torch_takes_the_arguments() -> None:
    """What the planted kernel is called with is what the installed torch knows."""
    real, planted = (inspect.signature(x).parameters for x in (torch_varlen.varlen_attn, Kernel.__call__))
    assert [name for name in planted if name != "self" and name not in real] == []
    assert list(real)[:7] == list(planted)[1:8]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [8, 64, 128, 256])
@pytest.mark.parametrize("name", LENGTHS)
def test_on_a_gpu_it_errs_no_more_than_twice_the_eager_twin(name: str, width: int, dtype: torch.dtype) -> None:
    inputs, cu_seqlens = make_inputs(LENGTHS[name], dtype=dtype, width=width, device="cuda")
    assert varlen.takes(inputs[0])
    found = outputs_and_gradients(softmax_attention, inputs, cu_seqlens)
    again = outputs_and_gradients(softmax_attention, inputs, cu_seqlens)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    in_fp64 = [x.detach().double().requires_grad_() for x in inputs]
    truth = outputs_and_gradients(softmax_attention_reference, in_fp64, cu_seqlens)
    eager = outputs_and_gradients(softmax_attention_reference, inputs, cu_seqlens)
    assert relative_error(found[:1], truth[:1]) <= 2 * relative_error(eager[:1], truth[:1])
    assert relative_error(found[1:], truth[1:]) <= 3 * relative_error(eager[1:], truth[1:])


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait() -> None:
    inputs, cu_seqlens = make_inputs([100, 3, 64], dtype=torch.bfloat16, width=64, device="cuda")
    plan = plan_tiles(cu_seqlens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = varlen.attend_histories(*inputs, scale=SCALE, plan=plan)
        torch.autograd.grad(out.sum(), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
