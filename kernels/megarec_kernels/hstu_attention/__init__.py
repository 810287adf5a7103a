"""Pointwise SiLU attention of HSTU over histories laid end to end."""

from functools import partial

from torch import Tensor

from megarec_kernels.devices import has_kernel
from megarec_kernels.hstu_attention.cpu import HSTUSettings, JaggedHSTUAttention
from megarec_kernels.hstu_attention.times import TimeBuckets, bucket_times
from megarec_kernels.tiles import TilePlan, check_jagged_attention, plan_for
from megarec_kernels.visibility import Visibility, check_visibility

MAX_WIDTH = 256  # of a head that the Triton kernels take

__all__ = ["TimeBuckets", "bucket_times", "hstu_attention"]


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    divisor: float,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    timestamp: Tensor | None = None,
    query_timestamp: Tensor | None = None,
    plan: TilePlan | None = None,
    time_buckets: TimeBuckets | None = None,
    visibility: Visibility | None = None,
    deterministic: bool = True,
) -> Tensor:
    """Each token attends to itself and to the earlier tokens of its own history that it sees, without a softmax.

    `out_i = sum_{j <= i} SiLU(scale q_i . k_j + position_bias[i - j] + time_bias[bucket(query_timestamp_i -
    timestamp_j)]) v_j / divisor` with `bucket(x) = clamp(int(log(max(1, |x|)) / 0.301), 0, num_buckets)`; the biases
    are shared by the heads. Tokens from `cu_seqlens[-1]` on are dead: output and gradients are 0 whatever they hold.
    Memory besides `time_buckets` is linear in T; narrow inputs are summed in fp32. The same inputs give the same bits.

    On a CUDA device fp32, fp16 and bf16 of heads up to 256 wide run as Triton kernels, which find the buckets of time
    by themselves; everything else runs in torch, tile by tile.

    Source: HSTU (arXiv 2402.17152) section 3; the public research code. It divides by the padded length, we by a
    fixed number, so that the numbers do not depend on how histories are packed.

    Args:
        q: `[T, N, Hqk]` float64, float32, float16 or bfloat16.
        k: as `q`.
        v: `[T, N, Hv]`.
        cu_seqlens: `[B + 1]` int32 or int64, where each history begins; starts with 0, ends at or before T.
        scale: the factor of `q . k`.
        divisor: what the sum is divided by, in events.
        position_bias: `[max_positions]` by distance i - j, or None.
        time_bias: `[num_buckets + 1]`, or None.
        timestamp: `[T]` int64 seconds, when the event happened; needed by `time_bias`.
        query_timestamp: `[T]` int64 seconds, the time at which the query at that token asks; needed by `time_bias`.
        plan: `plan_tiles(cu_seqlens)`, made once and shared by all layers of a step.
        time_buckets: `bucket_times(plan, ...)`, made once and shared by all layers; stands for the two timestamps.
            A plan keeps what it made of timestamps and of a visibility: they must not be changed in place.
        visibility: which tokens a token sees, and the places that `position_bias` reads distances of; None: all earlier
            ones, and their numbers.
        deterministic: False lets the Triton kernels add the gradient of `q` up in any order, which saves two of seven
            products in the backward.

    Returns:
        `[T, N, Hv]` in the dtype of `q`.

    Raises:
        ValueError: a shape or dtype is wrong, or a history is longer than `position_bias`; names the argument.
    """
    plan = plan_for(cu_seqlens, plan)
    check_jagged_attention(q, k, v, plan)
    for name, bias in (("position_bias", position_bias), ("time_bias", time_bias)):
        if bias is not None and (bias.dim() != 1 or not bias.is_floating_point()):
            raise ValueError(f"{name} must be a vector of floats, got {bias.dtype} {list(bias.shape)}")
    num_places, sees_later = plan.max_length, False
    if visibility is not None:
        num_places, sees_later = plan.once(("places", visibility), partial(check_visibility, visibility, plan))
    if position_bias is not None and len(position_bias) < num_places:
        raise ValueError(f"position_bias has {len(position_bias)} distances, the longest history {num_places} places")
    if time_bias is not None:
        time_buckets = _buckets_for(time_bias, timestamp, query_timestamp, plan=plan, time_buckets=time_buckets)
    else:
        time_buckets = None
    if has_kernel(q, k, v) and max(q.shape[2], v.shape[2]) <= MAX_WIDTH:
        from megarec_kernels.hstu_attention.gpu import attend

        work = plan, time_buckets, visibility
        return attend(
            (q, k, v), (position_bias, time_bias), work, scale=scale, divisor=divisor, deterministic=deterministic
        )
    if sees_later:
        plan, time_buckets = plan.once(("sees later", time_buckets), partial(_see_later, plan, time_buckets))
    settings = HSTUSettings(scale=scale, divisor=divisor, plan=plan, time_buckets=time_buckets, visibility=visibility)
    return JaggedHSTUAttention.apply(q, k, v, position_bias, time_bias, settings)


def _see_later(plan: TilePlan, time_buckets: TimeBuckets | None) -> tuple[TilePlan, TimeBuckets | None]:
    """The same for all pairs of a history."""
    whole = TilePlan(plan.cu_seqlens, sees_later=True)
    return whole, None if time_buckets is None else time_buckets.with_plan(whole)


def _buckets_for(
    time_bias: Tensor,
    timestamp: Tensor | None,
    query_timestamp: Tensor | None,
    *,
    plan: TilePlan,
    time_buckets: TimeBuckets | None,
) -> TimeBuckets:
    num_buckets = len(time_bias) - 1
    if num_buckets < 0:
        raise ValueError("time_bias must have at least one value")
    if time_buckets is not None:
        if not time_buckets.is_of(plan, num_buckets):
            raise ValueError("time_buckets was made for another time_bias or another plan")
        return time_buckets
    if timestamp is None or query_timestamp is None:
        raise ValueError("time_bias needs timestamp and query_timestamp, or time_buckets")
    make = partial(bucket_times, plan, timestamp, query_timestamp, num_buckets=num_buckets)
    return plan.once(("buckets", timestamp, query_timestamp, num_buckets), make)
