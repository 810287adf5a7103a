"""Causal softmax attention over histories laid end to end."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from megarec_kernels.softmax_attention import varlen
from megarec_kernels.softmax_attention.cpu import JaggedSoftmaxAttention
from megarec_kernels.softmax_attention.sdpa import attend_tiles
from megarec_kernels.tiles import TilePlan, check_jagged_attention, plan_for
from megarec_kernels.visibility import Visibility, check_visibility


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    plan: TilePlan | None = None,
    visibility: Visibility | None = None,
    weigh: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """Each token attends to itself and to the earlier tokens of its own history that it sees.

    `out_i = sum_{j <= i} softmax_j(scale q_i . k_j) v_j`, per head. Tokens from `cu_seqlens[-1]` on are dead: output
    and gradients are 0 whatever they hold. Memory is linear in T; bf16 and fp16 inputs are summed in fp32. The same
    inputs give the same bits, off the CPU where `README.md` says so. With `weigh`, dropout on the probabilities, all
    of them are kept for the backward: memory then grows with the squares of the lengths, in the dtype of `q`.

    Args:
        q: `[T, N, H]` float64, float32, bfloat16 or float16.
        k: as `q`.
        v: as `q`.
        cu_seqlens: `[B + 1]` int32 or int64, where each history begins; starts with 0, ends at or before T.
        scale: the factor of `q . k`, usually `H ** -0.5`.
        plan: `plan_tiles(cu_seqlens)`, made once and shared by all layers of a step.
        visibility: which earlier tokens a token sees; None: all of them. Costs one number per pair of a tile.
        weigh: the factors `[R, N, keys]` of the probabilities that the tokens `[R]` give to the first `keys` tokens of
            their histories; None for 1.

    Returns:
        `[T, N, H]` in the dtype of `q`.

    Raises:
        ValueError: a shape or dtype is wrong; names the argument.
    """
    plan = plan_for(cu_seqlens, plan)
    check_jagged_attention(q, k, v, plan)
    if v.shape != q.shape:
        raise ValueError(f"v must have the shape of q, {list(q.shape)}, got {list(v.shape)}")
    if visibility is not None:
        plan.once(("places", visibility), partial(check_visibility, visibility, plan))
    if visibility is None and weigh is None and plan.num_tokens and varlen.takes(q):
        return varlen.attend_histories(q, k, v, scale=scale, plan=plan)
    if q.device.type != "cpu" or weigh is not None:
        return attend_tiles(q, k, v, scale=scale, plan=plan, visibility=visibility, weigh=weigh)
    return JaggedSoftmaxAttention.apply(q, k, v, scale, plan, visibility)
