"""Loss of one feedback head: how the next event went."""

import torch
import torch.nn.functional as F
from torch import Tensor


def feedback_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Sum of the cross-entropies of the events whose feedback is known.

    A flag has one logit, of "true", and costs `softplus(logit) - [target = 2] logit`; a field of n > 1 classes has n
    logits and costs `log(sum_c e^logit_c) - logit_(target - 1)`. Rows with target 0 are missing: they cost 0 and get
    zero gradients whatever their logits hold.

    Source: the multi-output classification of ARGUS (arXiv 2507.15994).

    Args:
        logits: `[Q, n]`; n = 1 for a flag.
        target: `[Q]` ids: 0 missing; a flag has 1 false, 2 true; a field of n classes 1..n.

    Returns:
        Scalar in fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: a shape is wrong; names the argument.
    """
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must be [Q, n] with n >= 1, got {list(logits.shape)}")
    if target.shape != logits.shape[:1] or target.is_floating_point():
        raise ValueError(f"target must be [{len(logits)}] integers, got {target.dtype} {list(target.shape)}")
    known = target > 0
    logits = torch.where(known[:, None], logits.to(torch.promote_types(logits.dtype, torch.float32)), 0.0)
    if logits.shape[1] == 1:
        logit = logits.squeeze(1)
        losses = F.softplus(logit) - torch.where(target == 2, logit, 0.0)
    else:
        losses = F.cross_entropy(logits, (target.long() - 1).clamp(min=0), reduction="none")
    return torch.where(known, losses, 0.0).sum()
