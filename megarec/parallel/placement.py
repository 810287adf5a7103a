"""Where each parameter lives: the one source of initial weights, gradient sums, norms and checkpoint shards."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from megarec.base.random import derive_key
from megarec.base.random_torch import normal_torch, uniform_torch


@dataclass(frozen=True, kw_only=True)
class Init:
    """How a parameter starts: `normal` with `std`, `uniform` in ±`bound`, or `constant` with `value`."""

    kind: Literal["normal", "uniform", "constant"] = "constant"
    std: float = 0.0
    bound: float = 0.0
    value: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How this rank's piece of one parameter sits in the whole.

    Attributes:
        global_name: the parameter's name in the whole model, the same for every layout.
        global_shape: its shape in the whole model.
        split_dim: the dimension that is cut over tensor-parallel ranks, or None.
        offset: where this rank's piece starts along `split_dim`.
        replicated_over: the group kinds whose ranks hold an equal copy (`"tp"`, `"dp"`): a norm counts one.
        grad_sum_over: the group kinds over which a gradient must still be summed (`"tp"` for whole parameters that meet
            a slice of the tokens or some of the heads).
        init: how the whole parameter starts.
    """

    global_name: str = ""
    global_shape: tuple[int, ...]
    split_dim: int | None = None
    offset: int = 0
    replicated_over: tuple[str, ...] = ("dp",)
    grad_sum_over: tuple[str, ...] = ()
    init: Init = Init()


def place(parameter: nn.Parameter, placement: Placement) -> nn.Parameter:
    """Attaches `placement` to `parameter` and returns it."""
    parameter.placement = placement  # type: ignore[attr-defined]
    return parameter


def placement_of(parameter: Tensor) -> Placement:
    """The placement that `place` attached."""
    placement = getattr(parameter, "placement", None)
    if not isinstance(placement, Placement):
        raise AssertionError(f"a parameter of shape {tuple(parameter.shape)} has no Placement")
    return placement


def name_parameters(model: nn.Module) -> None:
    """Gives every parameter's placement its global name: its path in `model`.

    Modules that hold part of a layer stack name their layers by global index, so the path is global already.
    """
    for name, parameter in model.named_parameters():
        place(parameter, replace(placement_of(parameter), global_name=name))


def placements(model: nn.Module) -> Iterator[tuple[nn.Parameter, Placement]]:
    """Every parameter of `model` with its placement, in the order of the module tree."""
    for parameter in model.parameters():
        yield parameter, placement_of(parameter)


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fills every parameter from (seed, global name, global index), so every layout starts from the same weights."""
    for parameter, placement in placements(model):
        if placement.init.kind == "constant":
            parameter.fill_(placement.init.value)
            continue
        whole = torch.arange(_count(placement.global_shape), device=parameter.device).view(placement.global_shape)
        if placement.split_dim is not None:
            whole = whole.narrow(placement.split_dim, placement.offset, parameter.shape[placement.split_dim])
        key = derive_key(seed, "weight", placement.global_name)
        if placement.init.kind == "normal":
            values = normal_torch(key, whole.reshape(-1)) * placement.init.std
        else:
            values = (2.0 * uniform_torch(key, whole.reshape(-1)) - 1.0) * placement.init.bound
        parameter.copy_(values.view(whole.shape))


def count_weights(model: nn.Module) -> int:
    """The weights of `model` in the whole of it, all pieces of every parameter counted."""
    return sum(_count(placement.global_shape) for _, placement in placements(model))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
