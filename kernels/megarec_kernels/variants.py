"""The ways a Triton kernel is launched, as values: what heuristics choose from and what is compiled ahead of time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel with everything that is known before it is launched; each is another program for the compiler.

    Attributes:
        name: unique, such as `hstu_attention.forward d128 bf16 biases`; recorded bounds are kept by it.
        kernel: the function under `triton.jit`.
        types: of the arguments given at launch, in Triton's notation: `*bf16`, `i32`, `fp32`.
        constants: of the arguments known to the compiler.
        aligned: arguments, pointers or strides, that are multiples of 16.
        num_warps: warps of a program.
        num_stages: loads that a loop keeps in flight.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int = 3
