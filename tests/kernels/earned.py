"""A kernel may err twice as much as the plain composition in its own dtype (three times backward), from fp64 truth."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
Method = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


def draw(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, *, seed: int = 0) -> dict[str, Tensor]:
    """Leaves of normal numbers, each in the middle of memory that is NaN elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator).to(dtype)
        memory = torch.full((values.numel() + 128,), torch.nan, dtype=dtype)
        memory[64 : 64 + values.numel()] = values.flatten()
        leaves[name] = memory.to(DEVICE)[64 : 64 + values.numel()].view(shape).requires_grad_()
    return leaves


def outputs_and_gradients(method: Method, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What a method gives, and the gradients of its outputs times fixed normal numbers."""
    outputs = method(inputs)
    generator = torch.Generator().manual_seed(1)
    outer = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), outer)
    return [out.detach() for out in outputs], list(gradients)


def assert_earned(kernel: Method, plain: Method, inputs: dict[str, Tensor]) -> None:
    """Outputs and all gradients, and the same bits when run again; memory that nobody wrote is NaN."""
    truth = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch then fills what it allocates with NaN
    try:
        found, again = outputs_and_gradients(kernel, inputs), outputs_and_gradients(kernel, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    eager, exact = outputs_and_gradients(plain, inputs), outputs_and_gradients(plain, truth)
    for factor, ours, repeated, theirs, true in zip((2, 3), found, again, eager, exact, strict=True):
        for a, b, c, d in zip(ours, repeated, theirs, true, strict=True):
            assert a.dtype == c.dtype and a.shape == c.shape
            assert torch.equal(a, b)
            if a.numel():
                # Beside that, what the plain one may have been spared by luck: the last rounding of a result, and
                # the handful in fp32 in between (a mean, a root, a factor of what is kept), in units of the largest.
                allowed = factor * error(c, d) + torch.finfo(a.dtype).eps + 4 * torch.finfo(torch.float32).eps
                assert error(a, d) <= allowed, (error(a, d), allowed)


def error(found: Tensor, truth: Tensor) -> float:
    """The largest difference over the largest number; infinite where something is NaN."""
    difference = (found.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30)
    return difference.nan_to_num(nan=float("inf")).item()
