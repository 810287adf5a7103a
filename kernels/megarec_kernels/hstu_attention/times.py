"""The times of a pack, and what each kernel makes of them once for all layers."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megarec_kernels.hstu_attention.reference import LOG_WIDTH, time_bucket
from megarec_kernels.tiles import AttentionPlan

FARTHEST = (1 << 30) - 1  # seconds from the first event of a history, 34 years: a difference of two fits in 31 bits
NUM_CELLS = 249  # cells of [1, 2^31]: eighths of octaves
NEVER = (1 << 31) - 1


class TimeBuckets:
    """When the events of a pack happened and when its queries ask; all layers share it.

    Attributes:
        num_buckets: the last bucket.
    """

    def __init__(self, plan: AttentionPlan, timestamp: Tensor, query_timestamp: Tensor, *, num_buckets: int) -> None:
        for name, value in (("timestamp", timestamp), ("query_timestamp", query_timestamp)):
            if value.dtype != torch.int64 or value.dim() != 1 or len(value) < plan.num_tokens:
                raise ValueError(f"{name} must be int64 [T], got {value.dtype} {list(value.shape)}")
        self.num_buckets = num_buckets
        self._plan, self._timestamp, self._query_timestamp = plan, timestamp, query_timestamp

    def is_of(self, plan: AttentionPlan, num_buckets: int) -> bool:
        """Whether it was made of this plan, for so many buckets."""
        return self._plan is plan and self.num_buckets == num_buckets

    def with_plan(self, plan: AttentionPlan) -> "TimeBuckets":
        """The same times, for another plan of the pack."""
        return TimeBuckets(plan, self._timestamp, self._query_timestamp, num_buckets=self.num_buckets)

    @cached_property
    def blocks(self) -> tuple[tuple[Tensor, ...], ...]:
        """The bucket of every causal pair, per tile and block of rows: `[num_users, rows, keys]`."""
        dtype = torch.uint8 if self.num_buckets <= 255 else torch.int32
        blocks = []
        for tile in self._plan.tiles:
            asked, happened = self._query_timestamp[tile.query_token], self._timestamp[tile.key_token]
            blocks.append(
                tuple(
                    time_bucket(asked[:, first:last, None] - happened[:, None, :num_keys], self.num_buckets).to(dtype)
                    for first, last, num_keys in tile.row_blocks()
                )
            )
        return tuple(blocks)

    @cached_property
    def of_tokens(self) -> "PairTimes":
        """What the kernels read that find the bucket of a pair by themselves."""
        return pair_times(self._plan.cu_seqlens, self._timestamp, self._query_timestamp, num_buckets=self.num_buckets)


def bucket_times(plan: AttentionPlan, timestamp: Tensor, query_timestamp: Tensor, *, num_buckets: int) -> TimeBuckets:
    """Sorts the time between every query and key into buckets, once per pack; all layers share the result.

    `bucket(x) = clamp(int(log(max(1, |x|)) / 0.301), 0, num_buckets)` with x = query time - key time, in seconds.

    Args:
        plan: of the pack.
        timestamp: `[T]` int64, when the event happened, seconds.
        query_timestamp: `[T]` int64, the time at which the query at that token asks, seconds.
        num_buckets: the last bucket.

    Raises:
        ValueError: a shape or dtype is wrong; names the argument.
    """
    return TimeBuckets(plan, timestamp, query_timestamp, num_buckets=num_buckets)


@dataclass(frozen=True, kw_only=True)
class PairTimes:
    """The times of a pack as the kernels take them, from which they find the bucket of any pair.

    Attributes:
        num_buckets: the last bucket.
        cells: `time_cells(num_buckets)`.
        asked: `[T]` int32, when the query at that token asks, in seconds from the first event of its history.
        happened: `[T]` int32, when the event happened, likewise.
    """

    num_buckets: int
    cells: Tensor
    asked: Tensor
    happened: Tensor


def time_cells(num_buckets: int) -> Tensor:
    """The table by which a kernel finds the bucket of up to 2^31 - 2 seconds without a logarithm, `[NUM_CELLS]` int64.

    A cell holds the whole numbers whose fp32 forms share the exponent and the first three bits behind it. It is
    narrower than a bucket, so at most one bucket begins inside it. An entry is the bucket of the cell's least number,
    and, shifted by 32 bits, the number at which the next one begins.
    """
    edge = torch.arange(NUM_CELLS, dtype=torch.int32).add_(127 << 3).bitwise_left_shift_(20).view(torch.float32)
    # Numbers a little below an edge round up to it, by at most half of 128 below 2^31.
    near = edge.double().ceil().long()[:, None] + torch.arange(-64, 1)
    belongs = near.float() >= edge[:, None]
    least = torch.where(belongs, near, NEVER).amin(dim=1)
    bucket = time_bucket(least, num_buckets)
    begins = (LOG_WIDTH * torch.arange(1, num_buckets + 2, dtype=torch.float64)).exp().clamp(max=2.0**32)
    near = begins.long()[:, None] + torch.arange(-2, 3)  # the logarithm of a whole number may round either way
    reached = time_bucket(near, num_buckets + 1) >= torch.arange(1, num_buckets + 2)[:, None]
    begins = torch.where(reached, near, 1 << 40).amin(dim=1).clamp(max=NEVER)
    following = torch.where(bucket < num_buckets, begins[bucket.clamp(max=num_buckets)], NEVER)
    return bucket | (following << 32)


def pair_times(cu_seqlens: Tensor, timestamp: Tensor, query_timestamp: Tensor, *, num_buckets: int) -> PairTimes:
    """Both times in seconds from the first event of their history; dead tokens get 0.

    Raises:
        ValueError: a history spans more than 34 years.
    """
    num_tokens = int(cu_seqlens[-1])
    first = timestamp[cu_seqlens[:-1].clamp(max=max(num_tokens - 1, 0))] if num_tokens else timestamp[:0]
    history = torch.repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)
    relative = []
    for value in (query_timestamp, timestamp):
        seconds = torch.zeros_like(value)
        seconds[:num_tokens] = value[:num_tokens] - first[history]
        relative.append(seconds)
    if num_tokens and max(int(seconds.abs().max()) for seconds in relative) > FARTHEST:
        raise ValueError("timestamp: a history spans more than 2^30 seconds, 34 years; are they milliseconds?")
    asked, happened = (seconds.int() for seconds in relative)
    cells = time_cells(num_buckets).to(timestamp.device)
    return PairTimes(num_buckets=num_buckets, cells=cells, asked=asked, happened=happened)
