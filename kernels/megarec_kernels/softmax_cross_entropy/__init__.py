"""Softmax cross entropy over sampled candidates and over all items, a chunk of logits at a time."""

from typing import Literal

from torch import Tensor

from megarec_kernels.devices import has_kernel
from megarec_kernels.softmax_cross_entropy.reference import (
    exponentials_reference,
    log_sum_exp_reference,
    own_losses_reference,
    shared_losses_reference,
)

Correction = Literal["none", "standard", "negatives_only"]


def shared_losses(
    products: Tensor,
    *,
    target: Tensor,
    candidate_id: Tensor,
    log_q: Tensor | None,
    correction: Correction,
    inverse_temperature: Tensor,
) -> tuple[Tensor, Tensor]:
    """Losses of queries over candidates that all share, and their gradients for the logits, in one pass.

    With logits `s_c = inverse_temperature products_c`, target p, and negatives n = the candidates of other items:

    - `none`:           `loss = log(e^s_p + sum_n e^s_n) - s_p`
    - `standard`:       the same with `s_c - log_q_c`
    - `negatives_only`: `loss = w (log(sum_n e^s'_n) - s_p)`, `s'_n = s_n - log_q_n + log(1 - e^log_q_p)`,
      `w = 1 - P` of `P = e^s_p / (e^s_p + mean_n e^s'_n)`, a constant to the gradient

    A row without negatives costs 0. On CUDA the gradients take the memory of `products`.

    Source: `megarec.losses.sampled_softmax`, which says where the corrections come from.

    Args:
        products: `[R, C]` of queries and candidates, fp32 or fp64; not to be used afterwards.
        target: `[R]` int64, the column of each row's target.
        candidate_id: `[C]` int64, the candidates' items.
        log_q: `[C]` in the dtype of `products`, log of the probability that one draw gives the candidate; None with
            `none`.
        correction: which of the three.
        inverse_temperature: scalar.

    Returns:
        losses `[R]` and gradients for the logits `[R, C]`.
    """
    if has_kernel(products, log_q):
        from megarec_kernels.softmax_cross_entropy.gpu import launch_losses

        return launch_losses(
            products,
            target=target,
            ids=candidate_id,
            log_q=log_q,
            correction=correction,
            inverse_temperature=inverse_temperature,
        )
    return shared_losses_reference(
        products,
        target=target,
        candidate_id=candidate_id,
        log_q=log_q,
        correction=correction,
        inverse_temperature=inverse_temperature,
    )


def own_losses(
    products: Tensor, *, slots: Tensor, log_q: Tensor | None, correction: Correction, inverse_temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """As `shared_losses`, where each row has candidates of its own, the target first.

    Args:
        products: `[R, 1 + K]`, as in `shared_losses`.
        slots: `[R, 1 + K]` int32 or int64, places in the list of candidates, one for each item.
        log_q: `[C]`, by place in that list.
        correction: as in `shared_losses`.
        inverse_temperature: scalar.

    Returns:
        losses `[R]` and gradients for the logits `[R, 1 + K]`.
    """
    if has_kernel(products, log_q):
        from megarec_kernels.softmax_cross_entropy.gpu import launch_losses

        return launch_losses(
            products,
            target=None,
            ids=slots,
            log_q=log_q,
            correction=correction,
            inverse_temperature=inverse_temperature,
        )
    return own_losses_reference(
        products, slots=slots, log_q=log_q, correction=correction, inverse_temperature=inverse_temperature
    )


def log_sum_exp(query: Tensor, items: Tensor, *, chunk_items: int) -> Tensor:
    """`log(sum_v e^(query . items_v))` of each query, -inf without items.

    On CUDA no logit is written: tiles of them live in registers, as in flash attention; fp32 products are three of
    TF32 each (their error is that of fp32). Elsewhere logits exist for `chunk_items` items at a time.

    Args:
        query: `[Q, D]`.
        items: `[V, D]` in the same dtype.
        chunk_items: items per chunk.

    Returns:
        `[Q]` in fp32 (fp64 for fp64 inputs).
    """
    if has_kernel(query, items):
        from megarec_kernels.softmax_cross_entropy.gpu import launch_log_sum_exp

        return launch_log_sum_exp(query, items)
    return log_sum_exp_reference(query, items, chunk_items=chunk_items)


def exponentials(products: Tensor, log_sum: Tensor) -> Tensor:
    """`exp(products - log_sum)` in the memory of `products`, in one pass on CUDA.

    Args:
        products: `[Q, C]` logits.
        log_sum: `[Q]`.

    Returns:
        `products`, now probabilities.
    """
    if has_kernel(products, log_sum):
        from megarec_kernels.softmax_cross_entropy.gpu import launch_exponentials

        return launch_exponentials(products, log_sum)
    return exponentials_reference(products, log_sum)
