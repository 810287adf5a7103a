"""Softmax cross entropy in plain torch: the path of the CPU and of fp64, and the twins of the kernels."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megarec_kernels.softmax_cross_entropy import Correction


def shared_losses_reference(
    products: Tensor,
    *,
    target: Tensor,
    candidate_id: Tensor,
    log_q: Tensor | None,
    correction: "Correction",
    inverse_temperature: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `shared_losses`."""
    slot = target[:, None]
    logits = products * inverse_temperature
    excluded = candidate_id[None, :] == candidate_id[slot]
    terms = _terms(
        logits.gather(1, slot),
        logits.masked_fill_(excluded, float("-inf")),
        log_q_target=None if log_q is None else log_q[slot],
        log_q_negative=log_q,
        correction=correction,
    )
    return terms.loss, terms.negative.scatter_(1, slot, terms.target)


def own_losses_reference(
    products: Tensor, *, slots: Tensor, log_q: Tensor | None, correction: "Correction", inverse_temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """As `own_losses`."""
    logits = products * inverse_temperature
    terms = _terms(
        logits[:, :1],
        logits[:, 1:].masked_fill_(slots[:, 1:] == slots[:, :1], float("-inf")),
        log_q_target=None if log_q is None else log_q[slots[:, :1]],
        log_q_negative=None if log_q is None else log_q[slots[:, 1:]],
        correction=correction,
    )
    return terms.loss, torch.cat([terms.target, terms.negative], dim=1)


def log_sum_exp_reference(query: Tensor, items: Tensor, *, chunk_items: int) -> Tensor:
    """As `log_sum_exp`."""
    log_sum = query.new_full((len(query),), float("-inf"))
    for chunk in items.split(chunk_items):
        log_sum = torch.logaddexp(log_sum, (query @ chunk.T).logsumexp(dim=1))
    return log_sum


def exponentials_reference(products: Tensor, log_sum: Tensor) -> Tensor:
    """As `exponentials`."""
    return products.sub_(log_sum[:, None]).exp_()


class _Terms(NamedTuple):
    loss: Tensor
    target: Tensor
    negative: Tensor


def _terms(
    target: Tensor,
    negative: Tensor,
    *,
    log_q_target: Tensor | None,
    log_q_negative: Tensor | None,
    correction: "Correction",
) -> _Terms:
    """Losses `[R]` and their gradients for the logits of the target `[R, 1]` and the negatives `[R, K]`.

    Masked negatives are -inf.
    """
    if correction == "negatives_only":
        assert log_q_target is not None and log_q_negative is not None
        return _negatives_only(target, negative, log_q_target=log_q_target, log_q_negative=log_q_negative)
    if log_q_target is not None and log_q_negative is not None:
        target, negative = target - log_q_target, negative - log_q_negative
    log_sum = torch.logaddexp(target, negative.logsumexp(dim=1, keepdim=True))
    return _Terms(
        loss=(log_sum - target).squeeze(1),
        target=(target - log_sum).exp() - 1,
        negative=(negative - log_sum).exp_(),
    )


def _negatives_only(target: Tensor, negative: Tensor, *, log_q_target: Tensor, log_q_negative: Tensor) -> _Terms:
    largest_q = 1 - torch.finfo(target.dtype).eps
    not_target = torch.log1p(-log_q_target.exp().clamp(max=largest_q))
    negative = negative - log_q_negative + not_target
    num_negatives = negative.isfinite().sum(dim=1, keepdim=True).to(negative.dtype)
    some = num_negatives > 0
    log_sum = torch.where(some, negative.logsumexp(dim=1, keepdim=True), target)
    # 1 - P(target) as a sigmoid: no difference of nearly equal numbers when P is close to 1.
    weight = torch.sigmoid(log_sum - num_negatives.clamp(min=1).log() - target) * some
    return _Terms(
        loss=(weight * (log_sum - target)).squeeze(1),
        target=-weight,
        negative=(negative - log_sum).exp_() * weight,
    )
