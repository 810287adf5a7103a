"""HSTU attention between some queries and some keys: partial sums that add up to the attention of the whole pack."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megarec_kernels.hstu_attention.cpu import LOG_WIDTH
from megarec_kernels.rectangles import Rectangle
from megarec_kernels.visibility import Visibility

Buckets = Sequence[Sequence[Tensor]]
"""The time bucket of every pair, per rectangle and block of rows: `[U, i, J]`."""


def bucket_rectangles(
    rectangles: Sequence[Rectangle], timestamp: Tensor, query_timestamp: Tensor, *, num_buckets: int
) -> Buckets:
    """As `bucket_times`, for the pairs of rectangles; both times are `[T]` int64, of the whole pack."""
    dtype = torch.uint8 if num_buckets <= 255 else torch.int32
    buckets = []
    for rectangle in rectangles:
        happened = timestamp[rectangle.key_token.clamp(min=0)]
        asked = query_timestamp[rectangle.query_token.clamp(min=0)]
        blocks = []
        for block in rectangle.row_blocks():
            seconds = (asked[:, block, None] - happened[:, None]).abs_().clamp_(min=1).double()
            blocks.append(seconds.log_().div_(LOG_WIDTH).clamp_(max=num_buckets).to(dtype))
        buckets.append(blocks)
    return buckets


@dataclass(frozen=True, kw_only=True)
class Biases:
    """The biases of one attention and the sums of their gradients, in fp64, or None."""

    position: Tensor | None = None
    time: Tensor | None = None
    grad_position: Tensor | None = None
    grad_time: Tensor | None = None


def add_outputs(
    out_NTH: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    rectangles: Sequence[Rectangle],
    *,
    biases: Biases,
    buckets: Buckets,
    visibility: Visibility | None,
) -> None:
    """Adds `sum_j SiLU(q_i . k_j + biases) v_j` over the keys j of the rectangles that query i sees.

    Args:
        out_NTH: `[N, I, Hv]`, the sums so far, in fp32 or fp64.
        inputs: q `[N, I, H]` with the scale in it, k `[N, J, H]`, v `[N, J, Hv]`.
        rectangles: of these queries and keys.
        biases: of the scores.
        buckets: from `bucket_rectangles`; empty without a time bias.
        visibility: which earlier tokens a token sees; None: all of its history.
    """
    q, k, v = inputs
    for number, rectangle in enumerate(rectangles):
        keys, values = rectangle.take_keys(k), rectangle.take_keys(v)
        for place, block in enumerate(rectangle.row_blocks()):
            scores = torch.bmm(rectangle.take_queries(q, block), keys.transpose(1, 2))
            _add_biases(
                scores, rectangle, block, biases=biases, visibility=visibility, buckets=buckets, at=(number, place)
            )
            weights = _forget(F.silu(scores, inplace=True), rectangle.seen(block, visibility))
            rectangle.add_to_queries(torch.bmm(weights, values), block, out_NTH)


def add_gradients(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out_NTH: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    rectangles: Sequence[Rectangle],
    *,
    biases: Biases,
    buckets: Buckets,
    visibility: Visibility | None,
) -> None:
    """Adds what the rectangles give to the gradients of q, k, v (in the shapes of `inputs`) and of the biases."""
    q, k, v = inputs
    for number, rectangle in enumerate(rectangles):
        keys, values = rectangle.take_keys(k), rectangle.take_keys(v)
        for place, block in enumerate(rectangle.row_blocks()):
            queries, grad_out = rectangle.take_queries(q, block), rectangle.take_queries(grad_out_NTH, block)
            seen = rectangle.seen(block, visibility)
            scores = torch.bmm(queries, keys.transpose(1, 2))
            _add_biases(
                scores, rectangle, block, biases=biases, visibility=visibility, buckets=buckets, at=(number, place)
            )
            grad_scores = torch.bmm(grad_out, values.transpose(1, 2))
            grad_scores = _forget(torch.ops.aten.silu_backward(grad_scores, scores), seen)
            weights = _forget(F.silu(scores, inplace=True), seen)
            rectangle.add_to_queries(torch.bmm(grad_scores, keys), block, grads[0])
            rectangle.add_to_keys(torch.bmm(grad_scores.transpose(1, 2), queries), grads[1])
            rectangle.add_to_keys(torch.bmm(weights.transpose(1, 2), grad_out), grads[2])
            by_pair = grad_scores.view(-1, *seen.shape).sum(0).double().flatten()
            if biases.grad_position is not None:
                distance = rectangle.distance(block, visibility).flatten().clamp(max=len(biases.grad_position) - 1)
                biases.grad_position.index_add_(0, distance, by_pair)
            if biases.grad_time is not None:
                biases.grad_time.index_add_(0, buckets[number][place].flatten().int(), by_pair)


def _forget(pairs: Tensor, seen: Tensor) -> Tensor:
    pairs.view(-1, *seen.shape).masked_fill_(~seen, 0)
    return pairs


def _add_biases(
    scores: Tensor,
    rectangle: Rectangle,
    block: slice,
    *,
    biases: Biases,
    visibility: Visibility | None,
    buckets: Buckets,
    at: tuple[int, int],
) -> None:
    by_user = scores.view(-1, rectangle.query_row.shape[0], *scores.shape[1:])
    if biases.position is not None:
        distance = rectangle.distance(block, visibility).clamp_(max=len(biases.position) - 1)  # of unseen pairs any
        by_user.add_(biases.position[distance])
    if biases.time is not None:
        by_user.add_(biases.time[buckets[at[0]][at[1]].int()])
