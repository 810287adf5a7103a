"""In what numbers a run computes. Imports no torch."""

from typing import Literal

Precision = Literal["fp32", "bf16", "fp8_delayed", "fp8_current", "fp8_blockwise"]
"""`fp8_*`: the products of split maps in FP8, all else as in `bf16`."""


def is_fp8(precision: Precision) -> bool:
    """Whether products are in FP8."""
    return precision.startswith("fp8")
