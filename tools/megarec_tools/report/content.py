"""What a report says, before it becomes a page: groups of runs, tables and curves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megarec_tools.report.charts import Chart
from megarec_tools.report.command import ReportConfig
from megarec_tools.report.groups import Group, group_runs, join_curves
from megarec_tools.report.measurements import Measurement, final, mapping, periodic, tell_datasets_apart
from megarec_tools.report.references import read_references
from megarec_tools.report.runs import AXES, Run, read_runs
from megarec_tools.report.tables import (
    Table,
    feedback_tables,
    result_tables,
    settings_table,
    summary_table,
)

SPEED = {
    "tokens_per_second": "Tokens per second",
    "data_wait": "Share of time waiting for data",
    "mfu": "Share of the matmul peak (MFU)",
    "memory_bytes": "Memory, bytes",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
}


@dataclass(frozen=True, kw_only=True)
class Content:
    """A report.

    Attributes:
        title: its heading.
        groups: runs, those that differ only in their seed together.
        summary: one row per group.
        results: a table for each set of rules.
        settings: what differs between the groups; None for one group.
        curves: by heading.
    """

    title: str
    groups: Sequence[Group]
    summary: Table
    results: Sequence[Table]
    settings: Table | None
    curves: dict[str, list[Chart]]


def read_content(config: ReportConfig) -> Content:
    """Reads the runs and everything that was measured of them.

    Raises:
        UserError: a directory is no run, a file in it is broken, or a reference does not fit.
    """
    runs = read_runs(config.runs)
    groups = group_runs(runs)
    references = read_references(Path(config.references)) if config.references else []
    in_training = [measurement for run in runs for measurement in periodic(run)]
    measured = tell_datasets_apart(in_training + final(runs, config.evaluations))
    in_training = measured[: len(in_training)]
    return Content(
        title=config.title,
        groups=groups,
        summary=summary_table(groups),
        results=[
            *result_tables(groups, measured, references, metrics=config.metrics),
            *feedback_tables(groups, measured),
        ],
        settings=settings_table(groups),
        curves=_curves(groups, in_training),
    )


def _curves(groups: Sequence[Group], in_training: Sequence[Measurement]) -> dict[str, list[Chart]]:
    """Charts by heading; curves under different rules are never in one chart."""
    runs = [run for group in groups for run in group.runs]
    heads = dict.fromkeys(head for run in runs for record in run.metrics for head in mapping(record.get("losses")))
    losses = [c for head in heads for c in _charts(groups, f"Loss of {head}", _logged(f"losses/{head}"))]
    speed = [c for key, title in SPEED.items() for c in _charts(groups, title, _logged(key), axes=AXES[:1])]
    all_rules = list(dict.fromkeys(measurement.rules for measurement in in_training))
    evaluation = []
    for rules in all_rules:
        here = [measurement for measurement in in_training if measurement.rules == rules]
        for name in dict.fromkeys(name for measurement in here for name in measurement.curves):
            title = name if len(all_rules) == 1 else f"{name}: {rules.title}"
            evaluation += _charts(groups, title, _measured(name, here), marks=True)
    return {"Evaluation during training": evaluation, "Losses": losses, "Speed and optimisation": speed}


def _logged(key: str) -> Callable[[Run], dict[float, float]]:
    return lambda run: run.series(key)


def _measured(name: str, measured: Sequence[Measurement]) -> Callable[[Run], dict[float, float]]:
    """The curve of one metric; `measured` are the periodic evaluations under one set of rules."""

    def curve(run: Run) -> dict[float, float]:
        of_run = [m for m in measured if m.run is run and name in m.curves and m.step is not None]
        return {float(m.step or 0): m.curves[name] for m in of_run}

    return curve


def _charts(
    groups: Sequence[Group],
    title: str,
    curve: Callable[[Run], dict[float, float]],
    *,
    marks: bool = False,
    axes: Sequence[str] = AXES,
) -> list[Chart]:
    """One chart per axis that some group knows its place on."""
    charts = []
    for axis in axes:
        lines = [join_curves(group, curve, axis=axis) for group in groups]
        if any(line is not None for line in lines):
            charts.append(Chart(title=title, axis=axis, lines=lines, marks=marks))
    return charts
