"""A run in two parts says and ends with what the run in one part does, whatever keeps count of its own updates."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megarec_kernels.dropout import DropoutMask

from megarec.data.dataset import open_dataset
from megarec.parallel.groups import ProcessInfo, start, stop
from megarec.train.config import TrainConfig
from megarec.train.trainer import Trainer
from tests.inference.synthetic import write_world
from tests.ranks import run_ranks
from tests.train.runs import make_config, read_tensors, run

MEASURED = ("seconds", "tokens_per_second", "tflops", "mfu", "data_wait", "memory_bytes")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "data"
    write_world(path, num_users=60)
    return path


def metrics_of(config: TrainConfig) -> list[dict[str, Any]]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


@pytest.mark.parametrize("kind", ["adam", "rowwise_adam"])
def test_bias_correction_and_metrics_go_on(world: Path, tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {"tables": {"kind": kind}, "log_every_steps": 1}
    whole = make_config(world, tmp_path / "whole", num_steps=6, **settings)
    parts = make_config(world, tmp_path / "parts", num_steps=3, **settings)
    for config in (whole, parts, replace(parts, num_steps=6)):
        run_ranks(run, 1, config)
    ours, theirs = read_tensors(whole.run_dir), read_tensors(parts.run_dir)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert metrics_of(whole) == metrics_of(parts)
    assert [record["step"] for record in metrics_of(parts)] == [1, 2, 3, 4, 5, 6]


def draw_masks(process: ProcessInfo, config: TrainConfig) -> list[tuple[int, list[int]]]:
    """The key and the token numbers of every dropout mask of a run."""
    groups = start(config.layout, process)
    masks: list[tuple[int, list[int]]] = []
    draw = DropoutMask.keep

    def keep(mask: DropoutMask, width: int) -> torch.Tensor:
        masks.append((mask.key, mask.token.tolist()))
        return draw(mask, width)

    DropoutMask.keep = keep  # type: ignore[method-assign]
    Trainer(config, groups, open_dataset(config.data), hooks=[]).fit()
    stop()
    return masks


def test_no_two_masks_have_one_key_and_no_two_tokens_one_number(world: Path, tmp_path: Path) -> None:
    (masks,) = run_ranks(draw_masks, 1, make_config(world, tmp_path / "run", num_steps=3))
    keys = [key for key, _ in masks]
    assert len(set(keys)) == len(keys) > 3 * 4 * 3  # steps x packs x (input and two sites of each layer)
    for _, tokens in masks:
        assert tokens == list(range(len(tokens)))
