"""The report: everything the runs say, in one HTML file that needs nothing else."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from megarec.base.files import new_file
from megarec.base.progress import say
from megarec_tools.report.charts import COLORS, draw_lines
from megarec_tools.report.command import ReportConfig
from megarec_tools.report.runs import Run, differing_settings, read_runs

SPEED = {
    "tokens_per_second": "Tokens per second",
    "data_wait": "Share of time waiting for data",
    "mfu": "Share of the matmul peak (MFU)",
    "memory_bytes": "Memory, bytes",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
}
COLUMNS = ("ndcg@10", "hr@10", "ndcg@100", "recall@100", "mrr", "coverage@10")
FEEDBACK_COLUMNS = ("auc", "gauc", "normalized_entropy", "calibration", "calibration_error", "count")


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A titled SVG."""

    title: str
    svg: Markup


@dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table: a header and rows of cells, the first of each a name."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def write_report(config: ReportConfig) -> None:
    """Reads the runs and writes the file, whole or not at all.

    Raises:
        UserError: a directory is no run.
    """
    runs = read_runs(config.runs)
    html = render(runs, title=config.title)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with new_file(output) as staging:
        staging.write_text(html, encoding="utf-8")
    say(f"{output}: {len(runs)} runs, {len(html.encode()) / 1e6:.1f} MB")


def render(runs: Sequence[Run], *, title: str) -> str:
    """The page; everything the runs say is escaped."""
    template = resources.files("megarec_tools.report").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    heads = dict.fromkeys(head for run in runs for record in run.metrics for head in _mapping(record.get("losses")))
    metrics = dict.fromkeys(m for run in runs for record in run.evaluations for m in _mapping(record.get("metrics")))
    return environment.from_string(template).render(
        title=title,
        legend=[(run.name, COLORS[place % len(COLORS)]) for place, run in enumerate(runs)],
        summary=summary_table(runs),
        losses=_charts(runs, {f"losses/{head}": f"Loss of {head}" for head in heads}),
        speed=_charts(runs, SPEED),
        evaluations=_evaluation_charts(runs, list(metrics)),
        results=[table for run in runs for table in result_tables(run)],
        differences=differing_settings(runs) if len(runs) > 1 else None,
        configs=[(run.name, yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)) for run in runs],
    )


def summary_table(runs: Sequence[Run]) -> Table:
    """One row per run: where it got to and how fast."""
    rows = []
    for run in runs:
        last = run.metrics[-1]
        losses = ", ".join(f"{head} {_number(value)}" for head, value in _mapping(last.get("losses")).items())
        seconds = sum(run.series("seconds")[1])
        rows.append(
            [
                run.name,
                f"{last['step']:,.0f}",
                losses,
                _median(run, "tokens_per_second", "{:,.0f}"),
                _median(run, "mfu", "{:.1%}"),
                _median(run, "data_wait", "{:.1%}"),
                f"{seconds / 60:,.1f} min",
            ]
        )
    header = ["run", "steps", "last loss", "tokens/s", "MFU", "data wait", "time"]
    return Table(title="Runs", header=header, rows=rows, note="Speeds are medians over the logging intervals.")


def result_tables(run: Run) -> list[Table]:
    """The final evaluation beside its baselines: ranking, then each feedback field."""
    if run.results is None:
        return []
    rows = [row for row in run.results["rows"] if isinstance(row, dict)]
    ranked = [row for row in rows if _mapping(row.get("ranking"))]
    tables = []
    if ranked:
        shown = [c for c in COLUMNS if any(c in _mapping(row.get("flat")) for row in ranked)]
        cells = [[str(row.get("name")), *(_ranking_cell(row, column) for column in shown)] for row in ranked]
        tables.append(Table(title=f"{run.name}: next item", header=["", *shown], rows=cells, note=_rules(ranked[0])))
    for field in dict.fromkeys(name for row in rows for name in _mapping(row.get("feedback"))):
        having = [row for row in rows if _mapping(_mapping(row.get("feedback")).get(field))]
        shown = [c for c in FEEDBACK_COLUMNS if any(c in _mapping(row["feedback"][field]) for row in having)]
        cells = [
            [str(row.get("name")), *(_feedback_cell(row["feedback"][field].get(c), c) for c in shown)] for row in having
        ]
        tables.append(Table(title=f"{run.name}: feedback {field}", header=["", *shown], rows=cells))
    return tables


def _charts(runs: Sequence[Run], titles: dict[str, str]) -> list[Chart]:
    charts = []
    for key, title in titles.items():
        lines = [series if series[0] else None for series in (run.series(key) for run in runs)]
        if any(line is not None for line in lines):
            charts.append(Chart(title=title, svg=Markup(draw_lines(lines, name=key))))
    return charts


def _evaluation_charts(runs: Sequence[Run], metrics: Sequence[str]) -> list[Chart]:
    charts = []
    for metric in metrics:
        lines = [series if series[0] else None for series in (run.evaluation_series(metric) for run in runs)]
        if any(line is not None for line in lines):
            svg = draw_lines(lines, name=f"evaluation/{metric}", marks=True)
            charts.append(Chart(title=metric, svg=Markup(svg)))
    return charts


def _ranking_cell(row: dict[str, Any], column: str) -> str:
    value = _mapping(row.get("flat")).get(column)
    error = _mapping(_mapping(row.get("ranking")).get(column)).get("standard_error")
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.4f}" if not isinstance(error, int | float) else f"{value:.4f} ± {error:.4f}"


def _feedback_cell(value: Any, column: str) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{value:,.0f}" if column == "count" else f"{value:.4f}"


def _rules(row: dict[str, Any]) -> str:
    counts, protocol = _mapping(row.get("counts")), _mapping(row.get("protocol"))
    split = _mapping(row.get("split")).get("rule", "?")
    rules = ", ".join(f"{key}={value}" for key, value in protocol.items() if key not in ("name", "ks"))
    who = f"{counts.get('users', '?')} users, {counts.get('targets', '?')} targets"
    return f"{who}, split {split}; {rules}. ± is one standard error over users."


def _median(run: Run, key: str, form: str) -> str:
    values = run.series(key)[1]
    return form.format(statistics.median(values)) if values else "-"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else str(value)
