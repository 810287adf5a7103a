"""What one step does with its norm: counts everything once, clips everything alike, and votes before it changes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarec.base.errors import UserError
from megarec.data.dataset import open_dataset
from megarec.optim.dense import DenseOptimizer
from megarec.parallel.groups import ProcessInfo, start, stop
from megarec.train import step as step_module
from megarec.train.config import TrainConfig
from megarec.train.state import whole_weights
from megarec.train.trainer import MAX_SKIPPED_STEPS, Trainer
from tests.inference.synthetic import write_world
from tests.ranks import run_ranks
from tests.train.runs import make_config, run

SGD = {"kind": "sgd"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "data"
    write_world(path, num_users=40)
    return path


def take_one_step(process: ProcessInfo, config: TrainConfig, poison: float) -> dict[str, Any]:
    """One step with plain SGD on the tables: what it changed and every norm on the way."""
    groups = start(config.layout, process)
    trainer = Trainer(config, groups, open_dataset(config.data), hooks=[])
    norms: dict[str, Tensor] = {}
    coefficients: list[float] = []
    results: list[Any] = []
    dense_norm, table_norm = DenseOptimizer.square_norm, type(trainer.machinery.tables).square_norm
    scale, step = DenseOptimizer.scale_grads, step_module.train_step

    def keep(name: str, method: Any) -> Any:
        def measured(*args: Any) -> Tensor:
            norms[name] = method(*args)
            return norms[name]

        return measured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenseOptimizer, "square_norm", keep("dense", dense_norm))
        patch.setattr(type(trainer.machinery.tables), "square_norm", keep("tables", table_norm))
        patch.setattr(DenseOptimizer, "scale_grads", lambda s, c: (coefficients.append(float(c)), scale(s, c)))
        patch.setattr("megarec.train.trainer.train_step", lambda *a, **k: results.append(step(*a, **k)) or results[-1])
        with torch.no_grad():
            next(trainer.model.parameters()).mul_(poison)
        dense, tables = whole_weights(trainer)
        before = {n: w.clone() for n, w in tables.items()}, {n: w.clone() for n, w in dense.items()}
        trainer.fit()
    after = whole_weights(trainer)
    moved = torch.stack([(after[1][name] - before[0][name]).double().norm() for name in before[0]]).norm()
    same = all(torch.equal(after[0][name], before[1][name]) for name in before[1] if before[1][name].isfinite().all())
    stop()
    return {
        "moved": float(moved) / trainer.learning_rate,
        "dense_same": same,
        "dense": float(norms["dense"]),
        "tables": float(norms["tables"]),
        "coefficients": coefficients,
        "norm": results[0].grad_norm,
        "updated": results[0].updated,
        "table_step": trainer.machinery.tables.step,
    }


def one_step(world: Path, tmp_path: Path, *, clip_norm: float, poison: float = 1.0, ranks: int = 1) -> dict[str, Any]:
    config = make_config(world, tmp_path / "run", num_steps=1, tables=SGD, optimizer={"clip_norm": clip_norm})
    results = run_ranks(take_one_step, ranks, config, poison)
    assert all(result["norm"] == results[0]["norm"] for result in results) or math.isnan(results[0]["norm"])
    return dict(results[0])


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_norm_and_one_coefficient_for_everything(world: Path, tmp_path: Path, ranks: int) -> None:
    free = one_step(world, tmp_path, clip_norm=0.0, ranks=ranks)
    assert free["dense"] > 0 and free["tables"] > 0
    assert free["norm"] == pytest.approx(math.sqrt(free["dense"] + free["tables"]), rel=1e-6)
    assert free["moved"] == pytest.approx(math.sqrt(free["tables"]), rel=1e-3)
    clipped = one_step(world, tmp_path, clip_norm=free["norm"] / 4, ranks=ranks)
    assert clipped["norm"] == free["norm"]  # before clipping
    assert clipped["coefficients"] == [pytest.approx(0.25, rel=1e-4)]
    assert clipped["moved"] == pytest.approx(free["moved"] / 4, rel=1e-3)
    wide = one_step(world, tmp_path, clip_norm=free["norm"] * 4, ranks=ranks)
    assert wide["coefficients"] == [1.0]


def test_a_norm_that_is_not_finite_changes_nothing(world: Path, tmp_path: Path) -> None:
    result = one_step(world, tmp_path, clip_norm=1.0, poison=math.nan)
    assert not result["updated"]
    assert result["moved"] == 0.0 and result["dense_same"]
    assert result["table_step"] == 0 and result["coefficients"] == []


def train_poisoned(process: ProcessInfo, config: TrainConfig) -> tuple[int, str]:
    groups = start(config.layout, process)
    trainer = Trainer(config, groups, open_dataset(config.data), hooks=[])
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    try:
        trainer.fit()
    except UserError as error:
        return trainer.step, str(error)
    finally:
        stop()
    return trainer.step, ""


def test_a_diverged_run_ends(world: Path, tmp_path: Path) -> None:
    config = make_config(world, tmp_path / "run", num_steps=3 * MAX_SKIPPED_STEPS)
    ((steps, message),) = run_ranks(train_poisoned, 1, config)
    assert steps == MAX_SKIPPED_STEPS - 1
    assert f"not finite in {MAX_SKIPPED_STEPS} steps in a row" in message


def test_the_first_update_is_step_0_of_the_schedule(world: Path, tmp_path: Path) -> None:
    settings = {"lr": 0.01, "warmup_steps": 4, "schedule": "linear"}
    config = make_config(world, tmp_path / "run", num_steps=8, log_every_steps=1, optimizer=settings)
    run_ranks(run, 1, config)
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.0075, 0.005, 0.0025, 0.0])
