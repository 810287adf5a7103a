"""What all pictures share: colours of ranks, boxes, arrows, and the names of sizes."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from tests.parity.traffic import WIDTH_NAMES

RANKS = ("#2f6db3", "#e08a1e")  # rank 0, rank 1
PALE = ("#c3d8ef", "#f7ddb8")
INK, SOFT, EMPTY, FORWARD, BACKWARD = "#222222", "#8a8a8a", "#f3f3f3", "#1b7f4d", "#a8324a"
HALVES = {16: "D/2", 48: "1.5 D", 10: "Dq/2"}


def open_page(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """A white page measured in inches, the origin at the lower left."""
    figure, axes = plt.subplots(figsize=(width, height), dpi=130)
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    write(axes, 0.2, height - 0.28, title, size=13, weight="bold", ha="left")
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """As PNG, the same bytes for the same picture."""
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def write(axes: Axes, x: float, y: float, text: str, *, size: float = 9, color: str = INK, **settings: Any) -> None:
    axes.text(x, y, text, **{"fontsize": size, "color": color, "ha": "center", "va": "center", **settings})


def fill(axes: Axes, x: float, y: float, size: tuple[float, float], color: str, **settings: Any) -> None:
    """A rectangle from its lower left corner."""
    axes.add_patch(Rectangle((x, y), *size, **{"facecolor": color, "edgecolor": "none", "lw": 0.8, **settings}))


def frame(axes: Axes, x: float, y: float, size: tuple[float, float], **settings: Any) -> None:
    """A box with round corners."""
    shape = FancyBboxPatch((x, y), *size, boxstyle="round,pad=0,rounding_size=0.06", lw=1.0)
    shape.set(**{"facecolor": "white", "edgecolor": SOFT, **settings})
    axes.add_patch(shape)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], *, color: str = INK, **settings: Any
) -> None:
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.3, "shrinkA": 0, "shrinkB": 0, **settings}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def name_ranks(axes: Axes, x: float, y: float) -> None:
    """The legend of ranks."""
    for rank, color in enumerate(RANKS):
        fill(axes, x + 0.85 * rank, y - 0.08, (0.16, 0.16), color)
        write(axes, x + 0.85 * rank + 0.22, y, f"rank {rank}", ha="left")


def letters(shape: tuple[int, ...], tokens: int) -> str:
    """`[tokens, channels]` in letters."""
    lead = {tokens: "T", tokens // 2: "T/2"}[shape[0]]
    return f"{lead} × {HALVES.get(shape[1]) or WIDTH_NAMES[shape[1]]}"
