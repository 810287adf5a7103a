"""Every layout against the run of one process: which rows there are, and which fault each one would show.

A row trains 3 steps in fp64 with plain SGD, dropout on, gradients cut by the global norm, and ends with the weights and
table rows of the one-process run within 1e-12 (`tests/parity/layout_runs.py`). Four layers of four heads, so that every
layout has something to split.
"""

from dataclasses import dataclass, field
from typing import Any

ARGUS: dict[str, Any] = {
    "name": "argus",
    "width": 16,
    "table_width": 8,
    "num_layers": 4,
    "max_positions": 32,
    "dropout": 0.1,
    "time_gap_buckets": 6,
    "block": {"num_heads": 4},
    "heads": {"query_width": 8, "hidden_width": 16},
}
HSTU_BLOCK: dict[str, Any] = {"num_heads": 4, "qk_head_width": 4, "v_head_width": 4, "num_time_buckets": 16}
HSTU: dict[str, Any] = {**ARGUS, "name": "hstu", "block": HSTU_BLOCK}
SASREC: dict[str, Any] = {
    **ARGUS,
    "name": "sasrec",
    "dropout": 0.2,
    "block": {"num_heads": 4, "feed_forward_width": 12},
}
PER_HEAD = {"output_norm": "per_head", "output_norm_affine": True, "concat": "u_and_norm", "input_norm_affine": True}


def hstu(**block: Any) -> dict[str, Any]:
    """HSTU with other settings of its blocks."""
    return {**HSTU, "block": {**HSTU_BLOCK, **block}}


# What is trained: settings of a run besides its layout.
SWITCHES: dict[str, dict[str, Any]] = {
    "argus": {"model": ARGUS},
    "hstu": {"model": HSTU},
    "sasrec": {"model": SASREC},
    "sasrec, no dropout": {"model": {**SASREC, "dropout": 0.0}},
    "hstu, per-head norm": {"model": hstu(**PER_HEAD)},
    "hstu, all-heads norm with scale": {"model": hstu(output_norm_affine=True, input_norm_affine=True, uvqk_bias=True)},
    "hstu, softmax": {"model": hstu(weighting="softmax", num_time_buckets=0, position_bias=False)},
    "hstu, prefix": {"model": {**HSTU, "prefix_fields": ["device"], "dropout": 0.2}},
    "hstu, item and action": {"model": {**HSTU, "token_layout": "item_action"}},
    "argus, interleaved": {"model": {**ARGUS, "token_layout": "context_item_feedback"}},
    "candidates": {
        "model": {**HSTU, "token_layout": "item_action"},
        "stream": {"candidates_per_window": 3, "window": "stride:3"},
    },
    "full softmax": {"model": ARGUS, "objective": {"next_item": "full", "chunk_items": 7}},
    "per-position negatives": {
        "model": HSTU,
        "objective": {"negatives": "per_position", "num_uniform_negatives": 5, "correction": "none"},
    },
    "negatives_only correction": {"model": ARGUS, "objective": {"correction": "negatives_only"}},
    "product head": {"model": {**HSTU, "heads": {**ARGUS["heads"], "feedback_head": "product_swish"}}},
    "feedback alone": {"model": HSTU, "objective": {"next_item": "none"}},
    "next item alone": {"model": ARGUS, "objective": {"feedback_weight": 0.0}},
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many processes run, how they share the model, and what of the settings has to fit."""

    world: int
    sizes: dict[str, Any] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)
    num_layers: int = 4


LAYOUTS: dict[str, Layout] = {
    "dp2": Layout(world=2),
    "dp3": Layout(world=3, stream={"lanes": 3, "packs_per_lane": 1}),
    "dp4": Layout(world=4, stream={"lanes": 4, "packs_per_lane": 1}),
    "dp8": Layout(world=8, stream={"lanes": 8, "packs_per_lane": 1}),
    "tp2": Layout(world=2, sizes={"tensor": 2}),
    "tp4": Layout(world=4, sizes={"tensor": 4}),
    "tp2 sp": Layout(world=2, sizes={"tensor": 2, "sequence_parallel": True}),
    "tp4 sp": Layout(world=4, sizes={"tensor": 4, "sequence_parallel": True}),
    "cp2": Layout(world=2, sizes={"context": 2}),
    "cp4": Layout(world=4, sizes={"context": 4}),
    "ring2": Layout(world=2, sizes={"context": 2, "context_by": "ring"}),
    "ring3": Layout(world=3, sizes={"context": 3, "context_by": "ring"}, stream={"tokens_per_pack": 288}),
    "ring4": Layout(world=4, sizes={"context": 4, "context_by": "ring"}),
    "tp2 ring2": Layout(world=4, sizes={"tensor": 2, "context": 2, "context_by": "ring"}),
    "tp2 sp ring2": Layout(world=4, sizes={"tensor": 2, "context": 2, "context_by": "ring", "sequence_parallel": True}),
    "ring2 pp2": Layout(world=4, sizes={"context": 2, "context_by": "ring", "pipeline": 2}),
    "pp2": Layout(world=2, sizes={"pipeline": 2}),
    "pp2 uneven": Layout(world=2, sizes={"pipeline": 2, "layers_per_chunk": [1, 3]}),
    "pp4": Layout(world=4, sizes={"pipeline": 4}),
    "pp2 vp2": Layout(world=2, sizes={"pipeline": 2, "virtual": 2}),
    "pp4 vp2": Layout(world=4, sizes={"pipeline": 4, "virtual": 2}, num_layers=8),
    "tp2 dp2": Layout(world=4, sizes={"tensor": 2}),
    "tp2 pp2": Layout(world=4, sizes={"tensor": 2, "pipeline": 2}),
    "tp2 pp3": Layout(world=6, sizes={"tensor": 2, "pipeline": 3}),
    "tp2 cp2": Layout(world=4, sizes={"tensor": 2, "context": 2}),
    "tp2 sp cp2": Layout(world=4, sizes={"tensor": 2, "context": 2, "sequence_parallel": True}),
    "cp2 pp2": Layout(world=4, sizes={"context": 2, "pipeline": 2}),
    "tp2 sp pp2 dp2": Layout(world=8, sizes={"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
    "tp2 cp2 pp2": Layout(world=8, sizes={"tensor": 2, "context": 2, "pipeline": 2}),
    "recompute attention": Layout(world=1, sizes={"recompute": "attention"}),
    "recompute blocks": Layout(world=1, sizes={"recompute": "block"}),
    "tp2 sp recompute attention": Layout(
        world=2, sizes={"tensor": 2, "sequence_parallel": True, "recompute": "attention"}
    ),
    "cp2 recompute blocks": Layout(world=2, sizes={"context": 2, "recompute": "block"}),
    "pp2 vp2 recompute blocks": Layout(world=2, sizes={"pipeline": 2, "virtual": 2, "recompute": "block"}),
    "dp2 no overlap": Layout(world=2, sizes={"overlap": False}),
    "dp2 zero1": Layout(world=2, sizes={"zero1": True}),
    "tp2 dp2 zero1": Layout(world=4, sizes={"tensor": 2, "zero1": True}),
    "cp2 dp2 zero1": Layout(world=4, sizes={"context": 2, "zero1": True}),
    "tp2 sp pp2 dp2 zero1": Layout(
        world=8, sizes={"tensor": 2, "pipeline": 2, "sequence_parallel": True, "zero1": True}
    ),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison, and what would be wrong if it alone failed."""

    layout: str
    switches: str
    isolates: str
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.layout}: {self.switches}"


WHAT_A_LAYOUT_ISOLATES = {
    "dp2": "losses over global counts, the sum of gradients over replicas, tables over 2 ranks",
    "dp3": "tables over 3 ranks: rows that do not divide evenly",
    "dp4": "tables over 4 ranks",
    "dp8": "tables over 8 ranks, some with no request",
    "tp2": "head order of the split maps, biases shared by heads, slices of tokens before and behind the blocks",
    "tp4": "one head a rank",
    "tp2 sp": "norms and output biases that meet a slice of the tokens",
    "tp4 sp": "slices that end within a history",
    "cp2": "heads for tokens and back, dropout by token number",
    "cp4": "one head a rank, on all tokens",
    "ring2": "partial sums, the way home of gradients, tokens that change ranks before and behind the blocks",
    "ring3": "steps whose keys come from neither neighbour, heads that do not divide over the ranks",
    "ring4": "histories that lie on all ranks",
    "tp2 ring2": "shares of tokens that tensor-parallel ranks hold together",
    "tp2 sp ring2": "the same in slices between the maps",
    "ring2 pp2": "stages that send shares of the tokens",
    "pp2": "what each stage holds, its rows and its losses",
    "pp2 uneven": "layers are named by their number in the whole stack",
    "pp4": "middle stages, which ask the tables for nothing",
    "pp2 vp2": "which pack a chunk reads, two sends between the same ranks (batched they would cross)",
    "pp4 vp2": "middle chunks on every stage",
    "tp2 dp2": "gradients summed over both dimensions once",
    "tp2 pp2": "the norm counts parameters on both stages and replicas of neither twice",
    "tp2 pp3": "a stage without any partial gradient",
    "tp2 cp2": "slices over both dimensions in the order of the pack",
    "tp2 sp cp2": "the same with slices between the maps too",
    "cp2 pp2": "the size of what stages send",
    "tp2 sp pp2 dp2": "all groups at once, 8 processes",
    "tp2 cp2 pp2": "all that share a pack at once, 8 processes",
    "recompute attention": "dropout and biases are the same the second time",
    "recompute blocks": "whole blocks are the same the second time",
    "tp2 sp recompute attention": "collectives run again in the same order on all ranks",
    "cp2 recompute blocks": "the exchange of heads for tokens runs again",
    "pp2 vp2 recompute blocks": "a pack is computed again between the passes of others",
    "dp2 no overlap": "sums of gradients behind the backward pass",
}

EVERY_SWITCH = ("tp2", "tp2 sp", "cp2", "ring2", "pp2", "dp2")
FAST: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("pp2 uneven", "pp2 vp2", "recompute attention", "recompute blocks", "tp2 cp2", "tp2 sp ring2", "pp4"),
        ("hstu, prefix",),
    ),
    "tp2 sp pp2 dp2": ("argus, interleaved",),
    "tp2": ("argus", "hstu", "full softmax", "candidates", "hstu, per-head norm"),
    "tp2 sp": ("argus, interleaved", "hstu, all-heads norm with scale", "per-position negatives"),
    "cp2": ("argus", "hstu, prefix", "sasrec"),
    "ring2": ("argus", "hstu, prefix", "candidates", "sasrec, no dropout"),
    "pp2": ("argus, interleaved", "hstu, prefix", "full softmax"),
    "dp2": ("argus", "feedback alone"),
}
CROSSED = ("argus, interleaved", "hstu, prefix", "sasrec", "full softmax", "candidates")

TABLE = [
    Row(layout=layout, switches=switches, isolates=isolates, slow=switches not in FAST.get(layout, ()))
    for layout, isolates in WHAT_A_LAYOUT_ISOLATES.items()
    for switches in (SWITCHES if layout in EVERY_SWITCH else CROSSED)
    if not ("ring" in layout and switches == "sasrec")  # which drops attention probabilities
]

# Rows whose loss curves are compared, in fp32 with Adam and in bf16; Megatron-Core's ZeRO-1 refuses fp64.
CURVES = [
    Row(layout="tp2 sp", switches="argus and hstu", isolates="Adam and bf16 on pieces of weights"),
    Row(
        layout="pp2 vp2", switches="argus and hstu", isolates="bf16 between stages, losses that the last one tells all"
    ),
    Row(layout="dp2 zero1", switches="argus and hstu", isolates="shares of the optimizer state, the norm over shares"),
    *(
        Row(layout=layout, switches="argus and hstu", isolates=isolates, slow=True)
        for layout, isolates in {
            "cp2": "bf16 that travels by heads",
            "ring2": "bf16 keys whose gradients travel in fp32",
            "dp2": "gradients of bf16 weights summed in fp32",
            "tp2": "the same weights on ranks that round alike",
            "tp4": "one head a rank",
            "pp4": "middle stages",
            "tp2 cp2": "both ways of sharing a pack",
            "tp2 dp2 zero1": "shares of pieces",
            "cp2 dp2 zero1": "shares over data and context ranks together",
            "tp2 sp pp2 dp2 zero1": "all groups at once, 8 processes",
        }.items()
    ),
]
