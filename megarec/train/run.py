"""A training run from its configuration: a new one, or the one found in the run directory, continued."""

from pathlib import Path
from typing import Any

import torch
import yaml

from megarec.base.config import flatten, plain
from megarec.base.errors import UserError
from megarec.base.files import new_file
from megarec.base.memory import keep_freed_memory
from megarec.base.rank_log import RankLog
from megarec.checkpoint.load import Checkpoint
from megarec.checkpoint.manifest import read_pointer
from megarec.checkpoint.save import CheckpointWriter
from megarec.data.dataset import open_dataset
from megarec.parallel.broadcast import broadcast_object
from megarec.parallel.groups import ParallelGroups, ProcessInfo, start, stop
from megarec.train import state
from megarec.train.checks import check_dataset, check_evaluation, check_run
from megarec.train.config import TrainConfig
from megarec.train.hooks.checkpoint import CheckpointHook
from megarec.train.hooks.evaluation import EvaluationHook, Evaluator
from megarec.train.hooks.hook import Hook
from megarec.train.hooks.logging import LoggingHook
from megarec.train.trainer import Trainer

# What may change when a run goes on: everything else would make it another run.
CHANGEABLE = (
    "num_steps",
    "run_dir",
    "data",
    "verify_shards",
    "device",
    "num_threads",
    "tensorboard",
    "log_every_steps",
)
CHANGEABLE_SECTIONS = ("evaluate_", "protocol.", "checkpoint.", "layout.", "stream.prefetch_steps")


def train(config: TrainConfig, process: ProcessInfo, evaluator: Evaluator, log: RankLog | None = None) -> None:
    """Trains `config` to its last step, from the newest checkpoint in its run directory if there is one. Collective.

    Args:
        config: the run, equal on every rank.
        process: what the launcher told this process.
        evaluator: the periodic evaluation.
        log: what gets its folder in the run directory once the run is known to be good.

    Raises:
        UserError: the configuration does not fit the dataset, the ranks, or the run found in the run directory.
    """
    check_run(config, world=process.world)
    dataset = open_dataset(config.data)
    if config.verify_shards and process.rank == 0:
        dataset.verify()
    check_dataset(config, dataset)
    check_evaluation(config, dataset)
    run_dir = Path(config.run_dir)
    newest = find_run(run_dir, config)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    groups = start(config.layout, process)
    if groups.device.type == "cpu":
        keep_freed_memory()
    try:
        writer = CheckpointWriter(
            run_dir / "checkpoints",
            rank=groups.world.rank,
            world_size=groups.world.size,
            keep_last=config.checkpoint.keep_last,
        )
        trainer = Trainer(config, groups, dataset, hooks=_hooks(run_dir, evaluator, writer))
        if newest is not None:
            state.restore(newest, trainer)
        if groups.world.rank == 0:  # not before all of it is known to fit together
            write_config(run_dir, config)
        if log is not None:
            # after rank 0 has written it: logs without a configuration would not be taken for a run
            broadcast_object(None, groups.world)
            log.open(run_dir / "logs", about=whereabouts(groups))
        trainer.fit()
    finally:
        stop()


def find_run(run_dir: Path, config: TrainConfig) -> Checkpoint | None:
    """The newest checkpoint of the run in `run_dir`, or None for a new run.

    Raises:
        UserError: the directory holds something else, or a run of another configuration.
    """
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return None
    if not (run_dir / "config.yaml").is_file():
        raise UserError("not empty and not a run", where=str(run_dir), fix="Choose another run_dir")
    if read_pointer(run_dir / "checkpoints", "latest") is None:
        return None
    checkpoint = Checkpoint(run_dir)
    refuse_other_run(checkpoint.manifest.config, plain(config), where=str(run_dir))
    if checkpoint.step > config.num_steps:
        what = f"holds a run of {checkpoint.step} steps, more than num_steps={config.num_steps}"
        raise UserError(what, where=str(run_dir), fix="Choose another run_dir, or more steps")
    return checkpoint


def refuse_other_run(saved: dict[str, Any], wanted: dict[str, Any], *, where: str) -> None:
    """Raises `UserError` when `wanted` is not the configuration a run was `saved` with."""
    old, new = flatten(saved), flatten(wanted)
    for key in sorted(old.keys() | new.keys()):
        if key not in CHANGEABLE and not key.startswith(CHANGEABLE_SECTIONS) and old.get(key) != new.get(key):
            raise UserError(
                f"holds a run with {key}={old.get(key)}, not {new.get(key)}",
                where=where,
                fix="Choose another run_dir, or continue with the same setting",
            )


def write_config(run_dir: Path, config: TrainConfig) -> None:
    """Writes the whole configuration as `config.yaml`."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    with new_file(run_dir / "config.yaml") as staging:
        staging.write_text(yaml.safe_dump(plain(config), sort_keys=False), encoding="utf-8")


def whereabouts(groups: ParallelGroups) -> str:
    """The device of this rank and its place in the layout: `cuda:3, of 8 ranks, tensor 1 of 2, ...`, counted from 0."""
    dimensions = ("tensor", "context", "pipeline", "data")
    places = [f"{name} {getattr(groups, name).rank} of {getattr(groups, name).size}" for name in dimensions]
    return f"device {groups.device}, world {groups.world.rank} of {groups.world.size}, {', '.join(places)}"


def _hooks(run_dir: Path, evaluator: Evaluator, writer: CheckpointWriter) -> list[Hook]:
    return [LoggingHook(run_dir), CheckpointHook(writer), EvaluationHook(run_dir, evaluator, writer)]
