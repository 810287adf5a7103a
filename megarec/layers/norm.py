"""Norms."""

import torch
import torch.nn.functional as F
from megarec_kernels.dropout import DropoutMask
from megarec_kernels.gated_norm import Concat, gated_norm
from megarec_kernels.layer_norm import add_layer_norm, layer_norm
from torch import Tensor, nn

from megarec.parallel.parts import Parts, whole_parameter
from megarec.parallel.placement import Init


class NormWeights(nn.Module):
    """What norms over the last dimension of `[*, width]` have: a scale and a shift if `affine`, and `eps`."""

    def __init__(self, width: int, *, affine: bool = True, eps: float = 1e-6, sum_over: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.eps = eps
        self.scale = whole_parameter((width,), Init(value=1.0), sum_over=sum_over) if affine else None
        self.shift = whole_parameter((width,), Init(), sum_over=sum_over) if affine else None


class LayerNorm(NormWeights):
    """`(x - mean) / sqrt(variance + eps)` over the last dimension, then a learned scale and shift if `affine`."""

    def forward(self, x: Tensor) -> Tensor:
        """`[*, width]` to `[*, width]`."""
        return layer_norm(x, self.scale, self.shift, eps=self.eps)


class ResidualNorm(NormWeights):
    """`LayerNorm` of a residual stream, behind what is added to it."""

    def forward(self, x: Tensor, added: Tensor | None = None, mask: DropoutMask | None = None) -> tuple[Tensor, Tensor]:
        """The stream `x + dropout(added)`, or x, and its norm; all `[T, width]`."""
        return add_layer_norm(x, added, self.scale, self.shift, eps=self.eps, mask=mask)


class GatedAllHeadsNorm(nn.Module):
    """`LayerNorm` of attention over the channels of all heads, of which this rank has some, and the gate behind it.

    Ranks tell each other the mean m and the sum of squares M around it of their W channels, two numbers a token:
    the whole has the mean of the means and `sum of M + W (m - mean)^2` (Chan, Golub and LeVeque, 1983).
    """

    def __init__(self, width: int, *, affine: bool, eps: float, parts: Parts) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.gather_over_heads = parts.gather_over_heads
        self.own = parts.own_part(width)
        self.scale = whole_parameter((width,), Init(value=1.0), sum_over=("tp",)) if affine else None
        self.shift = whole_parameter((width,), Init(), sum_over=("tp",)) if affine else None

    def forward(self, u: Tensor, attention: Tensor, *, concat: Concat, mask: DropoutMask | None) -> Tensor:
        """`gated_norm` of `[T, local_N, Hv]`."""
        scale, shift = (None if weight is None else weight[self.own] for weight in (self.scale, self.shift))
        return gated_norm(
            u,
            attention,
            scale,
            shift,
            over="all_heads",
            eps=self.eps,
            concat=concat,
            mask=mask,
            statistics=self._over_ranks(attention.flatten(1)),
        )

    def _over_ranks(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and 1 / standard deviation of each token over the heads of all ranks; None if this one has all."""
        if x.shape[1] == self.width:
            return None
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own_mean = wide.mean(1)
        own = torch.stack([own_mean, (wide - own_mean[:, None]).square().sum(1)], dim=1)
        means, squares = self.gather_over_heads(own).unbind(2)
        mean = means.mean(0)
        variance = (squares + x.shape[1] * (means - mean).square()).sum(0) / self.width
        return mean, torch.rsqrt(variance + self.eps)


class GatedHeadNorm(nn.Module):
    """Attention less its mean over its standard deviation, head by head, and the gate behind it.

    With `affine` it has a scale and a shift per head. Source: the group norm of the public production code of HSTU,
    which has one group and one scale per head.
    """

    def __init__(self, num_heads: int, *, affine: bool, eps: float, parts: Parts) -> None:
        super().__init__()
        self.eps = eps
        self.own = parts.own_part(num_heads)
        self.scale = whole_parameter((num_heads,), Init(value=1.0), sum_over=("tp",)) if affine else None
        self.shift = whole_parameter((num_heads,), Init(), sum_over=("tp",)) if affine else None

    def forward(self, u: Tensor, attention: Tensor, *, concat: Concat, mask: DropoutMask | None) -> Tensor:
        """`gated_norm` of `[T, local_N, Hv]`."""
        scale, shift = (None if weight is None else weight[self.own] for weight in (self.scale, self.shift))
        return gated_norm(u, attention, scale, shift, over="per_head", eps=self.eps, concat=concat, mask=mask)


class SwishNorm(nn.Module):
    """`x sigmoid(LN(x))`, the gate of the public production code of HSTU (ops/pytorch/pt_layer_norm.py)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """`[*, width]` to `[*, width]`."""
        return x * torch.sigmoid(self.norm(x))


def unit_vectors(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / max(|x|, eps)` over the last dimension, in fp32 or wider."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=eps)
