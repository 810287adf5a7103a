"""Faults that a parallel trainer is prone to, each planted by one change in a run of a row that must then fail."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megarec_kernels.silu import UvqkLayout
from megarec_kernels.tiles import Tile
from torch import Tensor, nn

from megarec.embedding.tables import OwnedGradients, TableGroup
from megarec.layers import hstu_block
from megarec.layers.dropout import Dropout
from megarec.parallel.context.ring import Ring, RingPlan, _Home
from megarec.parallel.placement import Placement, place, placements
from megarec.train import objective as objective_module
from megarec.train.batches import PackWork, StepBatch
from megarec.train.objective import Objective


def nothing(*_: Any) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Fault:
    """How a fault is planted, and the row of the table that shows it.

    Attributes:
        plant: changes the code before the groups are made.
        plant_in: changes the model after it was built.
    """

    layout: str
    switches: str = "hstu"
    plant: Callable[[], None] = nothing
    plant_in: Callable[[nn.ModuleList], None] = nothing


def change_placements(
    wanted: Callable[[str], bool], change: Callable[[Placement], Placement]
) -> Callable[[nn.ModuleList], None]:
    def plant(model: nn.ModuleList) -> None:
        for parameter, placement in placements(model):
            if wanted(placement.global_name):
                place(parameter, change(placement))

    return plant


def not_summed(placement: Placement) -> Placement:
    return replace(placement, grad_sum_over=())


def first_ranks_dropout(model: nn.ModuleList) -> None:
    for module in model.modules():
        if isinstance(module, Dropout):
            module.part = 0


def normalise_per_rank() -> None:
    counting, forward = Objective.count_targets, Objective.forward

    def count_targets(self: Objective, packs: Any) -> Tensor:
        self.own_counts = counting(self, packs).clone()  # type: ignore[attr-defined]
        return counting(self, packs)

    def of_this_rank(self: Objective, *args: Any, global_counts: Tensor, **settings: Any) -> Any:
        return forward(self, *args, global_counts=self.own_counts, **settings)  # type: ignore[attr-defined]

    Objective.count_targets = count_targets  # type: ignore[method-assign]
    Objective.forward = of_this_rank  # type: ignore[method-assign]


def change_table_norm(change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    def plant() -> None:
        original = TableGroup.square_norm
        TableGroup.square_norm = lambda self, owned: change(original(self, owned))  # type: ignore[method-assign]

    return plant


def scale_table_gradients() -> None:
    original = TableGroup.collect_gradients

    def collect(self: TableGroup, fetched: Any) -> OwnedGradients:
        owned = original(self, fetched)
        return replace(owned, grad=owned.grad * 2)

    TableGroup.collect_gradients = collect  # type: ignore[method-assign]


def split_by_kind_first() -> None:
    split = hstu_block.split_silu

    def split_other(uvqk: Tensor, layout: UvqkLayout, **settings: Any) -> tuple[Tensor, ...]:
        kinds = uvqk.split([width * layout.num_heads for width in layout.widths], dim=1)
        by_head = torch.cat([kind.unflatten(1, (layout.num_heads, -1)) for kind in kinds], dim=2)
        return split(by_head.flatten(1), layout, **settings)

    hstu_block.split_silu = split_other  # type: ignore[assignment]


def padding_pushes_back() -> None:
    Tile.take_gradient = Tile.take  # type: ignore[method-assign]


def key_dropout_by_rank() -> None:
    derive = objective_module.derive_key
    objective_module.derive_key = lambda *names: derive(*names, dist.get_rank())


def second_chunk_reads_another_pack() -> None:
    work, forward = StepBatch.work, Objective.forward
    packs: list[PackWork] = []

    def remember(self: StepBatch, index: Tensor) -> list[PackWork]:
        packs[:] = work(self, index)
        return packs

    def misread(self: Objective, pack: PackWork, number: int, received: Any, **settings: Any) -> Any:
        if number == 1:
            place_of = next(i for i, other in enumerate(packs) if other is pack)
            pack = packs[(place_of + 1) % len(packs)]
        return forward(self, pack, number, received, **settings)

    StepBatch.work = remember  # type: ignore[method-assign]
    Objective.forward = misread  # type: ignore[method-assign]


def skip_a_ring_step() -> None:
    original = Ring.plan

    def plan(self: Ring, *args: Any, **settings: Any) -> RingPlan:
        whole = original(self, *args, **settings)
        return replace(whole, steps=(*whole.steps[:-1], range(0)))

    Ring.plan = plan  # type: ignore[method-assign]


def gradients_stay_away() -> None:
    def stay(self: _Home, grads: tuple[Tensor, ...]) -> None:
        self.arrived = lambda: grads  # type: ignore[method-assign]

    _Home.add = stay  # type: ignore[method-assign]


FAULTS: dict[str, Fault] = {
    "norm gradient not reduced under sequence parallelism": Fault(
        layout="tp2 sp",
        switches="argus",
        plant_in=change_placements(lambda name: name.startswith("blocks.") and "norm" in name, not_summed),
    ),
    "output bias not reduced under sequence parallelism": Fault(
        layout="tp2 sp", plant_in=change_placements(lambda name: name.endswith("out.bias"), not_summed)
    ),
    "shared bias treated as whole without sequence parallelism": Fault(
        layout="tp2",
        plant_in=change_placements(lambda name: name.endswith(("position_bias", "time_bias")), not_summed),
    ),
    "whole gradients summed over ranks": Fault(
        layout="tp2",
        switches="argus",
        plant_in=change_placements(
            lambda name: name.startswith("blocks.") and "norm" in name, lambda p: replace(p, grad_sum_over=("tp",))
        ),
    ),
    "loss normalised per rank": Fault(layout="dp2", switches="argus", plant=normalise_per_rank),
    "norm counts replicated parameters twice": Fault(
        layout="tp2", plant_in=change_placements(lambda _: True, lambda p: replace(p, replicated_over=()))
    ),
    "norm counts table rows twice": Fault(layout="dp2", switches="argus", plant=change_table_norm(lambda x: x * 2)),
    "clip coefficient from the dense norm alone": Fault(layout="pp2", plant=change_table_norm(lambda x: x * 0)),
    "table gradient scaled by the tensor-parallel size": Fault(layout="tp2", plant=scale_table_gradients),
    "wrong head order in the split of U, V, Q, K": Fault(layout="tp2", plant=split_by_kind_first),
    "padding leaks into attention": Fault(layout="cp2", plant=padding_pushes_back),
    "dropout keyed by rank": Fault(layout="dp2", switches="argus", plant=key_dropout_by_rank),
    "dropout of the first rank's channels": Fault(layout="tp2", plant_in=first_ranks_dropout),
    "a ring step is skipped": Fault(layout="ring2", plant=skip_a_ring_step),
    "gradients of keys do not come home": Fault(layout="ring2", switches="argus", plant=gradients_stay_away),
    "a virtual chunk reads the wrong pack": Fault(layout="pp2 vp2", plant=second_chunk_reads_another_pack),
}
