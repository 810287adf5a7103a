"""What a run leaves behind: `results.json`, `table.md` and `ratios.png`."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kernels.bench.harness.rows import PARTS, Row

COLUMNS = (
    "case", "dtype", "method", "forward ms", "both ms", "TFLOP/s forward", "backward", "both", "GB/s", "of the limit",
    "peak MiB",
)  # fmt: skip
WORDS = ("red: ", "failed: ", "skipped: ")  # do not widen the column of a number
COLORS = {"forward": "#4c72b0", "backward": "#dd8452", "both": "#55a868", "memory": "#8c8c8c"}


def write_results(folder: Path, run: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """`results.json` and `table.md`, each whole or not at all; what was there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"run": dict(run), "rows": [asdict(row) for row in rows]}
    _write(folder / "results.json", json.dumps(results, indent=1) + "\n")
    _write(folder / "table.md", f"# Kernels\n\n{describe(run)}\n\n{table(rows)}\n\n{table_of_ratios(rows)}\n")


def describe(run: Mapping[str, Any]) -> str:
    """Where and with what the run was made, in a few lines."""
    limits = "; ".join(
        f"{dtype}: {limit['tflops']:.4g} TFLOP/s, {limit['gbps']:.4g} GB/s" for dtype, limit in run["limits"].items()
    )
    return (
        f"{run['device']}, torch {run['torch']}, triton {run['triton']}, commit {run['commit']}, {run['date']}, "
        f"threads {run['threads']}.\nMeasured limits (matrix product, copy): {limits}.\n\n    {run['command']}"
    )


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of times, speeds and memory. Rows that are not green have words and no figures."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS)]
    lines += [(f"{row.op}: {row.case}", row.dtype, row.method, *_cells(row)) for row in rows]
    return _markdown(lines)


def table_of_ratios(rows: Sequence[Row]) -> str:
    """A Markdown table of how many times what ours takes each other method takes; more than 1: ours is better."""
    lines = [("case", "ours", "against", *PARTS, "memory"), ("---",) * (4 + len(PARTS))]
    for row in rows:
        for other, ratios in row.ratios.items():
            cells = (f"{ratios[part]:.3g}" if part in ratios else "" for part in (*PARTS, "memory"))
            lines.append((f"{row.op}: {row.case}, {row.dtype}", row.method, other, *cells))
    first_steps = [row for row in rows if row.first_step_s]
    text = _markdown(lines) if len(lines) > 2 else "No two methods to compare."
    if first_steps:
        steps = [("first step", "method", "process alone s", "cold s", "warm s"), ("---",) * 5]
        steps += [
            (f"{row.op}: {row.case}, {row.dtype}", row.method, *(f"{s:.1f}" for s in row.first_step_s.values()))
            for row in first_steps
        ]
        text += f"\n\n{_markdown(steps)}"
    return text


def draw_ratios(path: Path, run: Mapping[str, Any], rows: Sequence[Row]) -> bool:
    """A bar for every case, other method and part: how many times what ours takes. Says whether there was any."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    bars = [
        (f"{row.op}: {row.case}, {row.dtype}\n{row.method} against {other}", ratios)
        for row in rows
        for other, ratios in row.ratios.items()
    ]
    if not bars:
        return False
    figure = Figure(figsize=(10, 1.6 + 0.62 * len(bars)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(COLORS)
    for number, (part, color) in enumerate(COLORS.items()):
        drawn = [(place, ratios[part]) for place, (_, ratios) in enumerate(bars) if part in ratios]
        if not drawn:
            continue
        places = [place + (number - (len(COLORS) - 1) / 2) * height for place, _ in drawn]
        label = "peak memory" if part == "memory" else f"time, {part}"
        widths = [ratio - 1 for _, ratio in drawn]  # from 1, which is as good as ours
        container = axes.barh(places, widths, height, left=1, color=color, label=label)
        axes.bar_label(container, [f" {ratio:.3g} " for _, ratio in drawn], fontsize=7)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times what ours takes (right of 1: ours is better)")
    axes.set_title(f"{run['device']}, torch {run['torch']}, {run['date']}", fontsize=10)
    axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
    figure.legend(loc="outside lower center", ncols=len(COLORS), fontsize=8)
    part_path = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(part_path, dpi=130)
    os.replace(part_path, path)
    return True


def _cells(row: Row) -> tuple[str, ...]:
    if row.status != "green":
        return (f"{row.status}: {row.why}".replace("|", "/"), *[""] * (len(COLUMNS) - 4))
    whole = row.both or row.forward
    return (
        *(f"{figures.ms:.4g}" if figures else "" for figures in (row.forward, row.both)),
        *(
            f"{figures.tflops:.3g}" if figures and figures.tflops else ""
            for figures in (row.forward, row.backward, row.both)
        ),
        f"{whole.gbps:.3g}" if whole else "",
        f"{whole.share_of_limit:.0%}" if whole else "",
        "" if row.peak_mib is None else f"{row.peak_mib:.0f}",
    )


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column if not cell.startswith(WORDS)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width, "-" if cell == "---" else " ") for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
