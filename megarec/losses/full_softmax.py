"""Exact softmax over every item, in chunks of items with a running log-sum-exp; the items may lie on several ranks."""

import torch
from megarec_kernels.softmax_cross_entropy import exponentials, log_sum_exp
from torch import Tensor

from megarec.losses.stored_gradients import attach_gradients, want_gradients
from megarec.parallel.slices import Slices


def full_softmax(
    query: Tensor,
    items: Tensor,
    *,
    target: Tensor,
    inverse_temperature: Tensor,
    chunk_items: int,
    shards: Slices | None = None,
    first_item: int = 0,
    own: Tensor | None = None,
) -> Tensor:
    """Sum over queries of `log(sum_v e^s_v) - s_target`, `s_v = inverse_temperature query . items_v`.

    Logits exist for `chunk_items` items at a time, `[Q, chunk_items]` in fp32 or better. One pass over the items
    finds each query's log-sum-exp (on CUDA without writing a logit); if a backward can follow, a second one sums the
    gradients, which are kept (as large as the inputs).

    With `shards` each rank has some of the items and all queries. Three numbers per query go over the ranks, in two
    messages, never a logit. A rank counts the losses of its `own` queries; its gradients are those of all losses by its
    items, so the gradient of a query is the sum over ranks.

    Args:
        query: `[Q, D]`.
        items: `[V, D]`, or this rank's slice of them.
        target: `[Q]` int64, row of the query's target among all items.
        inverse_temperature: scalar tensor; gets a gradient.
        chunk_items: items per chunk.
        shards: the ranks that share the items; None: this one has all.
        first_item: the number of this rank's first one.
        own: `[Q]` bool, whose losses this rank counts; None: all.

    Returns:
        Scalar in fp32 (fp64 for fp64 inputs); 0 with zero gradients when Q is 0.

    Raises:
        ValueError: a shape is wrong; names the argument.
    """
    _check(query, items, target, chunk_items=chunk_items)
    shards = shards or Slices()
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = inverse_temperature.detach().to(dtype)
    scaled_query, all_items = query.detach().to(dtype) * scale, items.detach().to(dtype)
    log_sum = log_sum_exp(scaled_query, all_items, chunk_items=chunk_items)
    here = (target >= first_item) & (target < first_item + len(items))
    place, asking = (target - first_item)[here], here.nonzero().squeeze(1)
    target_items = torch.zeros_like(scaled_query).index_copy_(0, asking, all_items[place])
    largest = shards.max(log_sum)
    shares = torch.stack([(log_sum - largest).exp(), (scaled_query * target_items).sum(dim=1)], dim=1)
    total, target_score = shards.sum(shares).unbind(1)
    log_sum = largest + total.log()
    losses = log_sum - target_score
    loss = (losses if own is None else losses[own]).sum()
    if not want_gradients(query, items, inverse_temperature):
        return loss
    query_gradient, items_gradient = -target_items, torch.empty_like(all_items)
    for first in range(0, len(items), chunk_items):
        chunk = all_items[first : first + chunk_items]
        probability = exponentials(scaled_query @ chunk.T, log_sum)
        query_gradient.addmm_(probability, chunk)
        torch.mm(probability.T, scaled_query, out=items_gradient[first : first + chunk_items])
    if len(items):
        items_gradient -= torch.ops.aten.embedding_dense_backward(scaled_query[asking], place, len(items), -1, False)
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
