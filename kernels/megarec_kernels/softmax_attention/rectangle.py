"""Softmax attention between some queries and some keys: partial results that are merged by their log-sum-exp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megarec_kernels.rectangles import Rectangle
from megarec_kernels.softmax_attention.cpu import flash_backward, flash_forward
from megarec_kernels.visibility import Visibility

Three = tuple[Tensor, Tensor, Tensor]
ON_CPU = "cpu"  # where torch's flash kernel takes a mask and says the log-sum-exp


def merge_outputs(
    merged: tuple[Tensor, Tensor],
    inputs: Three,
    rectangles: Sequence[Rectangle],
    *,
    scale: float,
    visibility: Visibility | None,
) -> None:
    """Merges the attention to the keys of the rectangles into what was found of other keys.

    With output o and log-sum-exp L of the keys so far, and o', L' of new ones: `L'' = log(e^L + e^L')`,
    `o'' = e^(L - L'') o + e^(L' - L'') o'`.

    Args:
        merged: o `[N, I, H]` and L `[N, I, 1]`, changed in place; they start with 0 and -inf.
        inputs: q `[N, I, H]`, k and v `[N, J, H]`, in fp32 or fp64.
        rectangles: of these queries and keys.
        scale: the factor of `q . k`.
        visibility: which earlier tokens a token sees; None: all of its history.
    """
    for rectangle in rectangles:
        query, key, value = _take(rectangle, inputs)
        old_out, old_log_sum = (rectangle.queries.take(x) for x in merged)
        new_out, new_log_sum = old_out.clone(), old_log_sum.clone()
        for block in rectangle.row_blocks():
            rows, seen = slice(*block[:2]), slice(block[2])
            mask = _mask(rectangle, visibility, block, like=query)
            out, log_sum = _forward(query[:, :, rows], key[:, :, seen], value[:, :, seen], mask=mask, scale=scale)
            before, log_sum = old_log_sum[:, :, rows], log_sum.unsqueeze(3)
            total = torch.logaddexp(before, log_sum)
            known = _finite(total)
            new_out[:, :, rows] = (before - known).exp() * old_out[:, :, rows] + (log_sum - known).exp() * out
            new_log_sum[:, :, rows] = total
        rectangle.queries.put(new_out, merged[0])
        rectangle.queries.put(new_log_sum, merged[1])


def add_gradients(
    grads: Three,
    grad_out: Tensor,
    inputs: Three,
    rectangles: Sequence[Rectangle],
    *,
    merged: tuple[Tensor, Tensor],
    scale: float,
    visibility: Visibility | None,
) -> None:
    """Adds what the rectangles give to the gradients of q, k, v, in the shapes of `inputs`.

    The probabilities of a rectangle are those of all keys, `e^(s_ij - L_i)`, and so is `D_i = g_i . out_i`.

    Args:
        grads: of q, k, v, changed in place.
        grad_out: of the merged output, `[N, I, H]`.
        inputs: as in the forward pass.
        rectangles: of these queries and keys.
        merged: output `[N, I, H]` and log-sum-exp `[N, I, 1]` of all keys.
        scale: the factor of `q . k`.
        visibility: which earlier tokens a token sees; None: all of its history.
    """
    for rectangle in rectangles:
        query, key, value = _take(rectangle, inputs)
        out, log_sum = (rectangle.queries.take(x) for x in merged)
        log_sum = _finite(log_sum)
        outer = rectangle.queries.take_gradient(grad_out)
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (query, key, value))
        for block in rectangle.row_blocks():
            rows, seen = slice(*block[:2]), slice(block[2])
            own = outer[:, :, rows], query[:, :, rows], key[:, :, seen], value[:, :, seen], out[:, :, rows]
            mask = _mask(rectangle, visibility, block, like=query)
            found = _backward(*own, log_sum[:, :, rows, 0], mask=mask, scale=scale)
            for total, part in (
                (grad_q[:, :, rows], found[0]),
                (grad_k[:, :, seen], found[1]),
                (grad_v[:, :, seen], found[2]),
            ):
                total += part
        rectangle.queries.add(grad_q, grads[0])
        rectangle.keys.add(grad_k, grads[1])
        rectangle.keys.add(grad_v, grads[2])


def _take(rectangle: Rectangle, inputs: Three) -> Three:
    """Queries `[N, U, I, H]`, keys and values `[N, U, J, H]` of a rectangle."""
    q, k, v = inputs
    return rectangle.queries.take(q), rectangle.keys.take(k), rectangle.keys.take(v)


def _mask(
    rectangle: Rectangle, visibility: Visibility | None, block: tuple[int, int, int], *, like: Tensor
) -> Tensor | None:
    """What is added to the scores of a block, `[1, U, rows, keys]`; None where every key is seen."""
    seen = rectangle.seen(visibility, block)
    if seen.all():
        return None
    return like.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf).unsqueeze(0)


def _finite(log_sum: Tensor) -> Tensor:
    """The log-sum-exp of a query that saw nothing, as a number: what is -inf behind it then weighs 0."""
    return log_sum.clamp(min=torch.finfo(log_sum.dtype).min)


def _forward(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[N, U, rows, H]` and log-sum-exp `[N, U, rows]`: 0 and -inf of a query that sees no key."""
    if query.device.type != ON_CPU:
        scores = _scores(query, key, mask, scale)
        log_sum = scores.logsumexp(dim=3)
        return scores.sub_(_finite(log_sum).unsqueeze(3)).exp_() @ value, log_sum
    out, log_sum = flash_forward(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    if mask is not None:  # the kernel says 0 of a query that sees no key
        log_sum = log_sum.masked_fill(mask.amax(dim=3) < 0, -torch.inf)
    return out, log_sum


def _backward(  # noqa: PLR0917 (in the order of the kernel of torch)
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
) -> Three:
    """Gradients of query, key and value."""
    if query.device.type == ON_CPU:
        grads: Three = flash_backward(
            grad_out, query, key, value, out, log_sum, 0.0, False, attn_mask=mask, scale=scale
        )
        return grads
    weights = _scores(query, key, mask, scale).sub_(log_sum.unsqueeze(3)).exp_()
    delta = (grad_out * out).sum(dim=3, keepdim=True)
    grad_scores = weights * (grad_out @ value.transpose(2, 3) - delta) * scale
    return grad_scores @ key, grad_scores.transpose(2, 3) @ query, weights.transpose(2, 3) @ grad_out


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = (query * scale) @ key.transpose(2, 3)
    return scores if mask is None else scores + mask
