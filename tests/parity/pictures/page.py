"""The tables of `docs/parallelism.md` that are written by the code, from traces of every kind of layout."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.parity.trace import trace_run
from tests.parity.traffic import (
    GRADIENTS_COME,
    Call,
    Trace,
    calls_in_a_layer,
    calls_in_a_pack,
    calls_in_a_step,
    numbers_per_token,
)

BLOCKS = {"hstu": "HSTU", "argus": "ARGUS"}
SPLIT_BLOCKS = {"tp2": "tensor", "tp2 sp": "sequence", "cp2": "context by heads", "ring2": "context in a ring"}
WHOLE_BLOCKS = {
    "pp2": "pipeline",
    "pp2 vp2": "virtual stages",
    "dp2": "data",
    "dp2 no overlap": "no overlap",
    "dp2 zero1": "ZeRO-1",
}
FULL_SOFTMAX = {"objective": {"next_item": "full", "chunk_items": 7}}
Traces = dict[tuple[str, str], list[Trace]]  # by the name of the kind and of the model


def trace_all(data: Path) -> Traces:
    """Every kind of layout on two ranks; both models where the block is split."""
    traces = {
        (name, model): trace_run(data, layout, model) for layout, name in SPLIT_BLOCKS.items() for model in BLOCKS
    }
    traces |= {(name, "argus"): trace_run(data, layout, "argus") for layout, name in WHOLE_BLOCKS.items()}
    traces["full softmax", "argus"] = trace_run(data, "tp2", "argus", **FULL_SOFTMAX)
    return traces


def tables(traces: Traces) -> dict[str, str]:
    """Markdown by the name of its place in the page."""
    tensor = calls_in_a_layer(traces["tensor", "argus"])
    for kind, own in traces.items():
        if kind[0] not in SPLIT_BLOCKS.values() and calls_in_a_layer(own) not in ({}, tensor):
            raise AssertionError(f"{kind}: layers send what no table says")
    found = {name: table_of_layers(traces, name) for name in SPLIT_BLOCKS.values()}
    return {**found, "sums": _table_of_sums(traces), "packs": _table_of_packs(traces), "steps": _table_of_steps(traces)}


def insert(page: str, parts: Mapping[str, str]) -> str:
    """`page` with each part between its marks, `<!-- generated: name -->` and `<!-- end -->`."""
    for name, text in parts.items():
        begin = f"<!-- generated: {name} -->"
        page, found = re.subn(
            f"{re.escape(begin)}.*?<!-- end -->", lambda _, b=begin, t=text: f"{b}\n{t}\n<!-- end -->", page, flags=re.S
        )
        if found != 1:
            raise AssertionError(f"the page has {found} places for {name!r}")
    return page


def table_of_layers(traces: Traces, name: str) -> str:
    """What every layer sends for a pack."""
    rows = [
        [BLOCKS[model], f"`{call.place}`", call.phase, *_what(call), str(count), f"{call.sent_bytes:.4g}"]
        for model in BLOCKS
        for call, count in calls_in_a_layer(traces[name, model]).items()
    ]
    return _markdown(["block", "in", "pass", "operation", "over", "tensor", "times", "bytes a token, each time"], rows)


def _table_of_sums(traces: Traces) -> str:
    rows = []
    for name in SPLIT_BLOCKS.values():
        for model, block in BLOCKS.items():
            sums = numbers_per_token(calls_in_a_layer(traces[name, model]), 32)
            rows.append([name, block, f"{sums['forward']:.4g}", f"{sums['backward']:.4g}"])
    return _markdown(["kind", "block", "forward", "backward"], rows)


def _table_of_packs(traces: Traces) -> str:
    calls = {kind: calls_in_a_pack(own) for kind, own in traces.items()}
    rows = [
        [kinds, call.place, call.phase, *_what(call), str(count), f"{call.sent_bytes:.4g} a {call.unit}"]
        for (call, count), kinds in _merge({kind: list(own.items()) for kind, own in calls.items()}).items()
    ]
    return _markdown(["kinds", "where", "pass", "operation", "over", "tensor", "times", "bytes"], rows)


def _table_of_steps(traces: Traces) -> str:
    calls = {}
    for kind, own in traces.items():
        in_buckets = {call for call in calls_in_a_step(own) if call.place == GRADIENTS_COME or call.phase == "update"}
        counted = calls_in_a_step(own).items()
        calls[kind] = [(call, "each bucket" if call in in_buckets else count) for call, count in counted]
    rows = []
    for (call, count), kinds in _merge(calls).items():
        phase = f"{call.phase}, {call.place}" if call.place else call.phase
        sent = f"{call.sent_bytes:.4g} a {call.unit}" if call.unit else "what the packs hold"
        rows.append([kinds, phase, *_what(call), str(count), sent])
    return _markdown(["kinds", "line of the step", "operation", "over", "tensor", "times", "bytes"], rows)


Counted = tuple[Call, int | str]


def _merge(calls: Mapping[tuple[str, str], Sequence[Counted]]) -> dict[Counted, str]:
    """Equal calls once, with the kinds of layout that make them."""
    kinds: dict[Counted, list[str]] = {}
    for (name, _), own in calls.items():
        for counted in own:
            kinds.setdefault(counted, []).append(name)
    everything = dict.fromkeys(name for name, _ in calls)
    merged = {}
    for counted, names in kinds.items():
        without = [name for name in everything if name not in names]
        merged[counted] = ", ".join(dict.fromkeys(names))
        if len(without) < 3:
            merged[counted] = f"all but {', '.join(without)}" if without else "all"
    return merged


def _what(call: Call) -> list[str]:
    return [call.operation, f"`{call.group}`", f"`{call.tensor}`"]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
