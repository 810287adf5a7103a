"""What was measured, by whom, when in training and under which rules; rules decide what may stand in one table."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megarec_tools.report.runs import Run, dataset_name, read_results


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Numbers under equal rules can be compared, others cannot.

    Attributes:
        protocol: its name and the fields that were changed, as `hstu_public, filter_seen=full`, but for `split` and
            `metrics`.
        split: the part of the dataset whose targets were asked for, `eval` or `valid`.
        window: the newest events of a history that were read; None: all.
        max_users: at most so many users were measured; 0: all.
        data: the dataset.
        metrics: those that the protocol names; empty if it names none.
        details: every field of the protocol and what was counted, for the reader.
        names_data: whether the title says which dataset it is.
    """

    protocol: str
    split: str
    window: int | None
    max_users: int
    data: str
    metrics: tuple[str, ...] = field(default=(), compare=False)
    details: str = field(default="", compare=False)
    names_data: bool = field(default=False, compare=False)

    @property
    def title(self) -> str:
        """The protocol, the split, and how much of it."""
        users = f", at most {self.max_users:,} users" if self.max_users else ""
        data = f"; {self.data}" if self.names_data else ""
        return f"protocol {self.protocol}; split {self.split}{users}{data}"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one predictor earned at one moment.

    Attributes:
        name: the predictor.
        rules: what it was asked.
        run: the run it comes from; None for a baseline, or a model that is not in the report.
        step: training steps behind it.
        by_hand: whether `megarec-evaluate` measured it, and not training.
        values: metrics of ranking and coverage.
        errors: their standard errors over users, where there are any.
        feedback: measures of each feedback field.
    """

    name: str
    rules: Rules
    run: Run | None = None
    step: int | None = None
    by_hand: bool = False
    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    feedback: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def curves(self) -> dict[str, float]:
        """Every number by one name, as `ndcg@10` and `listened/auc`."""
        feedback = {f"{head}/{name}": value for head, found in self.feedback.items() for name, value in found.items()}
        return self.values | feedback


def tell_datasets_apart(measured: Sequence[Measurement]) -> list[Measurement]:
    """The same measurements, with the dataset in their titles if there are several."""
    several = len({measurement.rules.data for measurement in measured}) > 1
    return [replace(m, rules=replace(m.rules, names_data=several)) for m in measured]


@dataclass(frozen=True, kw_only=True)
class Best:
    """The step of a run at which `metric` of its periodic evaluation, under `rules`, was highest."""

    step: int
    metric: str
    rules: Rules


def periodic(run: Run) -> list[Measurement]:
    """What training measured, in the order of steps."""
    found = []
    for record in run.evaluations:
        values = numbers(record.get("metrics"))
        found.append(
            Measurement(
                name=run.name,
                rules=_rules_of_record(run, record),
                run=run,
                step=int(record["step"]),
                values={name: value for name, value in values.items() if "/" not in name},
                errors=numbers(record.get("standard_errors")),
                feedback=_feedback(values),
            )
        )
    return found


def final(runs: Sequence[Run], evaluations: Sequence[str]) -> list[Measurement]:
    """Every row that `megarec-evaluate` wrote into a run or into one of `evaluations`.

    Raises:
        UserError: one of `evaluations` is none.
    """
    found = []
    for run in runs:
        if run.results is not None:
            found += _rows(run.results, runs, owner=run)
    for path in evaluations:
        found += _rows(read_results(Path(path)), runs, owner=None)
    return found


def last_step(run: Run) -> int:
    """The step of the newest periodic evaluation; without one, the last step that was logged."""
    return int((run.evaluations or run.metrics)[-1]["step"])


def best_step(run: Run) -> Best | None:
    """The best step of a run, by its periodic evaluations under the rules of the newest; None if there is none.

    The metric is the one that kept the best checkpoint, else NDCG@10, else the first. Of equal steps the first counts,
    as in training.
    """
    measured = periodic(run)
    measured = [measurement for measurement in measured if measurement.rules == measured[-1].rules]
    wanted = mapping(run.config.get("checkpoint")).get("keep_best") or "ndcg@10"
    names = dict.fromkeys(name for measurement in measured for name in measurement.curves)
    metric = wanted if wanted in names else next(iter(names), "")
    scored = [measurement for measurement in measured if metric in measurement.curves]
    if not scored:
        return None
    best = max(scored, key=lambda measurement: measurement.curves[metric])  # the first of equal ones
    assert best.step is not None
    return Best(step=best.step, metric=metric, rules=best.rules)


def mapping(value: Any) -> dict[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers of a mapping."""
    return {
        str(name): float(number)
        for name, number in mapping(value).items()
        if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    }


def _rows(results: dict[str, Any], runs: Sequence[Run], *, owner: Run | None) -> list[Measurement]:
    rows = [row for row in results["rows"] if isinstance(row, dict)]
    of_models = [row for row in rows if row.get("run") is not None]
    found = []
    for row in rows:
        run = None
        if row.get("run") is not None:
            path = Path(str(row["run"])).resolve()
            run = next((r for r in runs if path.is_relative_to(r.path)), None)  # a checkpoint lies in its run
            if run is None and len(of_models) == 1:  # the run was moved after it was measured
                run = owner
        step = row.get("step")
        found.append(
            Measurement(
                name=str(row.get("name")),
                rules=_rules_of_row(results, row),
                run=run,
                step=int(step) if isinstance(step, int | float) else None,
                by_hand=True,
                values={name: value for name, value in numbers(row.get("flat")).items() if "/" not in name},
                errors=numbers({k: mapping(e).get("standard_error") for k, e in mapping(row.get("ranking")).items()}),
                feedback={name: numbers(measures) for name, measures in mapping(row.get("feedback")).items()},
            )
        )
    return found


def _rules_of_row(results: dict[str, Any], row: dict[str, Any]) -> Rules:
    protocol, counts = mapping(row.get("protocol")), mapping(row.get("counts"))
    changed, metrics = results.get("changed"), protocol.get("metrics")
    label = [f"{name}={protocol.get(name)}" for name in changed] if isinstance(changed, list) else []
    fields = {key: value for key, value in protocol.items() if key not in ("name", "split", "metrics")}
    details = [f"split by {_listed(mapping(row.get('split')))}", _listed(fields)]
    details += [f"{counts[key]:,} {key}" for key in ("users", "targets") if isinstance(counts.get(key), int)]
    return Rules(
        protocol=_comparable([str(protocol.get("name")), *label]),
        split=str(protocol.get("split", "eval")),
        window=_count(protocol.get("max_history_events")),
        max_users=_count(results.get("max_users")) or 0,
        data=dataset_name(results.get("data")),
        metrics=tuple(map(str, metrics)) if isinstance(metrics, list) else (),
        details="; ".join(details),
    )


def _rules_of_record(run: Run, record: dict[str, Any]) -> Rules:
    """The rules of a periodic evaluation: what its record says, and the settings of its run."""
    settings, stream = mapping(run.config.get("protocol")), mapping(run.config.get("stream"))
    window = record.get("max_history_events", settings.get("max_history_events"))
    label = str(record.get("protocol", "default")).split(", ")
    return Rules(
        protocol=_comparable(label),
        split="valid" if "split=valid" in label else "eval",
        window=_count(stream.get("max_history_events") if window is None else window),
        max_users=_count(record.get("max_users", run.config.get("evaluate_users"))) or 0,
        data=dataset_name(run.config.get("data")),
    )


def _comparable(label: Sequence[str]) -> str:
    """The parts of a protocol's label that decide what a number means; the split stands for itself."""
    return ", ".join(part for part in label if not part.startswith(("split=", "metrics=")))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())


def _feedback(values: dict[str, float]) -> dict[str, dict[str, float]]:
    """`listened/auc` as measures of `listened`."""
    found: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        head, slash, measure = name.rpartition("/")
        if slash:
            found.setdefault(head, {})[measure] = value
    return found
