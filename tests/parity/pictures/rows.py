"""Table rows between the ranks that use and that own them, and the full softmax over items that stay where they are."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from tests.parity.pictures.canvas import (
    BACKWARD,
    EMPTY,
    FORWARD,
    RANKS,
    SOFT,
    arrow,
    fill,
    frame,
    name_ranks,
    open_page,
    save,
    write,
)
from tests.parity.traffic import Trace, calls_in_a_pack, calls_in_a_step

LANES = (3.15, 1.15)  # the middle of each rank
HALF = 0.55


def draw_tables(path: Path, traces: Sequence[Trace]) -> None:
    """The rows of one step, from the traces of two ranks."""
    figure, axes = open_page(11.2, 5.0, "Tables: every row lives on one rank, and is fetched once a step")
    name_ranks(axes, 9.2, 4.72)
    note = f"A bar is a list of rows, coloured by who owns them (row r of {traces[0].facts['rows']} is on rank r % 2)."
    write(axes, 0.2, 4.42, note, ha="left", color=SOFT)
    columns = (0.3, 2.3, 4.55, 6.8, 9.05)
    titles = (
        "ids of the\nrank's packs",
        "distinct rows",
        "owner looks\nthem up",
        "buffer of the step,\nleaf of autograd",
    )
    for x, title in zip(columns, (*titles, "owner adds up\nand updates"), strict=True):
        write(axes, x + 0.65, 3.98, title, weight="bold", va="center", linespacing=1.2)
    calls = {(call.phase, call.tensor): call for call in calls_in_a_step(traces)}
    sent = [calls["rows", "[U]"], calls["rows", "[U, E]"], calls["row gradients", "[U, E]"]]
    for rank, trace in enumerate(traces):
        facts, y = trace.facts, LANES[rank]
        frame(axes, columns[0], y - 0.3, (1.3, 0.6), facecolor=EMPTY)
        write(axes, columns[0] + 0.65, y, f"{facts['asked']:,}")
        arrow(axes, (columns[0] + 1.35, y), (columns[1] - 0.05, y))
        write(axes, (columns[0] + columns[1] + 1.3) / 2, y + 0.15, "unique", size=8.6)
        _bar(axes, columns[1], y, facts["asked_of"])
        _bar(axes, columns[2], y, [n if owner == rank else 0 for owner, n in enumerate([sum(facts["served_to"])] * 2)])
        _bar(axes, columns[3], y, facts["asked_of"])
        _bar(axes, columns[4], y, [n if owner == rank else 0 for owner, n in enumerate([facts["updated"]] * 2)])
        for other in range(len(traces)):
            asks, serves = facts["asked_of"][other], facts["served_to"][other]
            _way(axes, columns[1], columns[2], rank, other, text=f"{asks}", color=FORWARD)
            _way(axes, columns[2], columns[3], rank, other, text=f"{serves}", color=FORWARD)
            _way(axes, columns[3], columns[4], rank, other, text=f"{asks}", color=BACKWARD)
    for number, (call, what) in enumerate(zip(sent, ("row numbers", "rows", "gradients"), strict=True)):
        x = (columns[number + 1] + columns[number + 2] + 1.3) / 2
        color = BACKWARD if call.phase == "row gradients" else FORWARD
        text = f"{what}: {call.operation}\nover {call.group}, {call.sent_bytes:.4g} B each"
        write(axes, x, 0.28, text, color=color, size=8.6, linespacing=1.2)
    save(figure, path)


def _bar(axes: Axes, x: float, y: float, parts: Sequence[int]) -> None:
    """Rows of each owner on top of each other."""
    total = sum(parts)
    bottom = y - HALF
    fill(axes, x + 0.4, bottom, (0.5, 2 * HALF), "none", edgecolor=SOFT)
    top = bottom + 2 * HALF
    for owner, count in enumerate(parts):
        if count:
            height = 2 * HALF * count / total
            top -= height
            fill(axes, x + 0.4, top, (0.5, height), RANKS[owner])
            write(axes, x + 0.65, top + height / 2, str(count), color="white", size=8.6)


def _way(axes: Axes, left: float, right: float, start: int, end: int, *, text: str, color: str) -> None:
    """An arrow from the list of one rank to that of another, with how many rows go."""
    lower = -0.25 if end > start else 0.25 if end < start else 0.0
    begin = left + 0.95, LANES[start] + lower
    stop = right + 0.35, LANES[end] - lower
    arrow(axes, begin, stop, color=color)
    share = 0.5 if start == end else 0.3
    x, y = (begin[i] + share * (stop[i] - begin[i]) for i in (0, 1))
    write(axes, x, y + (0.14 if start == end else 0.0), text, size=8.6, color=color, bbox=WHITE)


WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}


def draw_full_softmax(path: Path, traces: Sequence[Trace]) -> None:
    """One pack's softmax over all items, from the traces of two ranks that share it."""
    figure, axes = open_page(11.2, 5.4, "Full softmax: items stay on their ranks, queries come to them")
    name_ranks(axes, 9.2, 5.12)
    calls = [call for call in calls_in_a_pack(traces) if call.place == "next item"]
    gather, reduce = calls[0], next(call for call in calls if call.operation == "all-reduce")
    back = next(call for call in calls if call.phase == "backward")
    times = calls_in_a_pack(traces)[reduce]
    targets, items = traces[0].facts["targets"][0], traces[0].facts["candidates"][0]
    for x, title in (
        (0.9, "queries of\nown events"),
        (3.3, "queries of\nall targets"),
        (5.6, "scores: targets (down)\n× all items (across)"),
        (8.0, "log-sum-exp\nof every target"),
        (10.1, "losses of\nown targets"),
    ):
        write(axes, x, 4.55, title, weight="bold", linespacing=1.2)
    for rank, trace in enumerate(traces):
        y, own = LANES[rank] + 0.5, trace.shapes["item_tower"][1][0]
        half = HALF if rank == 0 else -HALF
        fill(axes, 0.75, y - HALF, (0.3, 2 * HALF), EMPTY, edgecolor=SOFT)
        fill(axes, 0.75, min(y, y + half), (0.3, HALF), RANKS[rank])
        fill(axes, 3.15, y - HALF, (0.3, 2 * HALF), RANKS[rank])
        first = rank * own
        count = min(own, items - first)
        fill(axes, 4.9, y - HALF, (1.4, 2 * HALF), EMPTY, edgecolor=SOFT)
        fill(axes, 4.9 + 1.4 * first / items, y - HALF, (1.4 * count / items, 2 * HALF), RANKS[rank])
        write(axes, 5.6, y - HALF - 0.15, f"{targets} × {count} of {items}", size=8.6)
        fill(axes, 7.9, y - HALF, (0.12, 2 * HALF), RANKS[rank])
        fill(axes, 10.04, y - HALF, (0.12, 2 * HALF), EMPTY, edgecolor=SOFT)
        fill(axes, 10.04, min(y, y + half), (0.12, HALF), RANKS[rank])
        for left, right in ((1.15, 3.05), (3.55, 4.8), (6.4, 7.8), (8.15, 9.95)):
            arrow(axes, (left, y), (right, y))
        for left, right in ((1.15, 3.05), (6.4, 7.8)):  # what goes over the ranks
            arrow(axes, (left, y), (right, LANES[1 - rank] + 0.5), color=FORWARD)
    for x, call, text in (
        (1.7, gather, gather.operation),
        (7.1, reduce, f"{times} × {reduce.operation}"),
    ):
        size = call.tensor[1:-1].replace(", ", " × ")
        label = f"{text} {size}\nover {call.group}, {call.sent_bytes:.4g} B a {call.unit}"
        write(axes, x, 0.4, label, size=8.6, color=FORWARD, linespacing=1.2)
    size = back.tensor[1:-1].replace(", ", " × ")
    label = f"backward: {back.operation} {size} of the\nqueries' gradients, {back.sent_bytes:.4g} B a {back.unit}"
    write(axes, 4.5, 0.4, label, size=8.6, color=BACKWARD, linespacing=1.2)
    save(figure, path)
