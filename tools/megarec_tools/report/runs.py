"""What a run directory says, read without trust."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megarec.base.config import flatten
from megarec.base.errors import UserError
from megarec.base.files import read_json, read_records


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        name: unique among the runs of a report.
        config: the whole configuration.
        metrics: one record per logging interval.
        evaluations: one record per periodic evaluation: `step` and `metrics`.
        results: what `megarec-evaluate` wrote, or None.
    """

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    results: dict[str, Any] | None

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one number of `metrics`; `losses/item` looks inside."""
        return _series(self.metrics, key.split("/", 1) if key.startswith("losses/") else [key])

    def evaluation_series(self, metric: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric of the periodic evaluation."""
        return _series(self.evaluations, ["metrics", metric])


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Reads every run; runs of one directory name are told apart by their paths.

    Raises:
        UserError: a directory is no run, or a file in it is broken.
    """
    resolved = [Path(path).resolve() for path in paths]
    if len(set(resolved)) != len(resolved):
        raise UserError("a run is named twice", where="runs")
    names = [path.name for path in resolved]
    return [
        _read_run(path, name=path.name if names.count(path.name) == 1 else given)
        for path, given in zip(resolved, paths, strict=True)
    ]


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Every setting that is not the same in all runs, with its value in each; `-` where a run lacks it."""
    flat = [{key: _shown(value) for key, value in flatten(run.config).items()} for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [(key, [config.get(key, "-") for config in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _read_run(path: Path, *, name: str) -> Run:
    file = path / "config.yaml"
    if not file.is_file():
        raise UserError("not a run directory: it has no config.yaml", where=str(path), fix="Give run_dir of a training")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not valid yaml ({' '.join(str(error).split())[:120]})", where=str(file)) from None
    if not isinstance(config, dict):
        raise UserError("not a mapping of settings", where=str(file))
    metrics = read_records(path / "metrics.jsonl")
    if not metrics:
        raise UserError("the run has logged nothing yet", where=str(path / "metrics.jsonl"))
    results = None
    if (path / "evaluation.json").is_file():
        results = read_json(path / "evaluation.json", what="evaluation")
        if not isinstance(results, dict) or not isinstance(results.get("rows"), list):
            raise UserError("not an evaluation", where=str(path / "evaluation.json"), fix="Run megarec-evaluate again")
    return Run(
        name=name,
        config=config,
        metrics=metrics,
        evaluations=read_records(path / "evaluations.jsonl"),
        results=results,
    )


def _series(records: Sequence[dict[str, Any]], path: Sequence[str]) -> tuple[list[float], list[float]]:
    steps, values = [], []
    for record in records:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            steps.append(float(record["step"]))
            values.append(float(value))
    return steps, values


def _shown(value: Any) -> str:
    return "" if value is None else str(value)
