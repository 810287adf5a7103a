"""What `megarec-evaluate` prints and writes: an aligned table, evaluation.json and a bar chart."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarec.base.config import plain
from megarec.base.files import new_file, write_json
from megarec.base.progress import say
from megarec.inference.evaluate import Result

FORMAT = "megarec-evaluation-1"
FEEDBACK_COLUMNS = ("auc", "gauc", "normalized_entropy", "calibration", "calibration_error")


def print_tables(results: Sequence[Result]) -> None:
    """Prints the protocol and its metrics with their standard errors, then the feedback fields."""
    ranked = [result for result in results if result.ranking]
    if ranked:
        counts, metrics = ranked[0].counts, ranked[0].protocol.metrics
        say(f"{counts['ranked_users']:,} users, {counts['ranked_targets']:,} targets; {describe_protocol(ranked[0])}")
        rows = [[r.name, *(_ranking_cell(r, name) for name in metrics)] for r in ranked]
        say(align([["", *metrics], *rows]))
        say("± is one standard error over users")
    for field in dict.fromkeys(name for result in results for name in result.feedback):
        _print_feedback(results, field)


def describe_protocol(result: Result) -> str:
    """The rules behind a result, in one line."""
    p = result.protocol
    window = "whole history" if p.max_history_events is None else f"newest {p.max_history_events} events"
    rules = f"{result.split.get('rule', 'split')}, {window}, filter_seen={p.filter_seen}, catalog={p.catalog}"
    return f"protocol {p.label}: {rules}, query time: {p.query_time}"


def write_results(directory: Path, rows: Sequence[tuple[Result, dict[str, Any]]], *, facts: dict[str, Any]) -> None:
    """Writes `evaluation.json` (and `evaluation.png`) into `directory`, which may hold other files already.

    Args:
        directory: where to.
        rows: the results, each with facts of its own, such as the run it is of.
        facts: of all rows.
    """
    directory.mkdir(parents=True, exist_ok=True)
    protocol = rows[0][0].protocol
    facts = {**facts, "protocol": plain(protocol), "changed": protocol.changed}
    written = [{**plain(result), "flat": result.flat(), **own} for result, own in rows]
    write_json(directory / "evaluation.json", _without_nan({"format": FORMAT, **facts, "rows": written}))
    ranked = [result for result, _ in rows if result.ranking]
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
    axes.set_yticks(places, [result.name.replace("$", r"\$") for result in results])  # no mathematics
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


def _headline(result: Result) -> str:
    return "ndcg@10" if "ndcg@10" in result.ranking else next(iter(result.ranking))


def _ranking_cell(result: Result, name: str) -> str:
    if name in result.coverage:
        return f"{result.coverage[name]:.4f}"
    estimate = result.ranking.get(name)
    return "-" if estimate is None else f"{estimate.value:.4f} ±{_number(estimate.standard_error):.4f}"


def _print_feedback(results: Sequence[Result], field: str) -> None:
    measured = {result.name: result.feedback[field] for result in results if field in result.feedback}
    rates = [measures for name, measures in measured.items() if name.endswith(" rate")]
    if len(rates) > 1:
        measured["better rate"] = better_of(rates)
    shown = [name for name in FEEDBACK_COLUMNS if any(name in measures for measures in measured.values())]
    cells = [[name, *(f"{m[c]:.4f}" if c in m else "-" for c in shown)] for name, m in measured.items()]
    say(f"\nfeedback '{field}' of {next(iter(measured.values()))['count']:,.0f} targets")
    say(align([["", *shown], *cells]))


def better_of(rates: Sequence[dict[str, float]]) -> dict[str, float]:
    """The best value of each measure: what a head must beat. Higher is better for AUC, 1 for calibration."""
    best = {}
    for name in FEEDBACK_COLUMNS:
        values = [rate[name] for rate in rates if name in rate]
        if values and name in ("auc", "gauc"):
            best[name] = max(values)
        elif values:
            best[name] = min(values, key=lambda value: abs(value - 1) if name == "calibration" else value)
    return best


def _number(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _without_nan(value: Any) -> Any:
    """JSON has no nan: such numbers become null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
