"""Where a Triton kernel runs."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def has_kernel(*values: Tensor | None) -> bool:
    """Whether all values are on a GPU in one dtype that kernels take; fp64, the truth of tests, is plain torch's."""
    present = [value for value in values if value is not None]
    return all(value.is_cuda and value.dtype == present[0].dtype for value in present) and (
        present[0].dtype in KERNEL_DTYPES
    )


def on_its_device(run: Callable[P, R]) -> Callable[P, R]:
    """A function that launches kernels, on the device of its first tensor: Triton launches on the current one.

    What autograd runs for it later is on the right device already.
    """

    @wraps(run)
    def guarded(*args: P.args, **settings: P.kwargs) -> R:
        with torch.cuda.device_of(next(value for value in args if isinstance(value, Tensor))):
            return run(*args, **settings)

    return guarded
