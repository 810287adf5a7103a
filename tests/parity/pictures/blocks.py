"""The kinds of parallelism inside a block: which part of weights and activations a rank holds, and what is sent."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from matplotlib.axes import Axes

from tests.parity.pictures.canvas import (
    BACKWARD,
    EMPTY,
    FORWARD,
    INK,
    RANKS,
    SOFT,
    arrow,
    fill,
    frame,
    letters,
    name_ranks,
    open_page,
    save,
    write,
)
from tests.parity.traffic import Call, Trace, Weight, calls_in_a_layer

ROWS = {  # modules in the order in which they run; those without weights that change no shape are left out
    "HSTU block": ("hstu", ("norm", "uvqk", "attention", "output_norm", "out")),
    "ARGUS block, attention": ("argus", ("attention_norm", "qkv", "attention", "attention_out")),
    "ARGUS block, feed-forward": ("argus", ("feed_forward_norm", "up", "down")),
}
BESIDE = {"attention": ("position_bias", "time_bias")}  # parameters of the block, by the module that reads them
TALL, GAP, UNIT = 0.62, 0.14, 0.27  # inches: of all tokens, between ranks, of D channels
BOX, ROW = 1.42, 3.05
Shape = tuple[int, ...]


def draw_block(path: Path, title: str, traces: Mapping[str, Sequence[Trace]], whole: Mapping[str, Trace]) -> None:
    """A row for each of `ROWS`.

    Args:
        path: of the picture.
        title: of the picture.
        traces: of two ranks, by model.
        whole: of a rank that holds everything, by model.
    """
    height = ROW * len(ROWS) + 0.15
    figure, axes = open_page(11.2, height + 0.9, title)
    name_ranks(axes, 9.2, height + 0.62)
    legend = "Bars: what of all T tokens (down) and all channels (across) a rank holds. Bytes: sent by a rank per token"
    legend += " of the pack\n(D = 32, fp32); green above: forward, red below: backward."
    if any("tensor" in call.group for trace in traces.values() for call in trace[0].collectives):
        legend += " Σ: each rank has a part of the gradient; summed at the end of the step."
    write(axes, 0.2, height + 0.42, legend, ha="left", va="top", color=SOFT, linespacing=1.3)
    for number, (name, (model, modules)) in enumerate(ROWS.items()):
        top = height - ROW * number
        _Row(axes, traces[model], whole[model], middle=top - 1.62).draw(name, modules)
    save(figure, path)


class _Row:
    def __init__(self, axes: Axes, traces: Sequence[Trace], whole: Trace, *, middle: float) -> None:
        self._axes, self._traces, self._whole, self._middle = axes, traces, whole, middle
        self._calls = calls_in_a_layer(traces)
        self._tokens = traces[0].facts["tokens"]

    def draw(self, name: str, modules: Sequence[str]) -> None:
        write(self._axes, 0.2, self._middle + 1.48, name, ha="left", size=11, weight="bold")
        calls = [call for call in self._calls if call.place in modules]
        over = f"over group: {', '.join(sorted({call.group for call in calls}))}" if calls else "nothing is sent"
        write(self._axes, 2.9, self._middle + 1.48, over, ha="left", color=SOFT)
        x = self._activation(0.3, modules[0], 0)
        for module in modules:
            x = self._module(x, module)
            x = self._activation(x, module, 1)

    def _activation(self, x: float, module: str, side: int) -> float:
        """What each rank has before (0) or behind (1) a module; returns where it ends."""
        whole = _flat(self._whole.shapes[f"blocks.0.{module}"][side])
        width = whole[1] / 32 * UNIT
        for rank, trace in enumerate(self._traces):
            own = _flat(trace.shapes[f"blocks.0.{module}"][side])
            self._held(x + 0.1, width, rank, own=own, whole=whole)
        write(self._axes, x + 0.1 + width / 2, self._middle - TALL - GAP - 0.12, letters(own, self._tokens), size=9)
        return x + width + 0.2

    def _held(self, x: float, width: float, rank: int, *, own: Shape, whole: Shape) -> None:
        bottom = self._middle + GAP / 2 if rank == 0 else self._middle - GAP / 2 - TALL
        fill(self._axes, x, bottom, (width, TALL), EMPTY, edgecolor=SOFT)
        part = width * own[1] / whole[1]
        left = x + (rank * part if own[1] < whole[1] else 0.0)
        one = TALL / whole[0]
        for first, count in _runs(self._token_numbers(rank, own[0], whole[0])):
            fill(self._axes, left, bottom + TALL - (first + count) * one, (part, count * one), RANKS[rank])

    def _token_numbers(self, rank: int, own: int, whole: int) -> list[int]:
        shares = self._traces[rank].facts.get("shares")
        if own == whole:
            return list(range(whole))
        return shares[rank] if shares else list(range(rank * own, (rank + 1) * own))

    def _module(self, x: float, module: str) -> float:
        axes, height = self._axes, 2 * TALL + GAP + 0.2
        frame(axes, x, self._middle - height / 2, (BOX, height))
        write(
            axes,
            x + BOX / 2,
            self._middle + height / 2 - 0.14,
            module,
            weight="bold",
            size=9.5 if len(module) < 15 else 8.4,
        )
        self._inside(x, module)
        for phase, color, sign, y in (
            ("forward", FORWARD, 1, self._middle + height / 2 + 0.1),
            ("backward", BACKWARD, -1, self._middle - height / 2 - 0.28),
        ):
            labels = [
                _label(call, n) for call, n in self._calls.items() if call.place == module and call.phase == phase
            ]
            if not labels:
                continue
            ends = (x + 0.1, y), (x + BOX - 0.1, y)
            arrow(axes, *(ends if sign > 0 else ends[::-1]), color=color)
            va = "bottom" if sign > 0 else "top"
            write(axes, x + BOX / 2, y + 0.06 * sign, "\n".join(labels), color=color, size=8.6, va=va, linespacing=1.15)
        return x + BOX

    def _inside(self, x: float, module: str) -> None:
        """The weights of a module, or the heads and tokens that attention works on."""
        names = (f"blocks.0.{module}.", *(f"blocks.0.{name}" for name in BESIDE.get(module, ())))
        weights = [[w for w in trace.weights if w.placement.global_name.startswith(names)] for trace in self._traces]
        large = [[w for w in own if len(w.shape) == 2] for own in weights]
        lines = []
        if module == "attention":
            lines.append(self._heads(x))
        elif large[0]:
            lines.append(self._matrix(x, [own[0] for own in large]))
        elif not weights[0]:
            lines.append("no weights")
        small = [w for w in weights[0] if len(w.shape) == 1]
        lines += self._describe_small(small)
        below = 0.02 if module == "attention" or large[0] else 0.35
        write(
            self._axes, x + BOX / 2, self._middle - 0.32 + below, "\n".join(lines), size=8.4, va="center", color=INK,
            linespacing=1.2,
        )  # fmt: skip

    def _matrix(self, x: float, pieces: Sequence[Weight]) -> str:
        """The matrix of a linear map, outputs down and inputs across, in the parts of its ranks."""
        place = pieces[0].placement
        rows, columns = place.global_shape
        scale = 0.5 / max(rows, columns)
        size = columns * scale, rows * scale
        left, bottom = x + BOX / 2 - size[0] / 2, self._middle + 0.33 - size[1] / 2
        if pieces[0].shape == place.global_shape:
            for rank in (0, 1):
                shift = (rank - 0.5) * (size[0] + 0.12)
                fill(self._axes, left + shift, bottom, size, RANKS[rank])
            return f"{rows} × {columns}, whole"
        for rank, piece in enumerate(pieces):
            height, width = (length * scale for length in piece.shape)
            start = piece.placement.offset * scale
            corner = (left, bottom + size[1] - start - height) if place.split_dim == 0 else (left + start, bottom)
            fill(self._axes, *corner, (width, height), RANKS[rank], edgecolor="white")
        return f"{('rows', 'columns')[place.split_dim]} of {rows} × {columns}"

    def _describe_small(self, weights: Sequence[Weight]) -> list[str]:
        """Vectors of weights: split or whole, and whether a rank's gradient is a part of the sum."""
        several = any(call.group == "tensor" for call in self._traces[0].collectives)
        names: dict[str, list[str]] = {}
        for weight in weights:
            held = "whole" if weight.shape == weight.placement.global_shape else "split"
            partial = " Σ" if weight.placement.grad_sum_over and held == "whole" and several else ""
            name = weight.placement.global_name.rsplit(".", 1)[1].replace("_", " ")
            names.setdefault(f"{held}{partial}", []).append(name)
        lines = []
        for how, which in names.items():
            which = ["biases"] if "position bias" in which else which
            lines.append(f"{' and '.join(which)}:{chr(10) if len(which) > 1 else ' '}{how}")
        return lines

    def _heads(self, x: float) -> str:
        """The tokens (down) and heads (across) of the queries that each rank works on."""
        name = "blocks.0.attention.kernel"
        place = name if name in self._traces[0].shapes else name.removesuffix(".kernel")
        whole = self._whole.shapes["blocks.0.attention"][0]
        for rank, trace in enumerate(self._traces):
            own = trace.shapes[place][0]
            left, bottom, (width, height) = x + BOX / 2 + (rank - 0.5) * 0.5 - 0.2, self._middle + 0.1, (0.4, 0.45)
            fill(self._axes, left, bottom, (width, height), EMPTY, edgecolor=SOFT)
            part = width * own[1] / whole[1]
            for first, count in _runs(self._token_numbers(rank, own[0], whole[0])):
                top = bottom + height * (1 - (first + count) / whole[0])
                corner = left + (rank * part if part < width else 0.0), top
                fill(self._axes, *corner, (part, height * count / whole[0]), RANKS[rank])
        tokens = "all tokens" if own[0] == whole[0] else "own T/2 queries"
        return f"{tokens},\n{own[1]} of {whole[1]} heads"


def _flat(shape: Shape) -> Shape:
    return shape[0], prod(shape[1:])


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Numbers in ascending order as runs: first and count."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((number, 1))
    return runs


def _label(call: Call, count: int) -> str:
    times = f"{count} × " if count > 1 else ""
    return f"{times}{call.operation} {call.sent_bytes:.4g} B"
