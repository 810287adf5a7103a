"""Transformer Engine's split maps are called as it declares, and compute what Megatron-Core's compute."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarec.parallel.engine import transformer_config
from megarec.parallel.fp8.filling import make_parts
from megarec.parallel.fp8.precision import Precision
from megarec.parallel.fp8.requirements import ENGINE_VERSIONS
from megarec.parallel.groups import ParallelGroups, ProcessInfo, start
from megarec.parallel.layout import LayoutConfig
from megarec.parallel.megatron_parts import megatron_parts
from megarec.parallel.parts import Parts
from megarec.parallel.placement import Placement, placement_of
from megarec.train.config import TrainConfig
from tests.parallel.fp8 import fake_engine
from tests.parallel.tiny_model import HEADS, WIDTH, TinyModel
from tests.parity.layout_runs import Weights, largest_difference, make_run, train_fp64
from tests.ranks import run_ranks

LAYOUTS = {
    "one": LayoutConfig(linears="te"),
    "tp2": LayoutConfig(linears="te", tensor=2),
    "tp2 sp": LayoutConfig(linears="te", tensor=2, sequence_parallel=True),
}
Result = tuple[dict[str, tuple[Placement, Tensor, Tensor]], Tensor]


def run_model(groups: ParallelGroups, parts: Parts) -> Result:
    """Placement, first value and gradient of every parameter, and what the model gives."""
    model = TinyModel(parts).double()
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = model(x.chunk(groups.tensor.size)[groups.tensor.rank] if parts.sequence_parallel else x)
    y.square().sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = placement_of(parameter), first[name], parameter.grad
    return found, y.detach()


def job(process: ProcessInfo, layout: LayoutConfig, precision: Precision) -> tuple[Result, Result, list[Any]]:
    groups = start(layout, process)
    fake_engine.install()
    config = transformer_config(layout, width=WIDTH, num_heads=HEADS, dtype=torch.float32)
    parts = make_parts(groups, config, precision)
    with parts.around_blocks():
        result = run_model(groups, parts)
    seen = [
        given and (type(given["recipe"]).__name__, given["enabled"], given["amax_reduction_group"].size())
        for given in fake_engine.SEEN
    ]
    return result, run_model(groups, megatron_parts(groups, config)), seen


@pytest.mark.parametrize("name", LAYOUTS)
def test_names_places_values_and_gradients_are_megatron_cores(name: str) -> None:
    layout = LAYOUTS[name]
    for (ours, y), (theirs, expected), _ in run_ranks(job, layout.replica, layout, "bf16"):
        assert ours.keys() == theirs.keys()
        assert (y - expected).abs().max() <= 1e-12
        for parameter, (placement, first, gradient) in ours.items():
            assert placement == theirs[parameter][0], parameter
            assert torch.equal(first, theirs[parameter][1]), parameter
            assert (gradient - theirs[parameter][2]).abs().max() <= 1e-12, parameter


@pytest.mark.parametrize(
    ("precision", "recipe"),
    [
        ("fp8_delayed", "DelayedScaling"),
        ("fp8_current", "Float8CurrentScaling"),
        ("fp8_blockwise", "Float8BlockScaling"),
        ("bf16", None),
    ],
)
def test_every_product_is_in_its_recipe(precision: Precision, recipe: str | None) -> None:
    for *_, seen in run_ranks(job, 2, LAYOUTS["tp2"], precision):
        assert seen == [(recipe, True, 2) if recipe else None] * 4


@pytest.mark.parametrize(
    "call",
    [
        lambda: fake_engine.Linear(16, 16, tensor_group=None),
        lambda: fake_engine.Linear(16),
        lambda: fake_engine.autocast(fp8_recipe=None).__enter__(),
        lambda: fake_engine.recipe("DelayedScaling")(history=3),
    ],
)
def test_a_call_that_is_not_declared_is_seen(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError):
        call()


def test_the_signatures_are_of_a_version_that_is_taken() -> None:
    version = tuple(int(number) for number in fake_engine.DECLARED["version"].split("."))
    assert ENGINE_VERSIONS[0] <= version < ENGINE_VERSIONS[1]


def train_with_engine(process: ProcessInfo, config: TrainConfig) -> tuple[Weights, list[Any]]:
    fake_engine.install()
    weights = train_fp64(process, config)
    return weights, [given and type(given["recipe"]).__name__ for given in fake_engine.SEEN]


@pytest.mark.parametrize("switches", ["argus", "hstu"])
def test_whole_runs_end_with_megatron_cores_weights(parity_data: Path, switches: str) -> None:
    config = make_run(parity_data, "tp2", switches)
    with_engine = replace(config, layout=replace(config.layout, linears="te"), precision="fp8_delayed")
    expected, *_ = run_ranks(train_fp64, 2, config)
    for weights, seen in run_ranks(train_with_engine, 2, with_engine):
        assert largest_difference(weights, expected) <= 1e-12
        assert set(seen) == {"DelayedScaling"}
