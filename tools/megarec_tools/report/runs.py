"""What run directories say, read without trust."""

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megarec.base.errors import UserError
from megarec.base.files import read_json, read_records, sha256_of

AXES = ("step", "epoch", "hours")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        name: unique among the runs of a report.
        path: its directory.
        config: the whole configuration.
        metrics: one record per logging interval.
        evaluations: one record per periodic evaluation.
        results: what `megarec-evaluate` wrote into the directory, or None.
    """

    name: str
    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    results: dict[str, Any] | None

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return int(self.metrics[-1]["step"])

    def series(self, key: str) -> dict[float, float]:
        """Values by step of one number of `metrics`; `losses/item` looks inside."""
        return _series(self.metrics, key.split("/", 1) if key.startswith("losses/") else [key])

    def places(self, steps: Sequence[float], axis: str) -> list[float]:
        """Where `steps` lie on an axis of `AXES`; epochs and hours are those of the newest record at each step.

        Empty if the run does not say.
        """
        if axis == "step":
            return list(steps)
        records = self.series("seconds" if axis == "hours" else axis)
        logged, known = list(records), list(records.values())
        if axis == "hours":
            known = list(itertools.accumulate(seconds / 3600 for seconds in known))
        newest = [bisect.bisect_right(logged, step) - 1 for step in steps]
        return [known[index] for index in newest] if newest and min(newest) >= 0 else []


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


def read_results(path: Path) -> dict[str, Any]:
    """What `megarec-evaluate` wrote: the file itself or the directory it lies in.

    Raises:
        UserError: it is no evaluation.
    """
    file = path / "evaluation.json" if path.is_dir() else path
    results = read_json(file, what="evaluation")
    if not isinstance(results, dict) or not isinstance(results.get("rows"), list):
        raise UserError("not an evaluation", where=str(file), fix="Run megarec-evaluate again")
    return results


def dataset_name(path: Any) -> str:
    """A dataset that lies here is called by what is in it, so that a copy is the same; else by its path."""
    described = Path(str(path)) / "dataset.json"
    return f"dataset {sha256_of(described)[:12]}" if described.is_file() else str(path)


def read_yaml(path: Path, *, what: str) -> dict[Any, Any]:
    """A mapping from a yaml or JSON file.

    Raises:
        UserError: it is not there, is broken or holds something else.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no {what} here", where=str(path), fix="Check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"not valid yaml ({' '.join(str(error).split())[:120]})", where=str(path)) from None
    if not isinstance(value, dict):
        raise UserError(f"the {what} is not a mapping", where=str(path))
    return value


def _read_run(path: Path, *, name: str) -> Run:
    file = path / "config.yaml"
    if not file.is_file():
        raise UserError("not a run directory: it has no config.yaml", where=str(path), fix="Give run_dir of a training")
    config = read_yaml(file, what="configuration")
    metrics, evaluations = (_records(path / name) for name in ("metrics.jsonl", "evaluations.jsonl"))
    if not metrics:
        raise UserError("the run has logged nothing yet", where=str(path / "metrics.jsonl"))
    return Run(
        name=name,
        path=path,
        config=config,
        metrics=metrics,
        evaluations=evaluations,
        results=read_results(path) if (path / "evaluation.json").is_file() else None,
    )


def _records(path: Path) -> list[dict[str, Any]]:
    records = read_records(path)
    if not all(math.isfinite(record["step"]) for record in records):
        raise UserError("a step is not a number", where=str(path))
    return records


def _series(records: Sequence[dict[str, Any]], path: Sequence[str]) -> dict[float, float]:
    values = {}
    for record in records:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            values[float(record["step"])] = float(value)
    return values
