"""Norms."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarec.parallel.parts import Parts, whole_parameter
from megarec.parallel.placement import Init


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(variance + eps)` over the last dimension, then a learned scale and shift if `affine`."""

    def __init__(self, width: int, *, affine: bool = True, eps: float = 1e-6, sum_over: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.scale = whole_parameter((width,), Init(value=1.0), sum_over=sum_over) if affine else None
        self.shift = whole_parameter((width,), Init(), sum_over=sum_over) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """`[*, width]` to `[*, width]`."""
        return F.layer_norm(x, (self.width,), self.scale, self.shift, self.eps)


class AllHeadsNorm(nn.Module):
    """`LayerNorm` over the channels of all heads, of which this rank has some.

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

    def forward(self, x: Tensor) -> Tensor:
        """`[T, local_width]` to `[T, local_width]`."""
        scale, shift = (None if weight is None else weight[self.own] for weight in (self.scale, self.shift))
        if x.shape[1] == self.width:
            return F.layer_norm(x, (self.width,), scale, shift, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own_mean = wide.mean(1)
        own = torch.stack([own_mean, (wide - own_mean[:, None]).square().sum(1)], dim=1)
        means, squares = self.gather_over_heads(own).unbind(2)
        mean = means.mean(0)
        variance = (squares + x.shape[1] * (means - mean).square()).sum(0) / self.width
        normed = ((wide - mean[:, None]) * torch.rsqrt(variance + self.eps)[:, None]).to(x.dtype)
        return normed if scale is None or shift is None else normed * scale + shift


class HeadNorm(nn.Module):
    """`(x - mean) / sqrt(variance + eps)` over the channels of each head; if `affine`, a scale and a shift per head.

    Source: the group norm of the public production code of HSTU, which has one group and one scale per head.
    """

    def __init__(self, num_heads: int, *, affine: bool, eps: float, parts: Parts) -> None:
        super().__init__()
        self.eps = eps
        self.own = parts.own_part(num_heads)
        self.scale = whole_parameter((num_heads,), Init(value=1.0), sum_over=("tp",)) if affine else None
        self.shift = whole_parameter((num_heads,), Init(), sum_over=("tp",)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """`[T, local_N, H]` to `[T, local_N, H]`."""
        normed = F.layer_norm(x, x.shape[2:], eps=self.eps)
        if self.scale is None or self.shift is None:
            return normed
        return normed * self.scale[self.own, None] + self.shift[self.own, None]


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
