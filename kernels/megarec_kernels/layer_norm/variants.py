"""What the layer norms are compiled for ahead of time: each class of widths, plain and with everything."""

from collections.abc import Iterator
from typing import Any

from megarec_kernels.dropout.variants import MASK_TYPES
from megarec_kernels.layer_norm.gpu import tile_of
from megarec_kernels.layer_norm.programs import norm_rows, norm_rows_backward
from megarec_kernels.variants import Variant

WIDTHS = {"bf16": (256, 1024, 8192), "fp32": (1024,)}


def variants() -> Iterator[Variant]:
    """Forward and backward; `all` is affine, behind a residual add with dropout."""
    for dtype, widths in WIDTHS.items():
        for width in widths:
            for everything in (False, True):
                yield _variant("forward", dtype, width, everything)
                yield _variant("backward", dtype, width, everything)


def _variant(direction: str, dtype: str, width: int, everything: bool) -> Variant:
    rows = f"*{dtype}"
    sizes = {"num_rows": "i32", "width": "i32"}
    if direction == "forward":
        types = {"x": rows, "normed": rows, "eps": "fp32"}
        extra = {"added": rows, "total": rows, "scale": rows, "shift": rows}
    else:
        types = {"x": rows, "gradient": rows, "x_gradient": rows, "added_gradient": rows, "tiles_per_program": "i32"}
        extra = {"total_gradient": rows, "scale": rows, "partials": "*fp32"}
    types |= {"mean": "*fp32", "rstd": "*fp32", **sizes, **MASK_TYPES} | (extra if everything else {})
    tile: dict[str, Any] = tile_of(width)
    warps = tile.pop("num_warps")
    flags = dict.fromkeys(("ADD", "DROP", "AFFINE"), everything)
    return Variant(
        name=f"layer_norm.{direction} {width} {dtype}{' all' if everything else ''}",
        kernel=norm_rows if direction == "forward" else norm_rows_backward,
        types=types,
        constants=flags | tile | ({} if everything else dict.fromkeys(extra)),
        aligned=frozenset(name for name, kind in types.items() if kind.startswith("*")) | {"width"},
        num_warps=warps,
    )
