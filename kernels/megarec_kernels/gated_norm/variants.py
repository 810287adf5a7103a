"""What the gated norms are compiled for ahead of time: each published block at its width, and the widest row."""

from collections.abc import Iterator
from dataclasses import replace

from megarec_kernels.dropout.variants import MASK_TYPES
from megarec_kernels.gated_norm.gpu import Shape
from megarec_kernels.gated_norm.programs import gate_rows, gate_rows_backward
from megarec_kernels.variants import Variant

RESEARCH = Shape(groups=1, width=1024, head_width=256, scale="none", concat="none", given=False, drop=True)
SHAPES = {
    "research": RESEARCH,
    "research concat": replace(RESEARCH, concat="u_and_norm"),
    "affine": replace(RESEARCH, scale="channel"),
    "affine 4096": replace(RESEARCH, scale="channel", width=4096),
    "given": replace(RESEARCH, scale="channel", given=True, width=512),
    "production": Shape(
        groups=4, width=256, head_width=256, scale="group", concat="u_and_attention", given=False, drop=True
    ),
    "evaluation": replace(RESEARCH, drop=False),
}


def variants() -> Iterator[Variant]:
    """Forward and backward, bf16."""
    for name, shape in SHAPES.items():
        yield _variant("forward", name, shape)
        yield _variant("backward", name, shape)


def _variant(direction: str, name: str, shape: Shape) -> Variant:
    types = {"u": "*bf16", "attention": "*bf16", "mean": "*fp32", "rstd": "*fp32", "num_rows": "i32", **MASK_TYPES}
    types |= {"u_token_stride": "i32", "u_head_stride": "i32"}
    optional = {"scale": "*bf16", "shift": "*bf16"} if shape.scale != "none" else {}
    absent = {} if optional else {"scale": None, "shift": None}
    if direction == "forward":
        types |= {"out": "*bf16", "eps": "fp32"}
    else:
        types |= {"gradient": "*bf16", "u_gradient": "*bf16", "attention_gradient": "*bf16", "partials": "*fp32"}
        types |= {"tiles_per_program": "i32"}
        given = ("mean_gradient", "rstd_gradient")
        optional |= dict.fromkeys(given, "*fp32") if shape.given else {}
        absent |= {} if shape.given else dict.fromkeys(given)
    types |= optional
    constants = shape.constants()
    warps = constants.pop("num_warps")
    strides = {"u_token_stride", "u_head_stride"}
    return Variant(
        name=f"gated_norm.{direction} {name}",
        kernel=gate_rows if direction == "forward" else gate_rows_backward,
        types=types,
        constants=constants | absent,
        aligned=frozenset(name for name, kind in types.items() if kind.startswith("*")) | strides,
        num_warps=warps,
    )
