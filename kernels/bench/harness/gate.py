"""Correctness before speed: outputs and gradients of a method against the same mathematics in a wider dtype."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.bench.cases import Case, Inputs, Method, Outputs, draw_inputs

WIDER = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
    torch.float64: torch.float64,
}
FORWARD_FACTOR, BACKWARD_FACTOR = 2.0, 3.0
BASELINE_SLACK = 4.0  # a baseline is plain code itself: it sums millions of terms in another order than our plain code


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A value of the reference and how far from it a method may be, as a share of its largest element."""

    truth: Tensor
    allowed: float


def run_method(method: Method, inputs: Inputs, gradients: tuple[str, ...]) -> dict[str, Tensor]:
    """Outputs, and the gradients of the named inputs for the same gradients of the outputs in every dtype.

    Raises:
        ValueError: a gradient is missing; names it.
    """
    outputs = as_tuple(method(inputs))
    found = {f"output {i}" if len(outputs) > 1 else "output": output for i, output in enumerate(outputs)}
    if gradients:
        grads = torch.autograd.grad(
            outputs, [inputs[name] for name in gradients], upstream_gradients(outputs), allow_unused=True
        )
        for name, grad in zip(gradients, grads, strict=True):
            if grad is None:
                raise ValueError(f"gives no gradient of {name}")
            found[f"gradient of {name}"] = grad
    return {name: value.detach() for name, value in found.items()}


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """One output or several, as several."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def upstream_gradients(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Normal numbers that bfloat16 holds exactly, so that they are the same in every dtype."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [
        torch.randn(output.shape, generator=generator, device=output.device).bfloat16().to(output.dtype)
        for output in outputs
    ]


def relative_error(found: Tensor, truth: Tensor) -> float:
    """The largest difference over the largest true element; infinite for other shapes and for what is not finite."""
    if found.shape != truth.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    if found.numel() == 0:
        return 0.0
    largest = float(truth.abs().max())
    return float((found.to(truth.dtype) - truth).abs().max()) / (largest or 1.0)


def make_bounds(case: Case, *, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Bound]:
    """Runs the plain method twice, in a wider dtype and in this one: its error times 2 (outputs) or 3 is allowed.

    The error of the plain method counts as one rounding step of its result at least: it may be right by luck. Integers
    do not round.
    """
    inputs = draw_inputs(case, device=device, dtype=dtype, seed=seed)
    truth = run_method(case.truth, _widen(inputs, case.gradients), case.gradients)
    plain = run_method(case.truth, inputs, case.gradients)
    bounds = {}
    for name, value in truth.items():
        factor = BACKWARD_FACTOR if name.startswith("gradient") else FORWARD_FACTOR
        rounding = torch.finfo(plain[name].dtype).eps if plain[name].is_floating_point() else 0.0
        bounds[name] = Bound(truth=value, allowed=factor * max(relative_error(plain[name], value), rounding))
    return bounds


def measure_errors(method: Method, case: Case, inputs: Inputs, bounds: Mapping[str, Bound]) -> dict[str, float]:
    """The error of every output and gradient, as a share of its largest true element.

    Raises:
        ValueError: the method has other outputs than the reference, or lacks a gradient.
    """
    found = run_method(method, inputs, case.gradients)
    if found.keys() != bounds.keys():
        raise ValueError(f"gives {', '.join(found)} where the reference gives {', '.join(bounds)}")
    return {name: relative_error(found[name], bound.truth) for name, bound in bounds.items()}


def judge(errors: Mapping[str, float], bounds: Mapping[str, Bound], *, slack: float = 1.0) -> str:
    """What is red, in words; empty if the gate is green. `slack` times the allowed error passes."""
    return "; ".join(
        f"{name}: error {error:.2g}, allowed {slack * bounds[name].allowed:.2g}"
        for name, error in errors.items()
        if not error <= slack * bounds[name].allowed
    )


def _widen(inputs: Inputs, gradients: tuple[str, ...]) -> Inputs:
    """Copies, because a method may write into its inputs."""
    wide: Inputs = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.detach().to(WIDER.get(value.dtype, value.dtype), copy=True)
        wide[name] = value
    return wide | {name: wide[name].requires_grad_() for name in gradients}
