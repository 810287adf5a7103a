"""Line charts as inline SVG that take their colours of text and grid from the page."""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# readable on white and on near-black
COLORS = ("#4c8dd6", "#e07b39", "#3fa672", "#c45bb0", "#b59a2b", "#7d6fd8", "#d6566b", "#3aa5a8")
INK = "#010203"  # stands for the page's own text colour until the SVG is written
MAX_POINTS = 600

Line = tuple[Sequence[float], Sequence[float]]


def draw_lines(lines: Sequence[Line | None], *, name: str, marks: bool = False) -> str:
    """An SVG with one line per run, in the colour of its place; None for a run without this number.

    Args:
        lines: steps and values of each run.
        name: makes the ids inside the SVG its own; it is not shown.
        marks: whether each point gets a dot, for few points.
    """
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": f"megarec/{name}", "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.subplots()
        for place, line in enumerate(lines):
            if line is not None:
                steps, values = thin(line)
                color = COLORS[place % len(COLORS)]
                axes.plot(steps, values, color=color, linewidth=1.5, marker="o" if marks else None, markersize=3)
        axes.grid(visible=True, color=INK, alpha=0.12, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set(color=INK, alpha=0.4)
        axes.tick_params(colors=INK, labelsize=8, length=3)
        axes.set_xlabel("step", color=INK, fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_short()))
        axes.yaxis.set_major_formatter(FuncFormatter(_short()))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r' (width|height)="[0-9.]+pt"', "", svg, count=2)  # the page sets the size


def thin(line: Line) -> Line:
    """At most `MAX_POINTS` points: means over equal runs of neighbours."""
    steps, values = np.asarray(line[0], dtype=np.float64), np.asarray(line[1], dtype=np.float64)
    if len(steps) <= MAX_POINTS:
        return steps.tolist(), values.tolist()
    pieces = np.array_split(np.arange(len(steps)), MAX_POINTS)
    return [float(steps[p].mean()) for p in pieces], [float(values[p].mean()) for p in pieces]


def _short() -> Callable[[float, int | None], str]:
    """Tick labels such as 12k, 1.5M, 0.003."""

    def show(value: float, _: int | None = None) -> str:
        for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.4g}{suffix}"
        return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 or not math.isfinite(value) else f"{value:.0e}"

    return show
