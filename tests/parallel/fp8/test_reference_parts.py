"""Split maps in FP8 on several ranks round every tensor as one process rounds the whole of it."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarec.parallel.engine import transformer_config
from megarec.parallel.fp8 import reference_parts as module
from megarec.parallel.fp8.reference_parts import reference_parts
from megarec.parallel.groups import Group, ParallelGroups, ProcessInfo, start
from megarec.parallel.layout import LayoutConfig
from megarec.parallel.placement import placement_of
from tests.parallel.fp8.scaled_twin import E4M3, E5M2, assert_product, rounded
from tests.ranks import run_ranks

TOKENS, IN, OUT = 64, 64, 96
LAYOUTS = {
    "one": LayoutConfig(),
    "tp2": LayoutConfig(tensor=2),
    "tp2 sp": LayoutConfig(tensor=2, sequence_parallel=True),
    "cp2": LayoutConfig(context=2),
    "tp2 cp2": LayoutConfig(tensor=2, context=2),
}


@cache
def whole() -> dict[str, Tensor]:
    """Numbers that grow along every side, so that no piece has the amax of another."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"x": (TOKENS, IN), "weight": (OUT, IN), "bias": (OUT,), "gradient": (TOKENS, OUT)}
    values = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    for value in values.values():
        for side, size in enumerate(value.shape):
            growth = torch.linspace(0.3, 3.0, size)
            value.mul_(growth.view([-1 if side == other else 1 for other in range(value.dim())]))
    return values


def piece(x: Tensor, dim: int, group: Group, *, split: bool) -> Tensor:
    return x.chunk(group.size, dim)[group.rank] if split else x


def job(process: ProcessInfo, layout: LayoutConfig, kind: str, fault: str = "") -> dict[str, Any]:
    """Result and gradients of one map on this rank, put together to wholes."""
    groups = start(layout, process)
    if fault:
        setattr(module, fault, lambda group, amax: amax)
    parts = reference_parts(groups, transformer_config(layout, width=IN, num_heads=4, dtype=torch.float32))
    column = kind == "column"
    linear = (parts.column_linear if column else parts.row_linear)(IN, OUT, bias=True, std=0.1)
    with torch.no_grad():
        for name, parameter in linear.named_parameters():
            dim = placement_of(parameter).split_dim
            parameter.copy_(whole()[name] if dim is None else piece(whole()[name], dim, groups.tensor, split=True))
    sp = layout.sequence_parallel
    x, gradient = (piece(whole()[name], 0, groups.context, split=True) for name in ("x", "gradient"))
    x, gradient = piece(x, 1, groups.tensor, split=not column), piece(gradient, 1, groups.tensor, split=column)
    x = piece(x, 0, groups.tensor, split=column and sp).clone().requires_grad_()
    y = linear(x)
    y.backward(piece(gradient, 0, groups.tensor, split=not column and sp))
    return together(groups, linear, column=column, found={"y": y.detach(), "dx": x.grad})


def together(
    groups: ParallelGroups, linear: torch.nn.Module, *, column: bool, found: dict[str, Any]
) -> dict[str, Tensor]:
    sp, tensor, context = groups.layout.sequence_parallel, groups.tensor, groups.context
    tokens = {"y": 0 if sp and not column else None, "dx": 0 if sp and column else None}
    features = {"y": 1 if column else None, "dx": None if column else 1}
    for name, value in found.items():
        dim = features[name] if features[name] is not None else tokens[name]
        value = gather(value, dim, tensor) if dim is not None else value
        found[name] = gather(value, 0, context)
    for name, parameter in linear.named_parameters():
        gradient, placement = parameter.grad, placement_of(parameter)
        assert gradient is not None
        dist.all_reduce(gradient, group=context.process_group)
        if placement.grad_sum_over:
            dist.all_reduce(gradient, group=tensor.process_group)
        dim = placement.split_dim
        found[f"d_{name}"] = gradient if dim is None else gather(gradient, dim, tensor)
    return found


def gather(x: Tensor, dim: int, group: Group) -> Tensor:
    pieces = [torch.empty_like(x) for _ in range(group.size)]
    dist.all_gather(pieces, x.contiguous(), group=group.process_group)
    return torch.cat(pieces, dim)


def assert_twin(found: dict[str, Tensor]) -> None:
    """One process that rounds whole tensors; the sums of ranks are another order of the same sum."""
    x, weight, bias, gradient = (whole()[name] for name in ("x", "weight", "bias", "gradient"))
    x8, w8, g8 = rounded(x, E4M3), rounded(weight, E4M3), rounded(gradient, E5M2)
    one = torch.ones(1, TOKENS).double()
    with_bias = torch.cat([x8, one.expand(TOKENS, TOKENS)[:, :1]], 1), torch.cat([w8, bias.double()[:, None]], 1).t()
    assert_product(found["y"], *with_bias, dtype=torch.float32)
    assert_product(found["dx"], g8, w8, dtype=torch.float32)
    assert_product(found["d_weight"], g8.t(), x8, dtype=torch.float32)
    assert_product(found["d_bias"][None], one, gradient.double(), dtype=torch.float32)


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_rounds_as_one_process(name: str, kind: str) -> None:
    layout = LAYOUTS[name]
    for found in run_ranks(job, layout.replica, layout, kind):
        assert_twin(found)


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("name", ["tp2", "tp2 sp", "cp2"])
def test_an_amax_that_is_not_shared_is_seen(name: str, kind: str) -> None:
    layout = LAYOUTS[name]
    found, *_ = run_ranks(job, layout.replica, layout, kind, "_largest")
    with pytest.raises(AssertionError):
        assert_twin(found)
