"""What the kernels of the first map are compiled for ahead of time."""

from collections.abc import Iterator

import torch

from megarec_kernels.silu import UvqkLayout
from megarec_kernels.silu.gpu import pack_tile_of, product_tile_of
from megarec_kernels.silu.programs import linear_silu_tile, pack_gradients
from megarec_kernels.variants import Variant

PARTS = ("u", "v", "q", "k")
PRODUCTS = (  # type, dtype, outputs, inputs
    ("bf16", torch.bfloat16, 4096, 1024),
    ("bf16", torch.bfloat16, 128, 1024),
    ("bf16", torch.bfloat16, 4096, 1000),
    ("fp32", torch.float32, 4096, 1024),
)


def variants() -> Iterator[Variant]:
    """Both choices of SiLU at wide and narrow heads, and every tile of the product."""
    for head_width in (64, 256):
        for on_all in (True, False):
            yield _pack(head_width, on_all)
    for name, dtype, num_columns, in_width in PRODUCTS:
        yield _product(name, dtype, num_columns, in_width)


def _pack(head_width: int, on_all: bool) -> Variant:
    layout = UvqkLayout(num_heads=4, v_head_width=head_width, qk_head_width=head_width)
    tile = pack_tile_of(layout)
    warps = tile.pop("num_warps")
    pointers = dict.fromkeys(("uvqk", "out", *(f"{part}_gradient" for part in PARTS)), "*bf16")
    strides = {f"{part}_{of}_stride": "i32" for part in PARTS for of in ("token", "head")}
    return Variant(
        name=f"silu.pack {head_width} bf16 {'uvqk' if on_all else 'u'}",
        kernel=pack_gradients,
        types={**pointers, **strides, "num_rows": "i32"},
        constants={
            "NUM_HEADS": 4,
            "V_WIDTH": head_width,
            "QK_WIDTH": head_width,
            "SILU_ON_ALL": on_all,
            "SILU_ON_U": not on_all,
            **tile,
        },
        aligned=frozenset({*pointers, *strides}),
        num_warps=warps,
    )


def _product(name: str, dtype: torch.dtype, num_columns: int, in_width: int) -> Variant:
    tile = product_tile_of(dtype, num_columns, in_width)
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    pointers = dict.fromkeys(("x", "weight", "bias", "linear", "activated"), f"*{name}")
    sizes = ("num_rows", "num_columns", "in_width", "x_stride", "weight_stride")
    multiples = {"num_columns"} | ({"in_width", "x_stride", "weight_stride"} if tile["EVEN"] else set())
    return Variant(
        name=f"silu.linear {tile['COLUMNS']} {name}{'' if tile['EVEN'] else ' uneven'}",
        kernel=linear_silu_tile,
        types={**pointers, **dict.fromkeys(sizes, "i32")},
        constants={"HAS_BIAS": True, **tile},
        aligned=frozenset({*pointers, *multiples}),
        num_warps=warps,
        num_stages=stages,
    )
