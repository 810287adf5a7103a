"""What ranks send in one step, as tables."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from megarec.parallel.placement import Placement

NEXT_CHUNK, CHUNK_BEFORE, GRADIENTS_COME = "to the next chunk", "to the chunk before", "as gradients come"
WIDTH_NAMES = {1: "1", 2: "2", 20: "Dq", 28: "E", 32: "D", 64: "2D", 96: "3D", 128: "4D"}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One call on one rank.

    Attributes:
        operation: of `OPERATIONS`, or torch's name of another one.
        group: the field of `ParallelGroups` that it went over; `?` for none of them.
        size: ranks of the group.
        shape: of the tensor that all ranks sum or hold together, or that one sends.
        item_bytes: of one number.
        to_others: the share of it that this rank sends; in a ring where ranks work on one result.
        phase: the line of the step.
        place: the module or function that called it, or whose backward pass did.
        pack: the number of the pack, in the schedule.
        passes: how many passes of packs had begun.
    """

    operation: str
    group: str
    size: int
    shape: tuple[int, ...]
    item_bytes: int
    to_others: float
    phase: str
    place: str
    pack: int | None
    passes: int

    @property
    def sent_bytes(self) -> float:
        """What this rank sends."""
        count = self.item_bytes * self.to_others
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True, kw_only=True)
class Work:
    """A pass, `forward` or `backward`, of one pack through one chunk of this rank."""

    kind: str
    pack: int
    chunk: int


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter of this rank.

    Attributes:
        kept: what of it this rank's optimizer keeps, first number and count.
        chunk: of this rank's chunks of the model.
        bucket: in which of the chunk's buckets its gradient lies.
        place: where in the chunk's buffer of gradients it begins.
    """

    placement: Placement
    shape: tuple[int, ...]
    kept: tuple[int, int]
    chunk: int
    bucket: int
    place: int


@dataclass(kw_only=True)
class Trace:
    """What one rank did in one step.

    Attributes:
        weights: the parameters it holds.
        shapes: of what goes into each module and comes out, for the first pack, in the order in which modules end.
        collectives: in the order of their calls; those of groups of one rank are left out.
        order: of the passes.
        facts: numbers of the packs and of the tables.
    """

    weights: list[Weight] = field(default_factory=list)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    collectives: list[Collective] = field(default_factory=list)
    order: list[Work] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A collective with the sizes of its tensor in letters, the same for every pack.

    Attributes:
        tensor: `T` tokens, `D` width, `U` rows, `E` table width, `C` candidates, `Q` targets, `P` weights.
        sent_bytes: by each rank for one `unit` of it.
    """

    place: str
    phase: str
    operation: str
    group: str
    tensor: str
    sent_bytes: float
    unit: str


def calls_in_a_layer(traces: Sequence[Trace]) -> dict[Call, int]:
    """The calls of one layer for one pack, and how many of each; the same for all layers and packs."""
    layers = {_layer_of(call) for trace in traces for call in trace.collectives} - {None}
    packs = {work.pack for trace in traces for work in trace.order}
    return _same([_count(traces, pack=pack, layer=layer) for layer in layers for pack in packs])


def calls_in_a_pack(traces: Sequence[Trace]) -> dict[Call, int]:
    """The calls for one pack outside of the layers, the same for all packs."""
    packs = {work.pack for trace in traces for work in trace.order}
    return _same([_count(traces, pack=pack, layer=None) for pack in packs])


def calls_in_a_step(traces: Sequence[Trace]) -> dict[Call, int]:
    """The calls that are made once, however many packs there are."""
    return _count(traces, pack=None, layer=None)


def numbers_per_token(calls: Mapping[Call, int], width: int) -> dict[str, float]:
    """What each rank sends forward and backward, in vectors of `width` numbers of 4 bytes per token of the pack."""
    sums = {"forward": 0.0, "backward": 0.0}
    for call, count in calls.items():
        sums[call.phase] += count * call.sent_bytes / 4 / width
    return sums


def _layer_of(call: Collective) -> str | None:
    kind, _, rest = call.place.partition(".")
    return rest.split(".")[0] if kind == "blocks" else None


def _same(counts: Sequence[dict[Call, int]]) -> dict[Call, int]:
    if any(other != counts[0] for other in counts):
        raise AssertionError("layers or packs differ in what they send")
    return counts[0] if counts else {}


def _count(traces: Sequence[Trace], *, pack: int | None, layer: str | None) -> dict[Call, int]:
    """Of the calls that any rank makes, the most that one rank makes, in the order in which they first come."""
    most: dict[Call, int] = {}
    for trace in traces:
        own = Counter(
            _in_letters(call, trace)
            for call in trace.collectives
            if (None if call.place == GRADIENTS_COME else call.pack) == pack and _layer_of(call) == layer
        )
        most |= {call: max(count, most.get(call, 0)) for call, count in own.items()}
    return most


def _in_letters(call: Collective, trace: Trace) -> Call:
    tensor, sent, unit = _measure(call, trace.facts["tokens"])
    return Call(
        place=call.place.split(".", 2)[2] if call.place.count(".") > 1 else call.place.split(".")[0],
        phase=call.phase,
        operation=call.operation,
        group=call.group,
        tensor=tensor,
        sent_bytes=sent,
        unit=unit,
    )


def _measure(call: Collective, tokens: int) -> tuple[str, float, str]:
    """The tensor of a call, the bytes that each rank sends, and for one of what."""
    shape, one_row = call.shape, call.item_bytes * prod(call.shape[1:])
    width = WIDTH_NAMES.get(prod(call.shape[1:]), "")
    if call.phase == "packs":
        return "integers", 0.0, ""
    if call.phase in ("rows", "row gradients") and shape[0] != call.size:
        return ("[U, E]" if len(shape) > 1 else "[U]"), one_row, "row"
    if call.phase in ("gradients", "update") or call.place == GRADIENTS_COME:
        return "[P]", call.item_bytes * call.to_others, "weight"
    if call.pack is None:
        return str(list(shape)), call.sent_bytes, "step"
    if call.place == "next item" and shape[0] != tokens:
        letter, unit = ("Q", "target") if call.operation == "all-reduce" else ("C", "candidate")
        return f"[{letter}, {width}]", one_row * call.to_others, unit
    if call.operation == "all-to-all" and call.place.endswith("the blocks"):  # as many rows as the pack wants
        return f"[T/{call.size}, {width}]", one_row, "token that moves"
    if shape[0] == call.size * tokens:
        return f"[{call.size}T, {width}]", call.sent_bytes / tokens, "token"
    held = tokens if tokens in shape else tokens // call.size
    width = WIDTH_NAMES.get(prod(shape) // held, str(prod(shape) // held))
    return f"[T{'' if held == tokens else f'/{call.size}'}, {width}]", call.sent_bytes / tokens, "token"
