"""HSTU attention written straight from the equation, one history at a time, all of its scores at once."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from megarec_kernels.visibility import Visibility

LOG_WIDTH = 0.301  # of a time bucket: a factor of 1.35


def time_bucket(seconds: Tensor, num_buckets: int) -> Tensor:
    """`clamp(int(log(max(1, |seconds|)) / 0.301), 0, num_buckets)`, int64."""
    return (seconds.abs().clamp(min=1).double().log() / LOG_WIDTH).long().clamp(0, num_buckets)


def hstu_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    divisor: float,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    timestamp: Tensor | None = None,
    query_timestamp: Tensor | None = None,
    visibility: Visibility | None = None,
) -> Tensor:
    """The slow twin of `hstu_attention`: same arguments, any float dtype, gradients by autograd."""
    outputs = []
    bounds = cu_seqlens.tolist()
    for first, last in pairwise(bounds):
        scores = scale * torch.einsum("inh,jnh->nij", q[first:last], k[first:last])
        row = torch.arange(last - first, device=q.device)
        distance = row[:, None] - row[None, :]
        seen = distance >= 0
        if visibility is not None:
            seen_before, group_first, place = (x[first:last, None] for x in vars(visibility).values())
            seen = (row < seen_before) | (seen & (row >= group_first))
            distance = place - place.T
        if position_bias is not None:
            scores = scores + position_bias[distance.clamp(min=0)]
        if time_bias is not None:
            assert timestamp is not None and query_timestamp is not None
            seconds = query_timestamp[first:last, None] - timestamp[None, first:last]
            scores = scores + time_bias[time_bucket(seconds, len(time_bias) - 1)]
        weights = F.silu(scores).masked_fill(~seen, 0.0) / divisor
        outputs.append(torch.einsum("nij,jnh->inh", weights, v[first:last]))
    outputs.append(v.new_zeros(v.shape[0] - bounds[-1], *v.shape[1:]))
    return torch.cat(outputs)
