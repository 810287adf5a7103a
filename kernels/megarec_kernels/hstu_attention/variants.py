"""The programs that HSTU attention compiles to: what the bounds of `kernels/bench/resources.json` are recorded of."""

from collections.abc import Iterator
from typing import Any

from megarec_kernels.hstu_attention.backward import biases_kernel, keys_kernel, queries_kernel
from megarec_kernels.hstu_attention.blocks import Kernel, choose_blocks
from megarec_kernels.hstu_attention.forward import forward_kernel
from megarec_kernels.hstu_attention.gpu import NUM_BUCKET_SUMS, widths_of
from megarec_kernels.variants import Variant

KERNELS: dict[Kernel, Any] = {
    "forward": forward_kernel,
    "queries": queries_kernel,
    "keys": keys_kernel,
    "biases": biases_kernel,
}
NEITHER, BOTH = (False, False), (True, True)


def variants() -> Iterator[Variant]:
    """Every kernel at every width in bf16, and the other dtypes, lengths and masks at one."""
    for width in (128, 256, 64, 32):
        for biases in (NEITHER, BOTH):
            yield _variant("forward", width, biases=biases)
            yield _variant("queries", width, biases=biases)
            yield _variant("keys", width, biases=biases)
            yield _variant("keys", width, biases=biases, atomic=True)
        yield _variant("biases", width, biases=BOTH)
    for kernel in KERNELS:
        yield _variant(kernel, 128, biases=BOTH, visibility=True)
        yield _variant(kernel, 64, biases=BOTH, dtype="fp32")
        yield _variant(kernel, 64, biases=BOTH, short=True)
        yield _variant(kernel, 50, biases=BOTH, dtype="fp16")
        if kernel != "biases":
            yield _variant(kernel, 128, biases=NEITHER, visibility=True)
            yield _variant(kernel, 256, biases=NEITHER, dtype="fp32")
    yield _variant("biases", 128, biases=(True, False))


def _variant(
    kernel: Kernel,
    width: int,
    *,
    biases: tuple[bool, bool],
    dtype: str = "bf16",
    visibility: bool = False,
    short: bool = False,
    atomic: bool = False,
) -> Variant:
    function = KERNELS[kernel]
    widths = widths_of(width, width)
    tma = width == widths[1]
    blocks = choose_blocks(kernel, widths[1], biases=any(biases), wide=dtype == "fp32", short=short, atomic=atomic)
    constants = {
        "WIDTHS": widths,
        "ROWS": blocks.rows,
        "KEYS": blocks.keys,
        "SIDE": blocks.rows,
        "HAS": (*biases, visibility),
        "GRADS": biases,
        "BUCKETS": NUM_BUCKET_SUMS,
        "ATOMIC": atomic,
        "TMA": tma,
        "FAST": dtype != "fp32",
        "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
    }
    if not tma:
        constants |= dict.fromkeys(("q_rows", "k_rows", "v_rows", "grad_out_rows"))
    types = {name: _type_of(name, dtype, atomic) for name in function.arg_names if name not in constants}
    for name in ("q_rows", "k_rows", "v_rows", "grad_out_rows"):
        if name in types:
            rows = blocks.rows if kernel == "keys" else blocks.keys
            types[name] = f"tensordesc<{dtype}[{rows}, {width}]>"
    words = [f"d{width}", dtype, *(["biases"] if biases == BOTH else ["position bias"] if any(biases) else [])]
    flags = {"visibility": visibility, "short": short, "atomic": atomic}
    return Variant(
        name=f"hstu_attention.{kernel} " + " ".join([*words, *(name for name, given in flags.items() if given)]),
        kernel=function,
        types=types,
        constants={name: value for name, value in constants.items() if name in function.arg_names},
        aligned=frozenset(name for name, kind in types.items() if _is_aligned(name, kind, width)),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )


def _type_of(name: str, dtype: str, atomic: bool) -> str:
    if name in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"):
        return "*fp32" if atomic and name == "grad_q" else f"*{dtype}"
    if name in ("tasks", "spans", "plain_tokens", "cells"):
        return "*i64"
    if name in ("asked", "happened", "seen_before", "group_first", "place"):
        return "*i32"
    if name in ("position_bias", "time_bias", "position_sums", "time_sums"):
        return "*fp32"
    return "fp32" if name in ("half_scale", "inverse_divisor") else "i32"


def _is_aligned(name: str, kind: str, width: int) -> bool:
    """Whether it is a multiple of 16, if q, k and v are views of packed rows, as those of a block are."""
    if name in ("q", "k", "v") or name.endswith(("_row", "_head")):
        return width % 16 == 0
    return kind.startswith("*") or name == "num_distances"
