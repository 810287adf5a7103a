"""Layer norm in plain torch: the path of the CPU and of fp64, and the twin of the kernels."""

import torch.nn.functional as F
from torch import Tensor

from megarec_kernels.dropout import DropoutMask
from megarec_kernels.dropout.reference import dropout_reference


def layer_norm_reference(x: Tensor, scale: Tensor | None, shift: Tensor | None, *, eps: float) -> Tensor:
    """As `layer_norm`."""
    return F.layer_norm(x, x.shape[-1:], scale, shift, eps)


def add_layer_norm_reference(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    eps: float,
    mask: DropoutMask | None = None,
) -> tuple[Tensor, Tensor]:
    """As `add_layer_norm`."""
    total = x
    if y is not None:
        total = x + y if mask is None else dropout_reference(y, mask, add_to=x)
    return total, layer_norm_reference(total, scale, shift, eps=eps)
