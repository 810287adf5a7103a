"""Faults that were or could be made, each planted by one change in a run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from megarec.layers.dropout import Dropout
from megarec.parallel.placement import Placement, place, placements


def nothing(*_: Any) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Fault:
    """How a fault is planted, and a row of the table that must then fail."""

    layout: str
    switches: str = "hstu, prefix"
    plant: Callable[[], None] = nothing
    plant_in: Callable[[nn.ModuleList], None] = nothing


def change_placements(change: Callable[[Placement], Placement]) -> Callable[[nn.ModuleList], None]:
    def plant(model: nn.ModuleList) -> None:
        for parameter, placement in placements(model):
            place(parameter, change(placement))

    return plant


def first_ranks_dropout(model: nn.ModuleList) -> None:
    for module in model.modules():
        if isinstance(module, Dropout):
            module.part = 0


FAULTS: dict[str, Fault] = {
    "dropout of the first rank's channels": Fault(layout="tp2", plant_in=first_ranks_dropout),
    "gradients in blocks not summed": Fault(
        layout="tp2 sp",
        switches="hstu, all-heads norm with scale",
        plant_in=change_placements(
            lambda p: replace(p, grad_sum_over=()) if p.global_name.startswith("blocks.") else p
        ),
    ),
}
