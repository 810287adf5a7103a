"""What `megarec-evaluate` prints and writes: an aligned table, evaluation.json and a bar chart."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarec.base.config import plain
from megarec.base.errors import UserError, nearest
from megarec.base.files import new_file, write_json
from megarec.inference.evaluate import Result

FORMAT = "megarec-evaluation-1"
FEEDBACK_COLUMNS = ("auc", "gauc", "normalized_entropy", "calibration", "calibration_error")


def print_tables(results: Sequence[Result], *, metrics: Sequence[str]) -> None:
    """Prints ranking metrics with their standard errors, then the feedback fields.

    Raises:
        UserError: a metric is unknown.
    """
    ranked = [result for result in results if result.ranking]
    known = list(dict.fromkeys(name for result in ranked for name in (*result.ranking, *result.coverage)))
    for name in metrics if ranked else ():
        kind, _, cutoff = name.partition("@")
        if name not in known and not (cutoff.isdigit() and any(k.startswith(f"{kind}@") for k in known)):
            raise UserError(f"no metric '{name}'", where="metrics", fix=nearest(name, known))
    shown = [name for name in metrics if name in known]  # a small catalog has no large cut-offs
    if ranked:
        counts = ranked[0].counts
        say(f"{counts['users']:,} users, {counts['targets']:,} targets; {describe_protocol(ranked[0])}")
        rows = [[r.name, *(_ranking_cell(r, name) for name in shown)] for r in ranked]
        say(align([["", *shown], *rows]))
    for field in dict.fromkeys(name for result in results for name in result.feedback):
        rows = [[r.name, *_feedback_cells(r.feedback[field])] for r in results if field in r.feedback]
        rows += _better_rate(results, field)
        count = next(r.feedback[field]["count"] for r in results if field in r.feedback)
        say(f"\nfeedback '{field}' of {count:,.0f} targets")
        say(align([["", *FEEDBACK_COLUMNS], *rows]))


def describe_protocol(result: Result) -> str:
    """The rules behind a result, in one line."""
    p = result.protocol
    window = "whole history" if p.max_history_events is None else f"newest {p.max_history_events} events"
    return f"{result.split.get('rule', 'split')}, {window}, filter_seen={p.filter_seen}, query time: {p.query_time}"


def write_results(directory: Path, results: Sequence[Result], *, facts: dict[str, Any]) -> None:
    """Writes `evaluation.json` (and `evaluation.png`) into `directory`, which may hold other files already."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [{**plain(result), "flat": result.flat()} for result in results]
    write_json(directory / "evaluation.json", _without_nan({"format": FORMAT, **facts, "rows": rows}))
    ranked = [result for result in results if result.ranking]
    if ranked:
        draw_bars(directory / "evaluation.png", ranked, metric=_headline(ranked[0]))


def draw_bars(path: Path, results: Sequence[Result], *, metric: str) -> None:
    """One bar per row with an error bar of two standard errors."""
    from matplotlib.figure import Figure

    values = [result.ranking[metric].value for result in results]
    errors = [2 * _number(result.ranking[metric].standard_error) for result in results]
    figure = Figure(figsize=(7, 0.5 + 0.42 * len(results)), layout="constrained")
    axes = figure.subplots()
    places = list(range(len(results)))[::-1]
    bars = axes.barh(places, values, xerr=errors, color="#4c78a8", ecolor="#555555", capsize=3, height=0.62)
    axes.bar_label(bars, [f"{value:.4f}" for value in values], padding=6)
    axes.set_yticks(places, [result.name for result in results])
    axes.set_xlim(0, max(v + e for v, e in zip(values, errors, strict=True)) * 1.18 or 1)
    axes.set_title(f"{metric}, with two standard errors", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    with new_file(path) as staging:
        figure.savefig(staging, format="png", dpi=140)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )


def say(line: str) -> None:
    """Prints a part of the result."""
    print(line)  # noqa: T201


def _headline(result: Result) -> str:
    return "ndcg@10" if "ndcg@10" in result.ranking else next(n for n in result.ranking if n.startswith("ndcg"))


def _ranking_cell(result: Result, name: str) -> str:
    if name in result.coverage:
        return f"{result.coverage[name]:.4f}"
    estimate = result.ranking.get(name)
    return "-" if estimate is None else f"{estimate.value:.4f} ±{_number(estimate.standard_error):.4f}"


def _feedback_cells(measures: dict[str, float]) -> list[str]:
    return [f"{measures[name]:.4f}" if name in measures else "-" for name in FEEDBACK_COLUMNS]


def _better_rate(results: Sequence[Result], field: str) -> list[list[str]]:
    """The better of the two rates by each measure: what a head must beat."""
    rates = [r.feedback[field] for r in results if r.name.endswith(" rate") and field in r.feedback]
    if len(rates) < 2:
        return []
    best: dict[str, float] = {}
    for name in FEEDBACK_COLUMNS:
        values = [rate[name] for rate in rates if name in rate]
        if values:
            distance = {"auc": -1.0, "gauc": -1.0}.get(name, 1.0)
            best[name] = min(values, key=lambda v: abs(v - 1) if name == "calibration" else distance * v)
    return [["better rate", *_feedback_cells(best)]]


def _number(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _without_nan(value: Any) -> Any:
    """JSON has no nan: such numbers become null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
