"""Gated norm in plain torch: the path of the CPU and of fp64, and the twin of the kernels."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from megarec_kernels.dropout import DropoutMask
from megarec_kernels.dropout.reference import dropout_reference

if TYPE_CHECKING:
    from megarec_kernels.gated_norm import Concat, Over


def gated_norm_reference(
    u: Tensor,
    attention: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    over: "Over",
    eps: float,
    concat: "Concat",
    mask: DropoutMask | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `gated_norm`."""
    if over == "per_head":
        normed = _norm_heads(attention, scale, shift, eps=eps)
    else:
        normed = _norm_tokens(attention.flatten(1), scale, shift, eps=eps, statistics=statistics).view_as(attention)
    gated = u * normed
    if concat == "u_and_norm":
        gated = torch.cat([u, normed, gated], dim=2)
    elif concat == "u_and_attention":
        gated = torch.cat([u, attention, gated], dim=2)
    gated = gated.flatten(1)
    return gated if mask is None else dropout_reference(gated, mask)


def _norm_heads(x: Tensor, scale: Tensor | None, shift: Tensor | None, *, eps: float) -> Tensor:
    normed = F.layer_norm(x, x.shape[2:], eps=eps)
    return normed if scale is None or shift is None else normed * scale[:, None] + shift[:, None]


def _norm_tokens(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, *, eps: float, statistics: tuple[Tensor, Tensor] | None
) -> Tensor:
    if statistics is None:
        return F.layer_norm(x, x.shape[1:], scale, shift, eps)
    mean, rstd = statistics
    normed = ((x.to(mean.dtype) - mean[:, None]) * rstd[:, None]).to(x.dtype)
    return normed if scale is None or shift is None else normed * scale + shift
