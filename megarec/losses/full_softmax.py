"""Exact softmax over every item, in chunks of items with a running log-sum-exp."""

import torch
from torch import Tensor

from megarec.losses.stored_gradients import attach_gradients, want_gradients


def full_softmax(
    query: Tensor, items: Tensor, *, target: Tensor, inverse_temperature: Tensor, chunk_items: int
) -> Tensor:
    """Sum over queries of `log(sum_v e^s_v) - s_target`, `s_v = inverse_temperature query . items_v`.

    Logits exist for `chunk_items` items at a time, `[Q, chunk_items]` in fp32 or better. One pass over the items
    finds each query's log-sum-exp; if a backward can follow, a second one sums the gradients, which are kept (as
    large as the inputs).

    Args:
        query: `[Q, D]`.
        items: `[V, D]`.
        target: `[Q]` int64, row of the query's target in `items`.
        inverse_temperature: scalar tensor; gets a gradient.
        chunk_items: items per chunk.

    Returns:
        Scalar in fp32 (fp64 for fp64 inputs); 0 with zero gradients when Q is 0.

    Raises:
        ValueError: a shape is wrong; names the argument.
    """
    _check(query, items, target, chunk_items=chunk_items)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = inverse_temperature.detach().to(dtype)
    scaled_query, all_items = query.detach().to(dtype) * scale, items.detach().to(dtype)
    log_sum = scaled_query.new_full((len(query),), float("-inf"))
    for chunk in all_items.split(chunk_items):
        log_sum = torch.logaddexp(log_sum, (scaled_query @ chunk.T).logsumexp(dim=1))
    target_logit = (scaled_query * all_items[target]).sum(dim=1)
    loss = (log_sum - target_logit).sum()
    if not want_gradients(query, items, inverse_temperature):
        return loss
    query_gradient, items_gradient = -all_items[target], torch.empty_like(all_items)
    for first in range(0, len(items), chunk_items):
        chunk = all_items[first : first + chunk_items]
        probability = (scaled_query @ chunk.T).sub_(log_sum[:, None]).exp_()
        query_gradient.addmm_(probability, chunk)
        torch.mm(probability.T, scaled_query, out=items_gradient[first : first + chunk_items])
    items_gradient -= torch.ops.aten.embedding_dense_backward(scaled_query, target, len(items), -1, False)
    temperature_gradient = (query_gradient * query.detach()).sum().view_as(inverse_temperature)
    gradients = query_gradient * scale, items_gradient, temperature_gradient
    return attach_gradients(loss, (query, items, inverse_temperature), gradients)


def _check(query: Tensor, items: Tensor, target: Tensor, *, chunk_items: int) -> None:
    if query.dim() != 2:
        raise ValueError(f"query must be [Q, D], got {list(query.shape)}")
    if items.dim() != 2 or items.shape[1] != query.shape[1] or items.dtype != query.dtype:
        raise ValueError(f"items must be {query.dtype} [V, {query.shape[1]}], got {items.dtype} {list(items.shape)}")
    if target.shape != query.shape[:1]:
        raise ValueError(f"target must be [{len(query)}], got {list(target.shape)}")
    if chunk_items < 1:
        raise ValueError(f"chunk_items must be at least 1, got {chunk_items}")
