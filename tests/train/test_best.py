"""The best checkpoint is the one with the highest metric, also when the run is interrupted in between."""

from pathlib import Path
from typing import Any

import pytest

from megarec.checkpoint.manifest import read_pointer
from megarec.metrics.estimate import Estimate
from megarec.parallel.groups import ProcessInfo
from megarec.train.config import TrainConfig
from megarec.train.run import train
from megarec.train.trainer import Trainer
from tests.inference.synthetic import write_world
from tests.ranks import run_ranks
from tests.train.runs import make_config

SCORES = {2: 0.1, 4: 0.5, 6: 0.3, 8: 0.2, 10: 0.4, 12: 0.05, 14: 0.02}


class Scripted:
    """An evaluation whose result is known."""

    def measure(self, trainer: Trainer, *_: Any) -> int:
        return trainer.step

    def summarize(self, trainer: Trainer, shares: list[int]) -> dict[str, Estimate]:
        assert shares == [trainer.step] * trainer.groups.world.size
        return {"ndcg@10": Estimate(value=SCORES[trainer.step], standard_error=0.01, count=60)}


def scripted_run(process: ProcessInfo, config: TrainConfig) -> None:
    train(config, process, Scripted())


def best_of_run(folder: Path, *, num_steps: int, num_ranks: int = 1, **settings: Any) -> str:
    """Starts or continues the run; the name of the best checkpoint."""
    checkpoint = {"every_steps": 3, "keep_last": 1, "keep_best": "ndcg@10"}
    config = make_config(
        folder / "data",
        folder / "run",
        num_steps=num_steps,
        evaluate_every_steps=2,
        checkpoint=checkpoint,
        **settings,
    )
    run_ranks(scripted_run, num_ranks, config)
    best = read_pointer(folder / "run" / "checkpoints", "best")
    assert best is not None
    return best.name


def test_the_highest_metric_wins_and_is_remembered(tmp_path: Path) -> None:
    write_world(tmp_path / "data", num_users=60)
    assert best_of_run(tmp_path, num_steps=6, num_ranks=2) == "step-00000004"
    assert best_of_run(tmp_path, num_steps=10) == "step-00000004"
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == ["step-00000004", "step-00000010"]


def test_a_best_checkpoint_that_was_not_named_yet_is_named(tmp_path: Path) -> None:
    write_world(tmp_path / "data", num_users=60)
    assert best_of_run(tmp_path, num_steps=4, num_ranks=2) == "step-00000004"
    (tmp_path / "run" / "checkpoints" / "best").unlink()  # as after a kill in between
    assert best_of_run(tmp_path, num_steps=6) == "step-00000004"


RULES: list[dict[str, Any]] = [
    {"protocol": {"filter_seen": "full"}},
    {"protocol": {"max_history_events": 5}},
    {"evaluate_users": 9},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_what_was_measured_by_other_rules_does_not_compare(tmp_path: Path, rules: dict[str, Any]) -> None:
    write_world(tmp_path / "data", num_users=60)
    assert best_of_run(tmp_path, num_steps=6) == "step-00000004"
    assert best_of_run(tmp_path, num_steps=14, **rules) == "step-00000010"


def test_histories_longer_than_any_in_training_are_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_world(tmp_path / "data", num_users=60)
    best_of_run(tmp_path, num_steps=4, num_ranks=2, protocol={"max_history_events": 13})
    assert capfd.readouterr().out.count("note: histories of up to 13 events for a model trained on at most 12") == 1
