"""Runs of a few steps whose weights or losses are compared."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megarec.base.config import build
from megarec.data.dataset import open_dataset
from megarec.parallel.groups import ParallelGroups, ProcessInfo, start, stop
from megarec.parallel.layout import LayoutConfig
from megarec.parallel.mcore import DistributedDataParallel
from megarec.parallel.placement import placements
from megarec.train.config import TrainConfig
from megarec.train.hooks.hook import Hook
from megarec.train.state import whole_weights
from megarec.train.trainer import Trainer, build_machinery
from tests.parity.faults import FAULTS
from tests.parity.table import LAYOUTS, SWITCHES
from tests.ranks import run_ranks
from tests.train.runs import make_config

LR = 0.05
STREAM = {"tokens_per_pack": 192, "lanes": 2, "pool_blocks": 1, "max_history_events": 12, "packs_per_lane": 2}
Weights = tuple[dict[str, Tensor], dict[str, Tensor]]


class PlainSgd:
    """Stands for the dense optimizer: Megatron-Core's refuse fp64."""

    def __init__(self, chunks: list[DistributedDataParallel], groups: ParallelGroups) -> None:
        self._chunks, self._groups = nn.ModuleList(chunks), groups

    def prepare_grads(self) -> None: ...

    def square_norm(self) -> Tensor:
        total = torch.zeros(()).double()
        for parameter, placement in placements(self._chunks):
            if "tp" not in placement.replicated_over or self._groups.tensor.rank == 0:
                total += parameter.main_grad.double().square().sum()
        torch.distributed.all_reduce(total, group=self._groups.model.process_group)
        return total

    def scale_grads(self, coefficient: float) -> None:
        for parameter in self._chunks.parameters():
            parameter.main_grad.mul_(coefficient)

    @torch.no_grad()
    def step(self, _: float) -> None:
        for parameter in self._chunks.parameters():
            parameter -= LR * parameter.main_grad

    def zero(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()


def make_run(data: Path, layout: str, switches: str, **settings: Any) -> TrainConfig:
    """The configuration of a row of the table."""
    shared = LAYOUTS[layout]
    chosen = SWITCHES[switches]
    values = {
        "num_steps": 3,
        "tables": {"kind": "sgd", "lr_scale": LR / 1e-3},
        "optimizer": {"clip_norm": 0.5},  # cuts, so that the norm matters
        "objective": {"num_uniform_negatives": 8, **chosen.get("objective", {})},
        "stream": {**STREAM, **chosen.get("stream", {}), **shared.stream},
        "model": {**chosen["model"], "num_layers": shared.num_layers},
        "layout": shared.sizes,
        **settings,
    }
    return make_config(data, data.parent / "run", **values)


def train_fp64(process: ProcessInfo, config: TrainConfig, fault: str = "") -> Weights:
    """Dense weights and table rows, whole, after the steps of `config` in fp64 with plain SGD."""
    if fault:
        FAULTS[fault].plant()
    groups = start(config.layout, process)
    trainer = Trainer(config, groups, open_dataset(config.data), hooks=[])
    trainer.model, machinery = build_machinery(config, groups, trainer.shape, dtype=torch.float64)
    if fault:
        FAULTS[fault].plant_in(trainer.model)
    trainer.machinery = replace(machinery, optimizer=PlainSgd(machinery.chunks, groups))  # type: ignore[arg-type]
    before = [{name: weight.clone() for name, weight in part.items()} for part in whole_weights(trainer)]
    trainer.fit()
    weights = whole_weights(trainer)
    assert largest_difference(before, weights) > 1e-4  # something was learned
    stop()
    return weights


def twin_of(data: Path, layout: str, switches: str) -> Weights:
    """What the one-process twin of a row ends with; rows that differ by the layout alone share it."""
    wanted = LAYOUTS[layout]
    same = [name for name, x in LAYOUTS.items() if (x.stream, x.num_layers) == (wanted.stream, wanted.num_layers)]
    return _run_alone(data, same[0], switches)


@cache
def _run_alone(data: Path, layout: str, switches: str) -> Weights:
    (weights,) = run_ranks(train_fp64, 1, with_layout(make_run(data, layout, switches), {}))
    return weights  # type: ignore[no-any-return]


def largest_difference(one: Any, other: Any) -> float:
    """Of any weight; both hold the same names."""
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
    return max(
        float((a[name] - b[name]).abs().max()) for a, b in zip(one, other, strict=True) for name in a if a[name].numel()
    )


def train_losses(process: ProcessInfo, config: TrainConfig) -> list[float]:
    """The losses of every step and head, summed over replicas."""
    groups = start(config.layout, process)
    losses: list[Tensor] = []

    class Keep(Hook):
        def after_step(self, trainer: Trainer, result: Any) -> None:
            total = result.losses.clone()
            torch.distributed.all_reduce(total, group=groups.data.process_group)
            losses.append(total)

    trainer = Trainer(config, groups, open_dataset(config.data), hooks=[Keep()])
    trainer.fit()
    assert all(torch.isfinite(p).all() for p, _ in placements(trainer.model))
    stop()
    return [value for loss in losses for value in loss.tolist()]


def with_layout(config: TrainConfig, sizes: dict[str, Any]) -> TrainConfig:
    """The same run in another layout."""
    return replace(config, layout=build(LayoutConfig, sizes))
