"""Periodic evaluation, which names the best checkpoint."""

import json
import math
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megarec.base.files import read_records
from megarec.base.progress import say
from megarec.checkpoint.save import CheckpointWriter
from megarec.metrics.estimate import Estimate
from megarec.parallel.broadcast import broadcast_object, gather_objects
from megarec.train import state
from megarec.train.config import TrainConfig
from megarec.train.hooks.hook import Hook
from megarec.train.hooks.logging import keep_until
from megarec.train.step import StepResult
from megarec.train.trainer import Trainer


class Evaluator(Protocol):
    """The periodic evaluation: every rank measures its share of the users, the shares become metrics."""

    def measure(self, trainer: Trainer, dense: dict[str, Tensor], tables: dict[str, Tensor]) -> Any:
        """What this rank sees of its share of the users, given the whole weights."""
        ...

    def summarize(self, trainer: Trainer, shares: list[Any]) -> dict[str, Estimate]:
        """The metrics of all shares together, such as `ndcg@10`, equal on every rank; an error may be nan."""
        ...


class EvaluationHook(Hook):
    """Evaluates every `evaluate_every_steps` steps and after the last; marks the best checkpoint if asked to."""

    def __init__(self, run_dir: Path, evaluator: Evaluator, writer: CheckpointWriter) -> None:
        self._run_dir = run_dir
        self._evaluator = evaluator
        self._writer = writer
        self._best = float("-inf")

    def start(self, trainer: Trainer) -> None:
        """Drops evaluations of steps that will be taken again and finds the best of the others."""
        metric, best_step = trainer.config.checkpoint.keep_best, 0
        path = self._run_dir / "evaluations.jsonl"
        if trainer.groups.world.rank == 0:
            keep_until(path, trainer.step)
            if trainer.config.evaluate_every_steps:
                trainer.config.protocol.say_of_longer_histories(trainer.config.max_history_events)
            if metric:
                # what other rules measured does not compare
                rules = _rules(trainer.config).items()
                records = read_records(path)
                done = [r for r in records if all(r.get(key, value) == value for key, value in rules)]
                scores = [(r["metrics"][metric], -r["step"]) for r in done if metric in r["metrics"]]
                self._best, best_step = max(scores, default=(self._best, 0))
        self._best, best_step = broadcast_object((self._best, best_step), trainer.groups.world)
        if best_step and -best_step == trainer.step:  # killed before it was named
            self._writer.mark_best(trainer.step)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Evaluates when it is due."""
        every = trainer.config.evaluate_every_steps
        last = trainer.step == trainer.config.num_steps
        if not every or (trainer.step % every and not last):
            return
        share = self._evaluator.measure(trainer, *state.whole_weights(trainer))
        metrics = self._evaluator.summarize(trainer, gather_objects(share, trainer.groups.world))
        if trainer.groups.world.rank == 0:
            self._write(trainer, metrics)
        self._keep_best(trainer, metrics)

    def _write(self, trainer: Trainer, metrics: dict[str, Estimate]) -> None:
        config, values = trainer.config, {name: estimate.value for name, estimate in metrics.items()}
        errors = {name: e.standard_error for name, e in metrics.items() if not math.isnan(e.standard_error)}
        record = {
            "step": trainer.step,
            "metrics": values,
            "standard_errors": errors,
            **_rules(config),
        }
        with (self._run_dir / "evaluations.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        say(f"evaluation at step {trainer.step}  {shown}")
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(str(self._run_dir / "tensorboard")) as board:
                for name, value in values.items():
                    board.add_scalar(f"evaluation/{name}", value, trainer.step)

    def _keep_best(self, trainer: Trainer, metrics: dict[str, Estimate]) -> None:
        best = metrics.get(trainer.config.checkpoint.keep_best or "")  # what these users leave undefined is not there
        if best is not None and best.value > self._best:
            self._best = best.value
            if self._writer.newest_step != trainer.step:
                state.save(self._writer, trainer)
            self._writer.mark_best(trainer.step)


def _rules(config: TrainConfig) -> dict[str, Any]:
    """What an evaluation was asked: numbers under other rules do not compare."""
    return {
        "protocol": config.protocol.label,
        "max_history_events": config.protocol.max_history_events or config.max_history_events,
        "max_users": config.evaluate_users,
    }
