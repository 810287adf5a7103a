"""Pipeline parallelism: what each stage holds, and in which order it works on packs."""

from collections.abc import Mapping, Sequence
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
    frame,
    name_ranks,
    open_page,
    save,
    write,
)
from tests.parity.traffic import CHUNK_BEFORE, NEXT_CHUNK, Trace, Work, calls_in_a_pack

FORWARD_TIME, BACKWARD_TIME = 1.0, 2.0  # of a pack through all layers of a rank
Pass = tuple[int, Work]


def draw_stages(path: Path, schedules: Mapping[str, Sequence[Trace]]) -> None:
    """For each schedule its chunks and its time chart, from the traces of two ranks."""
    figure, axes = open_page(11.2, 3.6 * len(schedules) + 0.6, "Pipeline parallelism: layers over 2 stages")
    name_ranks(axes, 9.2, 3.6 * len(schedules) + 0.32)
    for number, (name, traces) in enumerate(schedules.items()):
        top = 3.6 * (len(schedules) - number) - 0.1
        write(axes, 0.2, top, name, ha="left", size=11, weight="bold")
        _draw_chunks(axes, traces, top - 1.0)
        _draw_chart(axes, traces, top - 2.85)
    save(figure, path)


def _draw_chunks(axes: Axes, traces: Sequence[Trace], y: float) -> None:
    """The chunks in the order in which a pack passes them, each in the colour of its rank."""
    rounds = 1 + max(weight.chunk for trace in traces for weight in trace.weights)
    chunks = [(rank, chunk) for chunk in range(rounds) for rank in range(len(traces))]
    width, gap = (10.8 - 1.35 * (len(chunks) - 1)) / len(chunks), 1.35
    sent = {call.place: call for call in calls_in_a_pack(traces)}
    for number, (rank, chunk) in enumerate(chunks):
        x = 0.2 + number * (width + gap)
        names = [w.placement.global_name.split(".") for w in traces[rank].weights if w.chunk == chunk]
        tops = list(dict.fromkeys(" ".join(n[:2]) if n[0] == "blocks" else n[0] for n in names))
        layers = [name.replace("blocks", "layer") for name in tops if name.startswith("blocks")]
        others = [name for name in tops if not name.startswith("blocks")]
        frame(axes, x, y - 0.45, (width, 1.15), facecolor=PALE[rank], edgecolor=RANKS[rank])
        title = f"rank {rank}" + (f", chunk {chunk}" if rounds > 1 else "")
        write(axes, x + width / 2, y + 0.52, title, weight="bold")
        write(axes, x + width / 2, y + 0.22, ", ".join(layers), size=9.5)
        per_line = max(1, int(width / 0.8))
        lines = [", ".join(others[i : i + per_line]) for i in range(0, len(others), per_line)]
        write(axes, x + width / 2, y - 0.17, "\n".join(lines), size=8.2, linespacing=1.2)
        if number:
            for place, color, height, ends in (
                (NEXT_CHUNK, FORWARD, 0.28, (x - gap + 0.1, x - 0.1)),
                (CHUNK_BEFORE, BACKWARD, -0.12, (x - 0.1, x - gap + 0.1)),
            ):
                arrow(axes, (ends[0], y + height), (ends[1], y + height), color=color)
                call = sent[place]
                label = f"{call.tensor[1:-1].replace(', ', ' × ')}\n{call.sent_bytes:.4g} B a token"
                va = "bottom" if height > 0 else "top"
                write(
                    axes, x - gap / 2, y + height + (0.05 if height > 0 else -0.05), label, color=color, size=8.2, va=va
                )


def _draw_chart(axes: Axes, traces: Sequence[Trace], y: float) -> None:
    """Passes in the order in which each rank ran them, as early as the passes before them allow."""
    rounds = 1 + max(work.chunk for trace in traces for work in trace.order)
    times = schedule_times(traces)
    end = max(stop for _, stop in times.values())
    scale, left = 9.6 / end, 1.0
    for rank in range(len(traces)):
        bottom = y + 0.55 * (1 - rank)
        fill(axes, left, bottom, (end * scale, 0.46), EMPTY, edgecolor=SOFT)
        write(axes, left - 0.12, bottom + 0.23, f"rank {rank}", ha="right")
    for (rank, work), (begin, stop) in times.items():
        bottom = y + 0.55 * (1 - rank)
        forward = work.kind == "forward"
        fill(
            axes,
            left + begin * scale,
            bottom,
            ((stop - begin) * scale, 0.46),
            PALE[rank] if forward else RANKS[rank],
            edgecolor="white",
        )
        text = f"{'F' if forward else 'B'}{work.pack}" + (f"\nc{work.chunk}" if rounds > 1 else "")
        size = 9 if rounds == 1 else 8
        write(
            axes,
            left + (begin + stop) / 2 * scale,
            bottom + 0.23,
            text,
            size=size,
            color="black" if forward else "white",
        )
    idle = 1 - sum(stop - begin for begin, stop in times.values()) / (end * len(traces))
    chunk = ", c its chunk" if rounds > 1 else ""
    last = max(work.pack for _, work in times)
    note = f"time →   F forward, B backward of pack 0 to {last}{chunk}.  Idle: {idle:.0%}, if all layers cost"
    note += " the same and a backward pass as much as two forward ones"
    write(axes, left, y - 0.2, note, ha="left", color=SOFT)


def schedule_times(traces: Sequence[Trace]) -> dict[Pass, tuple[float, float]]:
    """When each pass begins and ends, if all layers cost alike and a backward pass as much as two forward ones.

    A pass waits for the one before it on its rank, and for the chunk that makes what it takes.
    """
    ranks = len(traces)
    rounds = 1 + max(work.chunk for trace in traces for work in trace.order)
    cost = {"forward": FORWARD_TIME / rounds, "backward": BACKWARD_TIME / rounds}
    times: dict[Pass, tuple[float, float]] = {}
    waiting = [list(trace.order) for trace in traces]
    while any(waiting):
        ready = [rank for rank in range(ranks) if waiting[rank] and _before(waiting[rank][0], rank, traces, times)]
        if not ready:
            raise AssertionError("passes wait for each other")
        for rank in ready:
            work = waiting[rank].pop(0)
            own = [stop for (other, _), (_, stop) in times.items() if other == rank]
            begin = max([0.0, *own, *(times[need][1] for need in _needs(work, rank, ranks, rounds))])
            times[rank, work] = begin, begin + cost[work.kind]
    return times


def _before(work: Work, rank: int, traces: Sequence[Trace], times: Mapping[Pass, object]) -> bool:
    rounds = 1 + max(other.chunk for trace in traces for other in trace.order)
    return all(need in times for need in _needs(work, rank, len(traces), rounds))


def _needs(work: Work, rank: int, ranks: int, rounds: int) -> list[Pass]:
    """The pass whose output a pass takes: of the chunk before, or behind for a backward pass."""
    step = 1 if work.kind == "backward" else -1
    place = work.chunk * ranks + rank + step
    if not 0 <= place < ranks * rounds:
        return []
    return [(place % ranks, Work(kind=work.kind, pack=work.pack, chunk=place // ranks))]
