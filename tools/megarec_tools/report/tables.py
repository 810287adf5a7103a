"""Tables of a report: what the runs did, what they earned with its noise, and what sets them apart."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megarec.base.errors import UserError, nearest
from megarec_tools.report.groups import Group, differing_settings, spread
from megarec_tools.report.measurements import Measurement, Rules, best_step, last_step, mapping
from megarec_tools.report.references import Reference, place_references

FEEDBACK_COLUMNS = ("auc", "gauc", "normalized_entropy", "calibration", "calibration_error", "count")
NOISE = "± is one standard error over users; of several seeds it is the mean of theirs, for the users are the same."
DEVIATION = "sd is the sample standard deviation over seeds."


@dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table: a header and rows of cells, the first of each a name; `warning` is a note that must be seen."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    warning: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of results: the same moment of every seed of a group, or one baseline."""

    name: str
    moment: str = ""
    num_runs: int = 1
    seeds: Sequence[Measurement]


def summary_table(groups: Sequence[Group]) -> Table:
    """One row per group: where it got to and how fast."""
    rows = []
    for group in groups:
        heads = dict.fromkeys(head for run in group.runs for head in mapping(run.metrics[-1].get("losses")))
        losses = []
        for head in heads:
            last = [list(series.values())[-1] for run in group.runs if (series := run.series(f"losses/{head}"))]
            losses += [f"{head} {statistics.fmean(last):.4f}"] if last else []
        minutes = statistics.fmean([sum(run.series("seconds").values()) / 60 for run in group.runs])
        rows.append(
            [
                group.name,
                f"{len(group.runs)}",
                _between([run.last_step for run in group.runs]),
                ", ".join(losses),
                _median(group, "tokens_per_second", "{:,.0f}"),
                _median(group, "mfu", "{:.1%}"),
                _median(group, "data_wait", "{:.1%}"),
                f"{minutes:,.1f} min",
            ]
        )
    header = ["", "seeds", "steps", "last loss", "tokens/s", "MFU", "data wait", "time"]
    note = "Speeds are medians over the logging intervals, losses and times means over seeds."
    return Table(title="Runs", header=header, rows=rows, notes=[note])


def result_tables(
    groups: Sequence[Group],
    measured: Sequence[Measurement],
    references: Sequence[Reference] = (),
    *,
    metrics: Sequence[str] = (),
) -> list[Table]:
    """One table for each set of rules: groups at their last and best step, baselines once, quoted rows.

    Args:
        groups: who is compared.
        measured: everything that was measured, periodic evaluations first.
        references: quoted rows.
        metrics: columns; none: the usual ones that were measured.

    Raises:
        UserError: nobody measured one of `metrics`, or a quoted row has no table.
    """
    ranked = [measurement for measurement in measured if measurement.values]
    known = list(dict.fromkeys(name for m in ranked for name in m.values))
    for name in metrics:
        if ranked and name not in known:
            raise UserError(f"no metric '{name}'", where="metrics", fix=nearest(name, known))
    all_rules = list(dict.fromkeys(measurement.rules for measurement in ranked))
    placed = place_references(references, all_rules)
    tables = []
    for rules in all_rules:
        here = [measurement for measurement in ranked if measurement.rules == rules]
        quoted = placed.get(rules, [])
        named = [name for m in here for name in m.rules.metrics or m.values if name in known]
        shown = metrics or list(dict.fromkeys([*named, *(name for r in quoted for name in r.values)]))
        tables.append(_result_table(groups, rules.title, here, shown, quoted=quoted))
    return tables


def feedback_tables(groups: Sequence[Group], measured: Sequence[Measurement]) -> list[Table]:
    """One table for each set of rules and feedback field that a run predicts."""
    tables = []
    for rules in dict.fromkeys(measurement.rules for measurement in measured):
        here = [measurement for measurement in measured if measurement.rules == rules]
        for head in dict.fromkeys(name for m in here if m.run is not None for name in m.feedback):
            of_head = [replace(m, values=m.feedback[head], errors={}) for m in here if m.feedback.get(head)]
            shown = [c for c in FEEDBACK_COLUMNS if any(c in m.values for m in of_head)]
            tables.append(_result_table(groups, f"feedback {head}: {rules.title}", of_head, shown))
    return tables


def settings_table(groups: Sequence[Group]) -> Table | None:
    """The settings that differ between groups; None for one group."""
    if len(groups) < 2:
        return None
    rows = [[key, *values] for key, values in differing_settings(groups)]
    notes = [] if rows else ["None: the runs have the same settings."]
    return Table(title="Settings that differ", header=["", *(g.name for g in groups)], rows=rows, notes=notes)


def _result_table(
    groups: Sequence[Group],
    title: str,
    measured: Sequence[Measurement],
    columns: Sequence[str],
    *,
    quoted: Sequence[Reference] = (),
) -> Table:
    """The table of what was `measured` under one set of rules."""
    rules = measured[0].rules
    rows = [row for group in groups for row in _group_rows(group, measured)] + _baseline_rows(measured)
    cells = [[row.name, row.moment, _num_seeds(row), *(_cell(row, c) for c in columns)] for row in rows]
    for reference in quoted:
        values = [f"{reference.values[c]:.4f}" if c in reference.values else "-" for c in columns]
        cells.append([f"{reference.name} (quoted)", "", "", *values])
    return Table(
        title=title,
        header=["", "step", "seeds", *columns],
        rows=cells,
        notes=_notes(rules, rows, quoted),
        warning=_selection(groups, rules, rows),
    )


def _group_rows(group: Group, measured: Sequence[Measurement]) -> list[Row]:
    """The last step, the best one if it is another, and other steps that were measured by hand."""
    moments: dict[str, list[Measurement]] = {"last": [], "best": []}
    for run in group.runs:
        of_run = [measurement for measurement in measured if measurement.run is run]
        last, best = last_step(run), best_step(run)
        for step in dict.fromkeys(measurement.step for measurement in of_run):
            newest = [measurement for measurement in of_run if measurement.step == step][-1]
            if step == last:
                moments["last"].append(newest)
            if best is not None and step == best.step:
                moments["best"].append(newest)
            elif step != last and newest.by_hand:
                moments.setdefault(f"{step:,}" if step is not None else "", []).append(newest)
    if moments["last"] == moments["best"]:
        moments = {"last and best": moments.pop("last"), **{k: v for k, v in moments.items() if k != "best"}}
    return [
        Row(name=group.name, moment=_moment(name, seeds), num_runs=len(group.runs), seeds=seeds)
        for name, seeds in moments.items()
        if seeds
    ]


def _baseline_rows(measured: Sequence[Measurement]) -> list[Row]:
    """Whoever is in no group, once each; of one name with several results each of them, numbered."""
    different: dict[str, list[Measurement]] = {}
    for measurement in measured:
        if measurement.run is None:
            others = different.setdefault(measurement.name, [])
            if all((o.values, o.step) != (measurement.values, measurement.step) for o in others):
                others.append(measurement)
    rows = []
    for name, found in different.items():
        for number, measurement in enumerate(found, start=1):
            shown = name if len(found) == 1 else f"{name} [{number}]"
            moment = "" if measurement.step is None else f"{measurement.step:,}"
            rows.append(Row(name=shown, moment=moment, seeds=[measurement]))
    return rows


def _cell(row: Row, metric: str) -> str:
    values = [m.values[metric] for m in row.seeds if metric in m.values]
    if not values:
        return "-"
    if metric == "count":
        return f"{statistics.fmean(values):,.0f}"
    over_seeds = spread(values)
    errors = [m.errors[metric] for m in row.seeds if metric in m.errors]
    noise = [f"± {statistics.fmean(errors):.4f}"] if len(errors) == len(values) else []
    noise += [] if over_seeds.deviation is None else [f"(sd {over_seeds.deviation:.4f})"]
    return "\n".join([f"{over_seeds.mean:.4f}", *noise])


def _num_seeds(row: Row) -> str:
    if row.seeds[0].run is None:
        return ""
    return f"{len(row.seeds)}" if len(row.seeds) == row.num_runs else f"{len(row.seeds)} of {row.num_runs}"


def _moment(name: str, seeds: Sequence[Measurement]) -> str:
    steps = _between([measurement.step for measurement in seeds if measurement.step is not None])
    return name if name == steps else f"{name}: {steps}"


def _notes(rules: Rules, rows: Sequence[Row], quoted: Sequence[Reference]) -> list[str]:
    said = [m.rules.details for row in rows for m in row.seeds if m.rules.details]
    window = f"Histories of the newest {rules.window:,} events." if rules.window else "Whole histories."
    notes = [f"{said[0]}." if said else window, f"Data: {rules.data}."]
    if any(measurement.errors for row in rows for measurement in row.seeds):
        notes.append(NOISE)
    if any(len(row.seeds) > 1 for row in rows):
        notes.append(DEVIATION)
    if any(row.name.endswith("]") and row.seeds[0].run is None for row in rows):
        notes.append("Rows [1], [2] have one name and other numbers: another dataset, or other settings.")
    if quoted:
        sources = "; ".join(dict.fromkeys(r.source for r in quoted if r.source))
        notes.append(f"Quoted rows were not measured here{f' ({sources})' if sources else ''}.")
    return notes


def _selection(groups: Sequence[Group], rules: Rules, rows: Sequence[Row]) -> str:
    """Whether the best steps of a table were chosen by what the table reports."""
    shown = {id(m.run) for row in rows if row.moment.startswith("best") for m in row.seeds}
    chosen = [best for g in groups for run in g.runs if id(run) in shown and (best := best_step(run))]
    on_itself = sorted({best.metric for best in chosen if best.rules.split == rules.split})
    if on_itself:
        return (
            f"The best step was chosen by {', '.join(on_itself)} on the split {rules.split} that it is reported on "
            f"{'(selection on test) ' if rules.split == 'eval' else ''}and is too good by that; the last step is not."
        )
    if chosen:
        split = ", ".join(sorted({best.rules.split for best in chosen}))
        return f"The best step was chosen on the split {split}, without a look at {rules.split}."
    return ""


def _between(steps: Sequence[int]) -> str:
    if not steps:
        return ""
    low, high = min(steps), max(steps)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _median(group: Group, key: str, form: str) -> str:
    values = [value for run in group.runs for value in run.series(key).values()]
    return form.format(statistics.median(values)) if values else "-"
