"""From events to tokens: one, two or three per event."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megarec_kernels.hstu_attention import TimeBuckets
from megarec_kernels.tiles import TilePlan, plan_tiles
from megarec_kernels.visibility import Visibility, candidate_suffix
from torch import Tensor

from megarec.layers.dropout import Randomness


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What the blocks know about `T` packed tokens besides their vectors.

    Attributes:
        cu_seqlens: `[B + 1]` int64, where each history begins, in tokens.
        timestamp: `[T]` int64, seconds.
        query_timestamp: `[T]` int64, the time at which the state of the token is asked: the next token's.
        randomness: of dropout, by token.
        plan: how attention cuts the histories into tiles; made once for all blocks.
        time_buckets: the bucket of the time between any two tokens, for blocks with a time bias.
        visibility: which earlier tokens a token sees; None: all of its history.
    """

    cu_seqlens: Tensor
    timestamp: Tensor
    query_timestamp: Tensor
    randomness: Randomness | None
    plan: TilePlan
    time_buckets: TimeBuckets | None = None
    visibility: Visibility | None = None


def split_events(
    cu_seqlens: Tensor,
    timestamp: Tensor,
    next_timestamp: Tensor,
    *,
    randomness: Randomness | None,
    per_event: int,
    num_candidates: Tensor | None = None,
) -> Tokens:
    """The tokens of events that are split into `per_event` tokens each; the arguments speak of events.

    All tokens of an event carry its time; only the last one is asked at the time of the next event.
    """
    query_timestamp = timestamp.unsqueeze(1).repeat(1, per_event)
    query_timestamp[:, -1] = next_timestamp
    if randomness is not None:
        number = randomness.token.unsqueeze(1) * per_event + torch.arange(per_event, device=timestamp.device)
        randomness = Randomness(key=randomness.key, token=number.flatten())
    visibility = None
    if num_candidates is not None:
        num_tokens = len(timestamp) * per_event
        visibility = candidate_suffix(cu_seqlens * per_event, num_candidates, group=per_event, num_tokens=num_tokens)
    return Tokens(
        cu_seqlens=cu_seqlens * per_event,
        timestamp=timestamp.repeat_interleave(per_event),
        query_timestamp=query_timestamp.flatten(),
        randomness=randomness,
        plan=plan_tiles(cu_seqlens * per_event),
        visibility=visibility,
    )


def interleave(vectors: Sequence[Tensor]) -> Tensor:
    """Vectors `[T, D]` of the kinds of tokens, to `[T * len(vectors), D]`: all tokens of an event, then the next's."""
    return torch.stack(tuple(vectors), dim=1).flatten(0, 1)


def token_of_event(states: Tensor, per_event: int, number: int) -> Tensor:
    """States `[T * per_event, D]` of all tokens, to those `[T, D]` of every event's token `number`."""
    return states.view(-1, per_event, states.shape[1])[:, number]


def next_event(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Row t of `[T, D]` becomes row t + 1 where both are of one history, else zero."""
    following = torch.cat([x[1:], torch.zeros_like(x[:1])])
    index = torch.arange(1, x.shape[0] + 1, device=x.device)
    same_history = (index < cu_seqlens[-1]) & ~torch.isin(index, cu_seqlens)
    return following * same_history.unsqueeze(1)
