"""A layout changes nothing: weights after steps on several ranks equal those on 1, for every objective.

fp64 with plain SGD: 1e-12 after 3 steps (sums in another order). fp32 with Adam: losses within 1e-6 over 20 steps.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarec.base.config import build, plain
from megarec.data.dataset import open_dataset
from megarec.layers.dropout import Dropout
from megarec.parallel.groups import ParallelGroups, ProcessInfo, start, stop
from megarec.parallel.layout import LayoutConfig
from megarec.parallel.mcore import DistributedDataParallel
from megarec.parallel.placement import place, placements
from megarec.train import objective as objective_module
from megarec.train.config import TrainConfig
from megarec.train.hooks.hook import Hook
from megarec.train.state import whole_weights
from megarec.train.trainer import Trainer, build_machinery
from tests.inference.synthetic import write_world
from tests.ranks import run_ranks
from tests.train.runs import SMALL_ARGUS, SMALL_HSTU, SMALL_SASREC, make_config

LR = 0.05
SWITCHES: dict[str, dict[str, Any]] = {
    "argus": {"model": SMALL_ARGUS},
    "hstu": {"model": SMALL_HSTU},
    "hstu, prefix": {"model": {**SMALL_HSTU, "prefix_fields": ["device"], "dropout": 0.2}},
    "sasrec, dropout": {"model": SMALL_SASREC},
    "argus, interleaved": {"model": {**SMALL_ARGUS, "token_layout": "context_item_feedback"}},
    "hstu, item and action": {"model": {**SMALL_HSTU, "token_layout": "item_action"}},
    "candidates": {
        "model": {**SMALL_HSTU, "token_layout": "item_action"},
        "stream": {
            "tokens_per_pack": 48,
            "lanes": 2,
            "max_history_events": 12,
            "candidates_per_window": 3,
            "window": "stride:3",
        },
    },
    "full softmax": {"objective": {"next_item": "full", "chunk_items": 7}},
    "per-position negatives": {
        "objective": {"negatives": "per_position", "num_uniform_negatives": 5, "correction": "none"}
    },
    "negatives_only correction": {"objective": {"num_uniform_negatives": 8, "correction": "negatives_only"}},
    "feedback alone": {"objective": {"next_item": "none"}},
    "next item alone": {"objective": {"num_uniform_negatives": 8, "feedback_weight": 0.0}},
}


class PlainSgd:
    """Stands for the dense optimizer: Megatron-Core's refuse fp64."""

    def __init__(self, model: DistributedDataParallel, groups: ParallelGroups) -> None:
        self._model, self._groups = model, groups

    def prepare_grads(self) -> None: ...

    def square_norm(self) -> Tensor:
        total = torch.zeros(()).double()
        for parameter, placement in placements(self._model):
            if "tp" not in placement.replicated_over or self._groups.tensor.rank == 0:
                total += parameter.main_grad.double().square().sum()
        torch.distributed.all_reduce(total, group=self._groups.tensor.process_group)
        return total

    def scale_grads(self, coefficient: float) -> None:
        for parameter in self._model.parameters():
            parameter.main_grad.mul_(coefficient)

    @torch.no_grad()
    def step(self, _: float) -> None:
        for parameter in self._model.parameters():
            parameter -= LR * parameter.main_grad

    def zero(self) -> None:
        self._model.zero_grad_buffer()


def train_fp64(process: ProcessInfo, config: TrainConfig, fault: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    groups = start(config.layout, process)
    if fault == "loss normalised per rank":
        objective_module.Objective.count_targets = _counts_of_this_rank  # type: ignore[method-assign]
    trainer = Trainer(config, groups, open_dataset(config.data), hooks=[])
    trainer.model, machinery = build_machinery(config, groups, trainer.shape, dtype=torch.float64)
    for module in trainer.model.modules():
        if fault == "dropout of the first rank's channels" and isinstance(module, Dropout):
            module.part = 0
    for parameter, placement in placements(trainer.model):
        if fault == "gradients in blocks not summed" and placement.global_name.startswith("blocks."):
            place(parameter, replace(placement, grad_sum_over=()))
        if fault == "whole gradients summed" and "tp" in placement.replicated_over:
            place(parameter, replace(placement, grad_sum_over=("tp",)))
    trainer.machinery = replace(machinery, optimizer=PlainSgd(machinery.model, groups))  # type: ignore[arg-type]
    before = [{name: weight.clone() for name, weight in part.items()} for part in whole_weights(trainer)]
    trainer.fit()
    weights = whole_weights(trainer)
    assert largest_difference(before, weights) > 1e-4  # something was learned
    stop()
    return weights


def _counts_of_this_rank(self: objective_module.Objective, packs: list[Any]) -> Tensor:
    counts = [sum(self._count(pack, name) for pack in packs) for name in self.names]
    return torch.tensor(counts, dtype=torch.float64) / torch.distributed.get_world_size()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "data"
    write_world(path, num_users=60)
    return path


def fp64_config(world: Path, tmp_path: Path, settings: dict[str, Any]) -> TrainConfig:
    tables = {"kind": "sgd", "lr_scale": LR / 1e-3}
    optimizer = {"clip_norm": 0.5}  # cuts, so that the norm matters
    return make_config(world, tmp_path, num_steps=3, tables=tables, optimizer=optimizer, **settings)


def largest_difference(one: Any, other: Any) -> float:
    return max(
        float((a[name] - b[name]).abs().max()) for a, b in zip(one, other, strict=True) for name in a if a[name].numel()
    )


@pytest.mark.parametrize("name", SWITCHES)
def test_two_ranks_equal_one(world: Path, tmp_path: Path, name: str) -> None:
    config = fp64_config(world, tmp_path, SWITCHES[name])
    (one,) = run_ranks(train_fp64, 1, config, "")
    first, second = run_ranks(train_fp64, 2, config, "")
    assert largest_difference(first, second) == 0.0
    assert largest_difference(one, first) <= 1e-12


LAYOUTS = {
    "tp2": {"tensor": 2},
    "tp2 sp": {"tensor": 2, "sequence_parallel": True},
    "cp2": {"context": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SWITCHES)
def test_two_tensor_parallel_ranks_equal_one(world: Path, tmp_path: Path, name: str, layout: str) -> None:
    config = fp64_config(world, tmp_path, SWITCHES[name])
    (one,) = run_ranks(train_fp64, 1, config, "")
    config = replace(config, layout=build(LayoutConfig, LAYOUTS[layout]))
    first, second = run_ranks(train_fp64, 2, config, "")
    assert largest_difference(first, second) == 0.0
    assert largest_difference(one, first) <= 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["argus, interleaved", "hstu, prefix"])
def test_tensor_and_data_parallel_ranks_equal_one(world: Path, tmp_path: Path, name: str, layout: str) -> None:
    config = fp64_config(world, tmp_path, SWITCHES[name])
    (one,) = run_ranks(train_fp64, 1, config, "")
    config = replace(config, layout=build(LayoutConfig, LAYOUTS[layout]))
    four = run_ranks(train_fp64, 4, config, "")
    assert max(largest_difference(four[0], other) for other in four[1:]) == 0.0
    assert largest_difference(one, four[0]) <= 1e-12


def test_a_loss_normalised_per_rank_is_seen(world: Path, tmp_path: Path) -> None:
    config = fp64_config(world, tmp_path, {})
    config = replace(config, optimizer=replace(config.optimizer, clip_norm=0.0))  # clipping would hide a factor
    (one,) = run_ranks(train_fp64, 1, config, "")
    faulty = run_ranks(train_fp64, 2, config, "loss normalised per rank")[0]
    assert largest_difference(one, faulty) > 1e-6


@pytest.mark.parametrize(
    ("fault", "layout"),
    [
        ("dropout of the first rank's channels", "tp2"),
        ("gradients in blocks not summed", "tp2"),
        ("gradients in blocks not summed", "tp2 sp"),
        ("whole gradients summed", "tp2"),  # those of norms and of output biases are whole without sequence parallelism
    ],
)
def test_a_fault_of_tensor_parallel_ranks_is_seen(world: Path, tmp_path: Path, fault: str, layout: str) -> None:
    config = fp64_config(world, tmp_path, {"model": {**SMALL_HSTU, "dropout": 0.2}})
    (one,) = run_ranks(train_fp64, 1, config, "")
    faulty = run_ranks(train_fp64, 2, replace(config, layout=build(LayoutConfig, LAYOUTS[layout])), fault)[0]
    assert largest_difference(one, faulty) > 1e-7


def losses_fp32(process: ProcessInfo, config: TrainConfig) -> list[float]:
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


@pytest.mark.parametrize("layout", [{}, *LAYOUTS.values()], ids=["dp2", *LAYOUTS])
@pytest.mark.parametrize("model", [SMALL_ARGUS, SMALL_HSTU], ids=["argus", "hstu"])
def test_fp32_losses_with_adam(world: Path, tmp_path: Path, model: dict[str, Any], layout: dict[str, Any]) -> None:
    config = make_config(world, tmp_path, num_steps=20, model=model)
    (one,) = run_ranks(losses_fp32, 1, config)
    two, _ = run_ranks(losses_fp32, 2, replace(config, layout=build(LayoutConfig, layout)))
    assert len(one) == 60
    for a, b in zip(one, two, strict=True):
        assert abs(a - b) <= 1e-6 * max(1.0, abs(a))


@pytest.mark.parametrize("layout", [{}, *LAYOUTS.values()], ids=["dp2", *LAYOUTS])
def test_bf16_stays_close_to_fp32(world: Path, tmp_path: Path, layout: dict[str, Any]) -> None:
    fp32 = make_config(world, tmp_path, num_steps=20)
    (exact,) = run_ranks(losses_fp32, 1, fp32)
    bf16 = build(TrainConfig, {**plain(fp32), "precision": "bf16"})
    (one,) = run_ranks(losses_fp32, 1, bf16)
    two, _ = run_ranks(losses_fp32, 2, replace(bf16, layout=build(LayoutConfig, layout)))
    error_one = max(abs(a - b) for a, b in zip(exact, one, strict=True))
    error_two = max(abs(a - b) for a, b in zip(exact, two, strict=True))
    assert 0 < error_one < 0.2
    assert error_two <= 2 * error_one
