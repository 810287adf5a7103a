"""Kill a run anywhere: it goes on from its newest checkpoint and ends with the same bits."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import megarec.checkpoint.save as save_module
from megarec.base.errors import UserError
from megarec.checkpoint.load import Checkpoint
from megarec.checkpoint.manifest import read_pointer
from megarec.parallel.groups import ProcessInfo
from megarec.parallel.layout import LayoutConfig
from megarec.train import step as step_module
from megarec.train.config import TrainConfig
from megarec.train.objective import Objective
from tests.inference.synthetic import write_world
from tests.ranks import run_ranks
from tests.train.runs import SMALL_ARGUS, SMALL_HSTU, make_config, read_tensors, run


class Killed(Exception):
    """Stands for SIGKILL: nothing of the run's own code catches it."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "data"
    write_world(path, num_users=60)
    return path


@pytest.fixture(scope="module")
def uninterrupted(
    world: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, Any], int], TrainConfig]:
    """The run that nobody kills, trained once per model and number of ranks."""
    done: dict[tuple[str, int], TrainConfig] = {}

    def train_once(model: dict[str, Any], num_ranks: int) -> TrainConfig:
        key = (model["name"], num_ranks)
        if key not in done:
            done[key] = make_config(world, tmp_path_factory.mktemp("whole"), model=model)
            run_ranks(run, num_ranks, done[key])
        return done[key]

    return train_once


def kill_in_step(number: int) -> None:
    """Dies before optimizer step `number`, between two checkpoints."""
    original, done = step_module.run_schedule, [0]

    def run_schedule(*args: Any, **kwargs: Any) -> Any:
        done[0] += 1
        if done[0] == number:
            raise Killed
        return original(*args, **kwargs)

    step_module.run_schedule = run_schedule  # type: ignore[assignment]


def kill_in_accumulation(number: int) -> None:
    """Dies in the second pack of step `number`: the gradients of the first one are lost."""
    original, packs = Objective.forward, [0]

    def forward(self: Objective, *args: Any, **kwargs: Any) -> Any:
        packs[0] += 1
        if packs[0] == 2 * number:
            raise Killed
        return original(self, *args, **kwargs)

    Objective.forward = forward  # type: ignore[method-assign]


def kill_before_latest(number: int) -> None:
    """Dies after the checkpoint of step `number` got its name, before `latest` names it."""
    original = save_module.write_pointer

    def write_pointer(directory: Path, pointer: str, step: int) -> None:
        if step == number:
            raise Killed
        original(directory, pointer, step)

    save_module.write_pointer = write_pointer  # type: ignore[assignment]


KILLS: dict[str, tuple[Callable[[int], None], int, set[int]]] = {
    # name: how, when, the checkpoint that is left (0: none); a save may still be under way when its run dies
    "before any checkpoint": (kill_in_step, 3, {0}),
    "inside an epoch": (kill_in_step, 6, {0, 4}),
    "at the first step after a checkpoint": (kill_in_step, 9, {4, 8}),
    "inside an accumulation": (kill_in_accumulation, 7, {0, 4}),
    "between save and latest": (kill_before_latest, 8, {4}),
}


def killed_run(process: ProcessInfo, config: TrainConfig, kill: Callable[[int], None], number: int) -> bool:
    kill(number)
    try:
        run(process, config)
    except Killed:
        return True
    except RuntimeError:  # the rank beside the killed one loses its connection
        return False
    return False


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", KILLS)
def test_resume_is_bit_for_bit(
    tmp_path: Path, world: Path, uninterrupted: Callable[..., TrainConfig], name: str, num_ranks: int
) -> None:
    kill, number, left = KILLS[name]
    model = SMALL_HSTU if name == "inside an epoch" else SMALL_ARGUS
    whole = uninterrupted(model, num_ranks)
    broken = make_config(world, tmp_path / "broken", model=model)
    # With several ranks a pack number counts per rank, so every rank dies at the same place.
    lanes_per_rank = whole.stream.lanes // num_ranks
    at = number * lanes_per_rank if kill is kill_in_accumulation else number
    assert any(run_ranks(killed_run, num_ranks, broken, kill, at))
    newest = read_pointer(tmp_path / "broken" / "checkpoints", "latest")
    assert (Checkpoint(newest).step if newest else 0) in left
    run_ranks(run, num_ranks, broken)
    expected, resumed = read_tensors(whole.run_dir), read_tensors(broken.run_dir)
    assert expected.keys() == resumed.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, resumed[key]), key
    assert metrics_of(whole) == metrics_of(broken)


def metrics_of(config: TrainConfig) -> list[tuple[int, str]]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(record["step"], json.dumps(record["losses"])) for record in records]


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2 zero1": {"zero1": True},
    "tp2": {"tensor": 2},
    "tp2 sp": {"tensor": 2, "sequence_parallel": True},
    "cp2": {"context": 2},
    "pp2": {"pipeline": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_resume_on_another_number_of_ranks_continues_the_same_stream(
    tmp_path: Path, world: Path, uninterrupted: Callable[..., TrainConfig], layout: dict[str, Any]
) -> None:
    whole = uninterrupted(SMALL_ARGUS, 1)
    moved = make_config(world, tmp_path / "moved", num_steps=8, layout=layout)
    run_ranks(run, 2, moved)
    half = read_tensors(moved.run_dir)  # whole, whoever holds a piece
    assert {name: tensor.shape for name, tensor in half.items()} == {
        name: tensor.shape for name, tensor in read_tensors(whole.run_dir).items()
    }
    last = replace(moved, num_steps=12, layout=LayoutConfig())
    run_ranks(run, 1, last)
    expected, resumed = read_tensors(whole.run_dir), read_tensors(moved.run_dir)
    for key, tensor in expected.items():
        # fp32 sums in another order; a lost or doubled pack moves weights by the learning rate, 1e-3
        torch.testing.assert_close(tensor, resumed[key], atol=2e-5, rtol=1e-4, msg=key)
    lanes = [Checkpoint(Path(c.run_dir)).manifest.state["lanes"] for c in (whole, moved)]
    assert lanes[0] == lanes[1]


def test_a_finished_run_stays_as_it_is(tmp_path: Path, world: Path) -> None:
    config = make_config(world, tmp_path / "run", num_steps=4)
    run_ranks(run, 1, config)
    before = read_tensors(config.run_dir)
    run_ranks(run, 1, config)
    assert all(torch.equal(tensor, before[key]) for key, tensor in read_tensors(config.run_dir).items())


def test_another_configuration_is_refused(tmp_path: Path, world: Path) -> None:
    run_ranks(run, 1, make_config(world, tmp_path / "run", num_steps=4))
    with pytest.raises(UserError, match=r"holds a run with seed=0, not 1"):
        run(ProcessInfo(), make_config(world, tmp_path / "run", seed=1))
    with pytest.raises(UserError, match=r"holds a run of 4 steps, more than num_steps=3"):
        run(ProcessInfo(), make_config(world, tmp_path / "run", num_steps=3))


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path, world: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty and not a run"):
        run(ProcessInfo(), make_config(world, tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, world: Path) -> None:
    config = make_config(world, tmp_path / "run", num_steps=4)
    run_ranks(run, 1, config)
    file = tmp_path / "run" / "checkpoints" / "step-00000004" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"rank-00000\.safetensors: the checksum is wrong"):
        run(ProcessInfo(), make_config(world, tmp_path / "run", num_steps=8))
