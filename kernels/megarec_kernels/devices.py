"""Where a Triton kernel runs."""

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def has_kernel(*values: Tensor | None) -> bool:
    """Whether all values are on a GPU in one dtype that kernels take; fp64, the truth of tests, is plain torch's."""
    present = [value for value in values if value is not None]
    return all(value.is_cuda and value.dtype == present[0].dtype for value in present) and (
        present[0].dtype in KERNEL_DTYPES
    )
