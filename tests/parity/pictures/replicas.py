"""Data parallelism: when gradients are summed, bucket by bucket, and what each rank keeps."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from matplotlib.axes import Axes

from tests.parity.pictures.canvas import (
    BACKWARD,
    EMPTY,
    FORWARD,
    PALE,
    RANKS,
    SOFT,
    arrow,
    fill,
    name_ranks,
    open_page,
    save,
    write,
)
from tests.parity.trace import BUCKET_NUMBERS
from tests.parity.traffic import Collective, Trace

HIGH = 2.5
PHASES = ("gradients", "row gradients", "norm", "update")
SUMMED = ("all-reduce", "reduce-scatter", "all-gather")


def draw_replicas(path: Path, kinds: Mapping[str, Sequence[Trace]]) -> None:
    """A row for each kind, from the traces of two ranks."""
    figure, axes = open_page(11.2, HIGH * len(kinds) + 0.85, "Data parallelism: the same weights, other packs")
    name_ranks(axes, 9.2, HIGH * len(kinds) + 0.57)
    note = (
        "Left: rank 0 in time; F forward, B backward of its packs, then the lines of the step. Right: all dense weights"
    )
    note += f" in the order of\nDDP's buckets b0, b1, ... (of about {BUCKET_NUMBERS:,} numbers here, else 40 million;"
    note += " white between them: padding)."
    write(axes, 0.2, HIGH * len(kinds) + 0.2, note, ha="left", color=SOFT, linespacing=1.3)
    for number, (name, traces) in enumerate(kinds.items()):
        top = HIGH * (len(kinds) - number) - 0.15
        write(axes, 0.2, top, name, ha="left", size=11, weight="bold")
        _draw_time(axes, traces[0], top - 1.0)
        _draw_numbers(axes, traces, top - 0.35)
    save(figure, path)


def _draw_time(axes: Axes, trace: Trace, y: float) -> None:
    """The passes and lines of a step as boxes, and below each the sums of dense gradients that begin in it."""
    boxes = [(f"{'F' if w.kind == 'forward' else 'B'}{w.pack}", 0.55, w.kind) for w in trace.order]
    boxes[-1] = (boxes[-1][0], 1.3, boxes[-1][2])
    boxes += [("finalize", 0.95, ""), ("rows", 0.55, ""), ("norm", 0.5, ""), ("update", 0.95, "")]
    x = 0.2
    for number, (text, width, kind) in enumerate(boxes):
        color = {"forward": PALE[0], "backward": RANKS[0], "": EMPTY}[kind]
        fill(axes, x, y, (width, 0.42), color, edgecolor="white" if kind else SOFT)
        write(axes, x + width / 2, y + 0.21, text, color="white" if kind == "backward" else "black", size=8.6)
        inside = [call for call in trace.collectives if _box_of(call, len(trace.order)) == number]
        for place, call in enumerate(inside):
            at = x + width * (place + 0.5) / len(inside)
            forward = call.phase == "update"
            color = FORWARD if forward else BACKWARD
            arrow(axes, (at, y - 0.05), (at, y - 0.3), color=color)
            write(axes, at, y - 0.42, _bucket(call, trace), color=color, size=8.4)
        if inside:
            operation = inside[0].operation
            sent = inside[0].item_bytes * inside[0].to_others
            label = f"{operation} over {inside[0].group}\n{sent:.4g} B a weight"
            write(axes, x + width / 2, y - 0.58, label, size=8.4, va="top", color=color, linespacing=1.2)
        x += width


def _box_of(call: Collective, passes: int) -> int | None:
    """The number of the box in which a sum of dense gradients, or the way back of weights, begins."""
    if call.group != "copies" or call.operation not in SUMMED:
        return None
    if call.phase == "backward":
        return call.passes - 1
    return passes + PHASES.index(call.phase)


def _bucket(call: Collective, trace: Trace) -> str:
    """The bucket that a call moves, known by its size."""
    sizes = _bucket_sizes(trace)
    if len(sizes) == 1:
        return "all"
    number = min(sizes, key=lambda bucket: abs(sizes[bucket] - prod(call.shape)))
    return f"b{number}"


def _bucket_sizes(trace: Trace) -> dict[int, int]:
    """The numbers of each bucket, with the padding behind it."""
    starts: dict[int, int] = {}
    end = 0
    for weight in trace.weights:
        starts[weight.bucket] = min(weight.place, starts.get(weight.bucket, weight.place))
        end = max(end, weight.place + prod(weight.shape))
    numbers = sorted(starts)
    return {n: starts.get(n + 1, end) - starts[n] for n in numbers}


def _draw_numbers(axes: Axes, traces: Sequence[Trace], y: float) -> None:
    """What of all numbers each rank keeps: weights, summed gradients, moments."""
    left, width = 7.75, 3.3
    weights = traces[0].weights
    end = max(weight.place + prod(weight.shape) for weight in weights)
    for bucket in _bucket_sizes(traces[0]):
        inside = [weight for weight in weights if weight.bucket == bucket]
        first = min(weight.place for weight in inside)
        last = max(weight.place + prod(weight.shape) for weight in inside)
        middle = left + (first + last) / 2 / end * width
        if len(_bucket_sizes(traces[0])) > 1:
            write(axes, middle, y + 0.1, f"b{bucket}", size=8.4, color=BACKWARD)
    for rank, trace in enumerate(traces):
        for line, kind in enumerate(("weights", "summed gradients", "Adam's moments")):
            bottom = y - 0.2 - 0.9 * rank - 0.26 * line
            write(axes, left - 0.1, bottom + 0.09, kind, ha="right", size=8.6)
            fill(axes, left, bottom, (width, 0.18), EMPTY, edgecolor=SOFT)
            for weight in trace.weights:
                first, count = (0, prod(weight.shape)) if kind == "weights" else weight.kept
                start = left + (weight.place + first) / end * width
                fill(axes, start, bottom, (count / end * width, 0.18), RANKS[rank])
