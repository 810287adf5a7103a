"""Line charts: inline SVG that takes its colours of text and grid from the page, and one PNG of many charts."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megarec.base.files import new_file

Dash = Literal["solid", "dashed", "dotted"]

# readable on white and on near-black; the ninth line is the first colour again, dashed
COLORS = ("#4c8dd6", "#e07b39", "#3fa672", "#c45bb0", "#b59a2b", "#7d6fd8", "#d6566b", "#3aa5a8")
DASHES: tuple[Dash, ...] = ("solid", "dashed", "dotted")
INK = "#010203"  # stands for the page's own text colour until the SVG is written
MAX_POINTS = 200  # more is a band of noise where several lines overlap
SHEET_COLUMNS = 3


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve, and where there are several seeds the band from the lowest to the highest of them.

    Attributes:
        x: steps, or what else the axis shows.
        y: values, the mean over seeds.
        low, high: of the seeds at each point; equal to `y` when there is one.
    """

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """The curves of one number.

    Attributes:
        title: what is drawn.
        axis: what `x` is.
        lines: one place per group, None for one without this number.
        marks: whether each point gets a dot, for few points.
    """

    title: str
    axis: str
    lines: Sequence[Line | None]
    marks: bool = False


def style_of(place: int) -> tuple[str, Dash]:
    """Colour and dash of the line in this place: 24 differ."""
    return COLORS[place % len(COLORS)], DASHES[place // len(COLORS) % len(DASHES)]


def draw_svg(chart: Chart) -> str:
    """An SVG of one chart without its title, each line in the style of its place."""
    salt = f"megarec/{chart.title}/{chart.axis}"  # makes the ids inside the SVG its own
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        _draw(figure.subplots(), chart, ink=INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r' (width|height)="[0-9.]+pt"', "", svg, count=2)  # the page sets the size


def write_sheet(path: Path, charts: Sequence[Chart], *, names: Sequence[str]) -> None:
    """A PNG of all `charts` in a grid, with a legend of the groups' `names` above it; whole or not at all."""
    columns = min(SHEET_COLUMNS, len(charts))
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(4.4 * columns, 2.8 * rows + 0.25 * -(-len(names) // columns)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, chart in zip(grid, charts, strict=False):
        _draw(axes, chart, ink="#333333")
        axes.set_title(_literal(chart.title), loc="left", fontsize=10)
    for axes in grid[len(charts) :]:
        axes.set_visible(False)
    styles = [style_of(place) for place in range(len(names))]
    handles = [Line2D([], [], color=color, linestyle=dash, linewidth=2) for color, dash in styles]
    labels = [_literal(name) for name in names]
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)
    with new_file(path) as staging:
        figure.savefig(staging, format="png", dpi=110, facecolor="white", metadata={"Software": None})


def thin(values: Sequence[float]) -> list[float]:
    """At most `MAX_POINTS` points: means over equal runs of neighbours."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) <= MAX_POINTS:
        return array.tolist()
    return [float(piece.mean()) for piece in np.array_split(array, MAX_POINTS)]


def _draw(axes: Axes, chart: Chart, *, ink: str) -> None:
    for place, line in enumerate(chart.lines):
        if line is None:
            continue
        color, dash = style_of(place)
        x, y, low, high = (thin(values) for values in (line.x, line.y, line.low, line.high))
        axes.plot(x, y, color=color, linestyle=dash, linewidth=1.5, marker="o" if chart.marks else None, markersize=3)
        if low != high:
            axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    axes.grid(visible=True, color=ink, alpha=0.12, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=ink, alpha=0.4)
    axes.tick_params(colors=ink, labelsize=8, length=3)
    axes.set_xlabel(chart.axis, color=ink, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=chart.axis == "step"))
    axes.xaxis.set_major_formatter(FuncFormatter(_short()))
    axes.yaxis.set_major_formatter(FuncFormatter(_short()))


def _literal(text: str) -> str:
    """`text` without the signs that matplotlib takes for mathematics."""
    return text.replace("$", r"\$")


def _short() -> Callable[[float, int | None], str]:
    """Tick labels such as 12k, 1.5M, 0.003."""

    def show(value: float, _: int | None = None) -> str:
        for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.4g}{suffix}"
        return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 or not math.isfinite(value) else f"{value:.0e}"

    return show
