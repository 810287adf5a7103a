"""Small training runs for tests."""

from pathlib import Path
from typing import Any

import torch

from megarec.base.config import build
from megarec.checkpoint.load import Checkpoint
from megarec.parallel.groups import ProcessInfo
from megarec.train.config import TrainConfig
from megarec.train.run import train

SMALL_ARGUS = {
    "name": "argus",
    "width": 16,
    "table_width": 8,
    "max_positions": 32,
    "dropout": 0.1,
    "time_gap_buckets": 6,
    "block": {"num_heads": 2},
    "heads": {"query_width": 8, "hidden_width": 16},
}
SMALL_HSTU = {
    **SMALL_ARGUS,
    "name": "hstu",
    "block": {"num_heads": 2, "qk_head_width": 8, "v_head_width": 8, "num_time_buckets": 16},
}

SMALL_SASREC = {
    **SMALL_ARGUS,
    "name": "sasrec",
    "dropout": 0.2,
    "block": {"num_heads": 2, "feed_forward_width": 12},
}


def make_config(data: Path, run_dir: Path, *, model: dict[str, Any] | None = None, **settings: Any) -> TrainConfig:
    """A run of 12 steps on a tiny dataset: pools of one block, so that an epoch has several pools."""
    values: dict[str, Any] = {
        "data": str(data),
        "run_dir": str(run_dir),
        "num_steps": 12,
        "log_every_steps": 4,
        "tensorboard": False,
        "model": model or SMALL_ARGUS,
        "stream": {"tokens_per_pack": 96, "lanes": 2, "pool_blocks": 1, "max_history_events": 12, "packs_per_lane": 2},
        "objective": {"num_uniform_negatives": 8},
        "checkpoint": {"every_steps": 4},
    }
    return build(TrainConfig, {**values, **settings})


class NoEvaluation:
    """Stands where the periodic evaluation goes in runs that have none."""

    def measure(self, *_: Any) -> None:
        raise AssertionError("evaluation was off")

    summarize = measure


def run(process: ProcessInfo, config: TrainConfig) -> None:
    """Trains on this rank."""
    train(config, process, NoEvaluation())  # type: ignore[arg-type]


def read_tensors(run_dir: str) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, whole."""
    checkpoint = Checkpoint(Path(run_dir))
    return {name: checkpoint.read_whole(name) for name in checkpoint.names()}
