"""Every experiment composes, passes the checks of a run, and is what was published."""

import sys
from pathlib import Path
from typing import Any

import pytest

from megarec.base.config import build, flatten
from megarec.cli.command import read_command_line
from megarec.metrics.protocol import PROTOCOLS
from megarec.train.checks import check_run
from megarec.train.config import TrainConfig

FOLDER = Path(__file__).parents[2] / "megarec" / "conf" / "experiment"
EXPERIMENTS = sorted(
    str(file.relative_to(FOLDER).with_suffix("")) for file in FOLDER.rglob("*.yaml") if file.parent.name != "_shared"
)
PUBLIC = [name for name in EXPERIMENTS if name.startswith("public/")]

# meta-recsys/generative-recommenders, configs/*/*-final.gin; users after the published filters
USERS = {"ml1m": 6040, "ml20m": 138_493, "books": 694_898}
PASSES = {"ml1m": 101, "ml20m": 101, "books": 201}
NEGATIVES = {"ml1m": 128, "ml20m": 128, "books": 512}
LONGEST = {"ml1m": 200, "ml20m": 200, "books": 50}
BATCH = 128


def load(experiment: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], TrainConfig]:
    monkeypatch.setattr(sys, "argv", ["megarec-train", "data=data", f"experiment={experiment}"])
    settings = read_command_line("megarec-train", TrainConfig, about="", presets="train", ready={"protocol": PROTOCOLS})
    return settings, build(TrainConfig, settings)


def test_the_public_tables_are_whole() -> None:
    names = [f"public/{run}" for data in USERS for run in (f"hstu_{data}", f"hstu_{data}_large", f"sasrec_{data}")]
    assert sorted(PUBLIC) == sorted(names)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_passes_the_checks(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config = load(experiment, monkeypatch)
    for world in (1, 2):
        check_run(config, world=world)


@pytest.mark.parametrize("experiment", PUBLIC)
def test_public_recipe(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config = load(experiment, monkeypatch)
    model, data, *size = experiment.removeprefix("public/").split("_")
    assert config.model.name == model
    assert (config.model.num_layers in (8, 16)) == (size == ["large"])
    assert config.model.max_positions == LONGEST[data] + 11
    assert config.stream.max_history_events == config.protocol.max_history_events == LONGEST[data]
    assert config.protocol.name == "hstu_public"
    assert config.objective.num_uniform_negatives == NEGATIVES[data]
    assert config.num_steps == PASSES[data] * round(USERS[data] / BATCH)
    per_pass = config.num_steps // PASSES[data]
    assert config.evaluate_every_steps % per_pass == 0
    assert config.checkpoint.every_steps % config.evaluate_every_steps == 0
    # no user has more targets than a window, and the users of a step are about a batch
    assert config.stream.lanes * config.stream.tokens_per_pack < BATCH * LONGEST[data]


def test_hstu_on_movielens_1m(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, _ = load("public/hstu_ml1m", monkeypatch)
    found = flatten(settings)
    expected = {
        "num_steps": 101 * 47,
        "log_every_steps": 47,
        "evaluate_every_steps": 47,
        "evaluate_users": 0,
        "precision": "fp32",
        "protocol.name": "hstu_public",
        "model.name": "hstu",
        "model.num_layers": 2,
        "objective.next_item": "sampled",
        "objective.feedback_weight": 0.0,
        "objective.negatives": "per_position",
        "objective.num_uniform_negatives": 128,
        "objective.correction": "none",
        "stream.tokens_per_pack": 6976,
        "stream.lanes": 2,
        "stream.packs_per_lane": 1,
        "stream.max_history_events": 200,
        "stream.window": "newest",
        "stream.stochastic_length_alpha": 0.0,
        "optimizer.lr": 1e-3,
        "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.98,
        "optimizer.eps": 1e-8,
        "optimizer.weight_decay": 0.0,
        "optimizer.clip_norm": 0.0,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
        "tables.kind": "adam",
        "tables.lr_scale": 1.0,
        "tables.beta1": 0.9,
        "tables.beta2": 0.98,
        "tables.eps": 1e-8,
        "tables.weight_decay": 0.0,
        "tables.init_std": 0.02,
        "checkpoint.every_steps": 470,
        "checkpoint.keep_best": "ndcg@10",
    }
    assert {key: found[key] for key in expected} == expected
