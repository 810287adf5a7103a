"""Dropout in plain torch: the path of the CPU and of fp64, and the twin of the kernel."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from megarec_kernels.dropout import DropoutMask


def dropout_reference(x: Tensor, mask: "DropoutMask", *, add_to: Tensor | None = None) -> Tensor:
    """As `dropout`, with the mask as a tensor."""
    dropped = x * mask.keep(x.shape[1]) / (1.0 - mask.probability)
    return dropped if add_to is None else add_to + dropped
