"""What `drop_channels` is compiled for ahead of time: the widest tile, with and without a residual."""

from collections.abc import Iterator

from megarec_kernels.dropout.gpu import NUM_WARPS, tile_of
from megarec_kernels.dropout.programs import drop_channels
from megarec_kernels.variants import Variant

MASK_TYPES = {
    "token": "*i64",
    "key": "i64",
    "first_word": "i32",
    "words_per_token": "i32",
    "threshold": "i32",
    "keep_scale": "fp32",
}


def variants() -> Iterator[Variant]:
    """Both kernels of bf16; narrower tiles are taller, of equally many numbers."""
    rows, block = tile_of(1024)
    for add in (False, True):
        pointers = dict.fromkeys(("x", "residual", "out") if add else ("x", "out"), "*bf16")
        constants = {"ADD": add, "ROWS": rows, "BLOCK": block} | ({} if add else {"residual": None})
        yield Variant(
            name=f"dropout {'add ' if add else ''}bf16",
            kernel=drop_channels,
            types={**pointers, "num_rows": "i32", "width": "i32", **MASK_TYPES},
            constants=constants,
            aligned=frozenset({*pointers, "token", "width"}),
            num_warps=NUM_WARPS,
        )
