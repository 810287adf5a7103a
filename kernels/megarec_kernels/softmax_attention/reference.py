"""Causal softmax attention written straight from the equation, one history at a time, all of its scores at once."""

from itertools import pairwise

import torch
from torch import Tensor

from megarec_kernels.visibility import Visibility


def softmax_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, scale: float, visibility: Visibility | None = None
) -> Tensor:
    """The slow twin of `softmax_attention`: same arguments, any float dtype, gradients by autograd."""
    outputs = []
    bounds = cu_seqlens.tolist()
    for first, last in pairwise(bounds):
        scores = scale * torch.einsum("inh,jnh->nij", q[first:last], k[first:last])
        row = torch.arange(last - first, device=q.device)
        seen = row[:, None] >= row[None, :]
        if visibility is not None:
            seen_before, group_first = (
                visibility.seen_before[first:last, None],
                visibility.group_first[first:last, None],
            )
            seen = (row < seen_before) | (seen & (row >= group_first))
        scores = scores.masked_fill(~seen, float("-inf"))
        outputs.append(torch.einsum("nij,jnh->inh", scores.softmax(dim=-1), v[first:last]))
    outputs.append(v.new_zeros(v.shape[0] - bounds[-1], *v.shape[1:]))
    return torch.cat(outputs)
