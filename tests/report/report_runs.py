"""Run directories and evaluations as the commands write them, with numbers that are easy to check."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megarec.base.config import plain
from megarec.cli.evaluation_report import FORMAT
from megarec.metrics.protocol import PROTOCOLS, Protocol

PROTOCOL = replace(PROTOCOLS["hstu_public"], metrics=("hr@10", "ndcg@10"))


def write_run(
    path: Path,
    *,
    seed: int = 0,
    lr: float = 0.1,
    head: str = "next_item",
    ndcg: dict[int, float] | None = None,
    loss: float = 5.0,
    protocol: Protocol = PROTOCOL,
    settings: dict[str, Any] | None = None,
) -> Path:
    """A run of 50 steps, `ndcg` by evaluated step; its standard errors are a tenth of the values."""
    path.mkdir(parents=True)
    config = {
        "data": "somewhere", "run_dir": str(path), "seed": seed, "evaluate_users": 0, "optimizer": {"lr": lr},
        "model": {"name": "argus"}, "protocol": plain(protocol), "stream": {"max_history_events": 100},
        "checkpoint": {"keep_best": None}, **(settings or {}),
    }  # fmt: skip
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {"step": step, "epoch": step / 20, "seconds": 36.0, "losses": {head: loss / step},
         "tokens_per_second": 1e3 * step, "data_wait": 0.01, "mfu": 0.4, "learning_rate": lr, "grad_norm": 1.0,
         "memory_bytes": 2**30}
        for step in range(10, 60, 10)
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {20: 0.2, 40: 0.4} if ndcg is None else ndcg
    evaluations = [
        {"step": step, "metrics": {"hr@10": value * 1.5, "ndcg@10": value},
         "standard_errors": {"hr@10": value * 0.15, "ndcg@10": value / 10}, "protocol": protocol.label}
        for step, value in values.items()
    ]  # fmt: skip
    (path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    return path


def result_row(name: str, ndcg: float, *, protocol: Protocol = PROTOCOL, **facts: Any) -> dict[str, Any]:
    """One row of evaluation.json."""
    values = {"hr@10": ndcg * 1.5, "ndcg@10": ndcg}
    ranking = {metric: {"value": v, "standard_error": v / 10, "count": 9} for metric, v in values.items()}
    return {
        "name": name, "ranking": ranking, "flat": {**values, "coverage@10": 0.5}, "protocol": plain(protocol),
        "counts": {"users": 9, "targets": 9}, "split": {"rule": "leave_last_out"}, "feedback": {}, **facts,
    }  # fmt: skip


def write_evaluation(
    directory: Path, rows: list[dict[str, Any]], *, protocol: Protocol = PROTOCOL, **facts: Any
) -> Path:
    """The evaluation.json of these rows, as of the dataset `somewhere`."""
    directory.mkdir(exist_ok=True)
    of_all = {"data": "somewhere", "protocol": plain(protocol), "changed": protocol.changed, **facts}
    (directory / "evaluation.json").write_text(json.dumps({"format": FORMAT, **of_all, "rows": rows}))
    return directory
