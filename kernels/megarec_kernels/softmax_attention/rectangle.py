"""Softmax attention between some queries and some keys: partial results that are merged by their log-sum-exp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megarec_kernels.rectangles import Rectangle
from megarec_kernels.visibility import Visibility


def merge_outputs(
    merged: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    rectangles: Sequence[Rectangle],
    visibility: Visibility | None,
) -> None:
    """Merges the attention to the keys of the rectangles into what was found of other keys.

    With output o and log-sum-exp L of the keys so far, and o', L' of new ones: `L'' = log(e^L + e^L')`,
    `o'' = e^(L - L'') o + e^(L' - L'') o'`.

    Args:
        merged: o `[N, I, Hv]` and L `[N, I, 1]`, changed in place; they start with 0 and -inf.
        inputs: q `[N, I, H]` with the scale in it, k `[N, J, H]`, v `[N, J, Hv]`.
        rectangles: of these queries and keys.
        visibility: which earlier tokens a token sees; None: all of its history.
    """
    out, log_sum = merged
    q, k, v = inputs
    for rectangle in rectangles:
        keys, values = rectangle.take_keys(k), rectangle.take_keys(v)
        for block in rectangle.row_blocks():
            scores = _scores(rectangle.take_queries(q, block), keys, rectangle.seen(block, visibility))
            new_log_sum = scores.logsumexp(dim=2, keepdim=True)
            old_out, old_log_sum = rectangle.take_queries(out, block), rectangle.take_queries(log_sum, block)
            total = torch.logaddexp(old_log_sum, new_log_sum)
            known = total.clamp(min=torch.finfo(total.dtype).min)  # a query that saw nothing yet weighs nothing
            weights = (scores - known).exp_()
            new_out = (old_log_sum - known).exp() * old_out + torch.bmm(weights, values)
            rectangle.put_to_queries(new_out, block, out)
            rectangle.put_to_queries(total, block, log_sum)


def add_gradients(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    rectangles: Sequence[Rectangle],
    *,
    log_sum: Tensor,
    visibility: Visibility | None,
) -> None:
    """Adds what the rectangles give to the gradients of q, k, v, in the shapes of `inputs`.

    Args:
        grads: of q, k, v, changed in place.
        grad_out: of the merged output, `[N, I, Hv]`, and `sum over channels of it times the output`, `[N, I, 1]`.
        inputs: as in the forward pass.
        rectangles: of these queries and keys.
        log_sum: `[N, I, 1]`, merged over all keys.
        visibility: which earlier tokens a token sees; None: all of its history.
    """
    q, k, v = inputs
    for rectangle in rectangles:
        keys, values = rectangle.take_keys(k), rectangle.take_keys(v)
        for block in rectangle.row_blocks():
            queries = rectangle.take_queries(q, block)
            outer, delta = (rectangle.take_queries(x, block) for x in grad_out)
            scores = _scores(queries, keys, rectangle.seen(block, visibility))
            weights = (scores - rectangle.take_queries(log_sum, block)).exp_()
            grad_scores = weights * (torch.bmm(outer, values.transpose(1, 2)) - delta)
            rectangle.add_to_queries(torch.bmm(grad_scores, keys), block, grads[0])
            rectangle.add_to_keys(torch.bmm(grad_scores.transpose(1, 2), queries), grads[1])
            rectangle.add_to_keys(torch.bmm(weights.transpose(1, 2), outer), grads[2])


def _scores(queries: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
    scores = torch.bmm(queries, keys.transpose(1, 2))
    scores.view(-1, *seen.shape).masked_fill_(~seen, float("-inf"))
    return scores
