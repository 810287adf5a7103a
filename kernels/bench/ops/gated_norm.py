"""Norm, gate and dropout between the attention of an HSTU block and its output map."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from megarec_kernels.gated_norm import Concat, Over, gated_norm
from megarec_kernels.gated_norm.reference import gated_norm_reference
from torch import Tensor

from kernels.bench.cases import Case, Draw, Inputs, Work
from kernels.bench.compiled import compiled
from kernels.bench.ops.dropout import mask_of

KINDS: dict[str, tuple[Over, Concat, bool]] = {
    "research": ("all_heads", "none", False),
    "research concat": ("all_heads", "u_and_norm", False),
    "production": ("per_head", "u_and_attention", True),
}


def cases() -> Iterator[Case]:
    """The published variants, with dropout and without, at 131,072 tokens of 4 heads of 256."""
    for kind in KINDS:
        for dropped in (True, False):
            yield _case("t50 n2 h8", {"small"}, kind, dropped, sizes=(50, 2, 8))
            yield _case("t131072 n4 h256", {"h200"}, kind, dropped, sizes=(1 << 17, 4, 256))


def _case(name: str, sets: set[str], kind: str, dropped: bool, *, sizes: tuple[int, int, int]) -> Case:
    num_tokens, heads, width = sizes
    over, concat, affine = KINDS[kind]
    parts = 1 if concat == "none" else 3
    weights = ("scale", "shift") if affine else ()

    def make_inputs(draw: Draw) -> Inputs:
        inputs: Inputs = {
            "uvqk": draw.normal(num_tokens, heads, 4 * width),
            "attention": draw.normal(num_tokens, heads, width),
            "mask": mask_of(num_tokens, parts * heads * width, draw.device) if dropped else None,
        }
        return inputs | {name: draw.normal(heads) for name in weights}

    def work(inputs: Inputs) -> tuple[Work, Work]:
        size = inputs["attention"].nbytes
        return Work(flops=0.0, bytes=float((2 + parts) * size)), Work(flops=0.0, bytes=float((4 + parts) * size))

    plain = partial(_gate, gated_norm_reference, over=over, concat=concat)
    return Case(
        name=f"{kind}{' dropout' if dropped else ''} {name}",
        sets=frozenset(sets),
        make_inputs=make_inputs,
        truth=plain,
        ours={"ours": partial(_gate, gated_norm, over=over, concat=concat)},
        baselines={"eager": plain, "torch.compile": compiled(plain)},
        gradients=("uvqk", "attention", *weights),
        work=work,
    )


def _gate(method: Any, inputs: Inputs, **settings: Any) -> Tensor:
    """U is a view of the packed rows, as in a block; its gradient there is a copy in every method."""
    u = inputs["uvqk"][:, :, : inputs["attention"].shape[2]]
    weights = inputs.get("scale"), inputs.get("shift")
    return method(u, inputs["attention"], *weights, eps=1e-6, mask=inputs["mask"], **settings)
