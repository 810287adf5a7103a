"""Every ready experiment composes, is a configuration, and passes the checks of a run."""

import sys
from importlib.resources import files
from pathlib import Path

import pytest

from megarec.base.config import build
from megarec.cli.command import read_command_line
from megarec.metrics.protocol import PROTOCOLS
from megarec.models.sasrec.config import SasrecConfig
from megarec.train.checks import check_run
from megarec.train.config import TrainConfig

EXPERIMENTS = sorted(file.stem for file in (Path(str(files("megarec.conf"))) / "experiment").glob("*.yaml"))
PUBLIC = [name for name in EXPERIMENTS if name != "quickstart"]
USERS = {"ml1m": 6_040, "ml20m": 138_493, "books": 694_898}  # Books: after the filters; HLLM (arXiv 2409.12740)
PASSES = {"ml1m": 101, "ml20m": 101, "books": 201}


def load(experiment: str, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setattr(sys, "argv", ["megarec-train", "data=data", f"experiment={experiment}"])
    settings = read_command_line("megarec-train", TrainConfig, about="", presets="train", ready={"protocol": PROTOCOLS})
    return build(TrainConfig, settings)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_it_can_run_on_one_and_two_ranks(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(experiment, monkeypatch)
    for world in (1, 2):
        check_run(config, world=world)


def test_every_public_table_has_its_three_recipes() -> None:
    assert sorted(e.format(data) for data in USERS for e in ("hstu_{}", "hstu_{}_large", "sasrec_{}")) == PUBLIC


@pytest.mark.parametrize("experiment", PUBLIC)
def test_a_run_is_the_published_number_of_passes(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(experiment, monkeypatch)
    data = experiment.split("_")[1]
    steps = round(USERS[data] / 128)
    assert config.num_steps == PASSES[data] * steps
    assert config.evaluate_every_steps == (5 if data == "books" else 1) * steps  # full_eval_every_n
    assert config.checkpoint.every_steps % steps == 0
    assert config.checkpoint.keep_best == "ndcg@10"
    # in the mean a user has fewer targets than a window
    assert config.stream.lanes * config.stream.tokens_per_pack < 128 * config.stream.max_history_events


@pytest.mark.parametrize("experiment", PUBLIC)
def test_the_public_recipe(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 2.4 of the public code: train_fn and the .gin files."""
    config = load(experiment, monkeypatch)
    books = "books" in experiment
    objective, optimizer, tables = config.objective, config.optimizer, config.tables
    assert (objective.negatives, objective.num_uniform_negatives) == ("per_position", 512 if books else 128)
    assert (objective.next_item, objective.correction, objective.feedback_weight) == ("sampled", "none", 0.0)
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps) == (1e-3, 0.9, 0.98, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.warmup_steps) == (0, 0, 0)
    assert optimizer.schedule == "constant"
    assert (tables.kind, tables.beta1, tables.beta2, tables.eps) == ("adam", 0.9, 0.98, 1e-8)
    assert (tables.lr_scale, tables.weight_decay, tables.init_std) == (1.0, 0.0, 0.02)
    assert config.stream.max_history_events == config.protocol.max_history_events == (50 if books else 200)
    assert (config.protocol.name, config.protocol.filter_seen) == ("hstu_public", "window")
    assert isinstance(config.model, SasrecConfig) == experiment.startswith("sasrec")
    assert (config.model.num_layers > 4) == experiment.endswith("_large")


def test_movielens_1m_has_128_users_a_step_and_101_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("hstu_ml1m", monkeypatch)
    targets = 652_098  # of 6,040 users in windows of 200
    epoch = targets / (config.stream.tokens_per_pack * config.stream.lanes)
    assert 6_040 / epoch == pytest.approx(128, rel=0.02)
    assert config.num_steps / epoch == pytest.approx(101, rel=0.01)
