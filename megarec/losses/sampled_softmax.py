"""Softmax over sampled candidates, with both published corrections for how they were sampled."""

import warnings

import torch
import torch.nn.functional as F
from megarec_kernels.softmax_cross_entropy import Correction, own_losses, shared_losses
from torch import Tensor

from megarec.losses.stored_gradients import attach_gradients, want_gradients


def sampled_softmax(
    query: Tensor,
    candidates: Tensor,
    *,
    target: Tensor,
    candidate_id: Tensor,
    log_q: Tensor | None,
    correction: Correction,
    inverse_temperature: Tensor,
    chunk_rows: int,
) -> Tensor:
    """Sum over queries of the softmax loss of the target among candidates that all queries share.

    With `s_c = inverse_temperature query . candidates_c`, target p, and negatives n = all candidates of another item:

    - `none`:           `-log(e^s_p / (e^s_p + sum_n e^s_n))`
    - `standard`:       the same with `s_c - log_q_c` for every candidate, the target too
    - `negatives_only`: `-stop_gradient(1 - P) log(e^s_p / sum_n e^s'_n)`, `s'_n = s_n - log_q_n + log(1 - e^log_q_p)`,
      `P = e^s_p / (e^s_p + mean_n e^s'_n)`: the target is not sampled, so it is not corrected

    A candidate of the target's item in another slot is an accidental hit and no negative. A query without negatives
    costs 0. Logits exist for `chunk_rows` queries at a time, in fp32 or better; gradients are computed along with
    the loss (on CUDA in the memory of the logits) and kept (as large as the inputs), so a backward computes no
    logits again.

    Source: `standard` is the usual logQ correction (ARGUS, arXiv 2507.15994, with mixed negatives);
    `negatives_only` is arXiv 2507.09331, its public code. We take the mean over the negatives of the query itself,
    accidental hits left out.

    Args:
        query: `[Q, D]`.
        candidates: `[C, D]`.
        target: `[Q]` int64, slot of the query's target in `candidates`.
        candidate_id: `[C]` int64, the candidate's item.
        log_q: `[C]`, log of the probability that one draw gives the candidate, finite; None with `none`.
        correction: which of the three.
        inverse_temperature: scalar tensor; gets a gradient.
        chunk_rows: queries per chunk.

    Returns:
        Scalar in fp32 (fp64 for fp64 inputs); 0 with zero gradients when Q is 0.

    Raises:
        ValueError: a shape is wrong, or `log_q` and `correction` do not belong together; names the argument.
    """
    _check(query, candidates, target, log_q=log_q, correction=correction)
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    if candidate_id.shape != candidates.shape[:1]:
        raise ValueError(f"candidate_id must be [{len(candidates)}], got {list(candidate_id.shape)}")
    sums = _Sums(query, candidates, inverse_temperature)
    log_q = None if log_q is None else log_q.detach().to(sums.query.dtype)
    for first in range(0, len(query), chunk_rows):
        rows = slice(first, first + chunk_rows)
        losses, gradient = shared_losses(
            sums.query[rows] @ sums.candidates.T,
            target=target[rows],
            candidate_id=candidate_id,
            log_q=log_q,
            correction=correction,
            inverse_temperature=sums.inverse_temperature,
        )
        sums.loss += losses.sum()
        if sums.wanted:
            sums.candidates_gradient.addmm_(gradient.T, sums.query[rows])
            sums.query_gradient[rows] = gradient @ sums.candidates
    return sums.result(query, candidates, inverse_temperature)


def sampled_softmax_per_position(
    query: Tensor,
    candidates: Tensor,
    *,
    slots: Tensor,
    order: Tensor,
    log_q: Tensor | None,
    correction: Correction,
    inverse_temperature: Tensor,
) -> Tensor:
    """As `sampled_softmax`, with each query's own negatives, drawn with replacement.

    The logits are those entries of `query candidates^T` that `slots` names, `[Q, 1 + K]`; no candidate is ever copied
    for a query, so memory is that of `slots`. A negative drawn twice counts twice; one equal to the target counts as
    an accidental hit.

    Source: the public HSTU tables (research code of arXiv 2402.17152) draw their negatives so, without correction.

    Args:
        query: `[Q, D]`.
        candidates: `[C, D]`, one row per distinct item.
        slots: `[Q, 1 + K]` int32 or int64, places in `candidates` of each query's target and of its K negatives.
        order: `[Q (1 + K)]` int64, the stable order of the flattened `slots`, by which a candidate's gradient is added
            up. Whoever drew the negatives makes it off the device.
        log_q: `[C]`, log of the probability that one draw gives the candidate, finite; None with `none`.
        correction: as in `sampled_softmax`.
        inverse_temperature: scalar tensor; gets a gradient.

    Returns:
        Scalar in fp32 (fp64 for fp64 inputs); 0 with zero gradients when Q is 0.

    Raises:
        ValueError: a shape is wrong, or `log_q` and `correction` do not belong together; names the argument.
    """
    if slots.dim() != 2 or len(slots) != len(query) or slots.shape[1] < 1:
        raise ValueError(f"slots must be [{len(query)}, 1 + K], got {list(slots.shape)}")
    if order.shape != (slots.numel(),):
        raise ValueError(f"order must be [{slots.numel()}], got {list(order.shape)}")
    _check(query, candidates, slots[:, 0], log_q=log_q, correction=correction)
    sums = _Sums(query, candidates, inverse_temperature)
    if not len(query):
        return sums.result(query, candidates, inverse_temperature)
    log_q = None if log_q is None else log_q.detach().to(sums.query.dtype)
    losses, gradient = own_losses(
        _products_at(sums.query, sums.candidates, slots),
        slots=slots,
        log_q=log_q,
        correction=correction,
        inverse_temperature=sums.inverse_temperature,
    )
    sums.loss = losses.sum()
    if sums.wanted:
        sums.query_gradient = F.embedding_bag(slots, sums.candidates, mode="sum", per_sample_weights=gradient)
        counts = torch.bincount(slots.flatten(), minlength=len(candidates))
        sums.candidates_gradient = F.embedding_bag(
            torch.div(order, slots.shape[1], rounding_mode="floor"),
            sums.query,
            counts.cumsum(0) - counts,
            mode="sum",
            per_sample_weights=gradient.flatten()[order],
        )
    return sums.result(query, candidates, inverse_temperature)


def _products_at(query: Tensor, candidates: Tensor, slots: Tensor) -> Tensor:
    """`query_i . candidates_{slots_ij}`, `[Q, K]`: a matrix product sampled where a sparse matrix has entries."""
    num_queries, num_slots = slots.shape
    if num_slots > len(candidates):  # all products are fewer, and torch wants no more entries than a matrix has
        return (query @ candidates.T).gather(1, slots.long())
    ends = torch.arange(0, slots.numel() + 1, num_slots, dtype=slots.dtype, device=slots.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)  # torch calls its sparse matrices a beta, once
        pattern = torch.sparse_csr_tensor(
            ends,
            slots.flatten(),
            query.new_zeros(slots.numel()),
            (num_queries, len(candidates)),
            check_invariants=False,
        )
        products = torch.sparse.sampled_addmm(pattern, query, candidates.T, beta=0.0)
    return products.values().view(num_queries, num_slots)


class _Sums:
    """The inputs in the dtype sums are kept in, and the loss and gradients of the chunks done so far.

    Both gradients are those of `query . candidates`-logits without the temperature, which `result` applies.
    """

    def __init__(self, query: Tensor, candidates: Tensor, inverse_temperature: Tensor) -> None:
        dtype = torch.promote_types(query.dtype, torch.float32)
        self.wanted = want_gradients(query, candidates, inverse_temperature)
        self.query, self.candidates = query.detach().to(dtype), candidates.detach().to(dtype)
        self.inverse_temperature = inverse_temperature.detach().to(dtype)
        self.loss = self.query.new_zeros(())
        self.query_gradient = torch.zeros_like(self.query) if self.wanted else self.query[:0]
        self.candidates_gradient = torch.zeros_like(self.candidates) if self.wanted else self.candidates[:0]

    def result(self, *inputs: Tensor) -> Tensor:
        """The loss, with its gradients attached for `query, candidates, inverse_temperature`."""
        if not self.wanted:
            return self.loss
        temperature_gradient = (self.query_gradient * self.query).sum().view_as(inputs[2])
        gradients = (
            self.query_gradient * self.inverse_temperature,
            self.candidates_gradient * self.inverse_temperature,
            temperature_gradient,
        )
        return attach_gradients(self.loss, inputs, gradients)


def _check(
    query: Tensor,
    candidates: Tensor,
    target: Tensor,
    *,
    log_q: Tensor | None,
    correction: Correction,
) -> None:
    if query.dim() != 2:
        raise ValueError(f"query must be [Q, D], got {list(query.shape)}")
    if candidates.dim() != 2 or candidates.shape[1] != query.shape[1] or candidates.dtype != query.dtype:
        raise ValueError(
            f"candidates must be {query.dtype} [C, {query.shape[1]}], got {candidates.dtype} {list(candidates.shape)}"
        )
    if target.shape != query.shape[:1]:
        raise ValueError(f"target must be [{len(query)}], got {list(target.shape)}")
    if correction not in ("none", "standard", "negatives_only"):
        raise ValueError(f"correction must be none, standard or negatives_only, got {correction!r}")
    if (log_q is None) != (correction == "none"):
        raise ValueError(f"log_q must be given exactly when correction is not 'none'; correction is {correction!r}")
    if log_q is not None and log_q.shape != candidates.shape[:1]:
        raise ValueError(f"log_q must be [{len(candidates)}], got {list(log_q.shape)}")
