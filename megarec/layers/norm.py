"""Norms."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarec.parallel.parts import whole_parameter
from megarec.parallel.placement import Init


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(variance + eps)` over the last dimension, then a learned scale and shift if `affine`.

    A norm of each head, whose scale is shared by all heads, takes `Parts.enter_heads` as `enter`.
    """

    def __init__(
        self, width: int, *, affine: bool = True, eps: float = 1e-6, enter: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.enter = enter
        self.scale = whole_parameter((width,), Init(value=1.0)) if affine else None
        self.shift = whole_parameter((width,), Init()) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """`[*, width]` to `[*, width]`."""
        scale: Tensor | None = self.scale
        shift: Tensor | None = self.shift
        if self.enter is not None and scale is not None and shift is not None:
            scale, shift = self.enter(scale), self.enter(shift)
        return F.layer_norm(x, (self.width,), scale, shift, self.eps)


def unit_vectors(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / max(|x|, eps)` over the last dimension, in fp32 or wider."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=eps)
