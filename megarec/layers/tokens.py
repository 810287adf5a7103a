"""From events to tokens: one, two or three per event."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megarec_kernels.hstu_attention import TimeBuckets
from megarec_kernels.tiles import AttentionPlan
from megarec_kernels.visibility import Visibility, candidate_suffix
from torch import Tensor

from megarec.layers.dropout import Randomness
from megarec.parallel.parts import plan_all_tokens
from megarec.parallel.slices import Slices


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What the blocks know about `T` packed tokens besides their vectors.

    Attributes:
        cu_seqlens: `[B + 1]` int64, where each history begins, in tokens.
        timestamp: `[T]` int64, seconds.
        query_timestamp: `[T]` int64, the time at which the state of the token is asked: the next token's.
        randomness: of dropout, by token.
        inner_randomness: the same for those tokens that this rank has inside the split maps of a block.
        outer_randomness: for those that it has between them.
        plan: how attention goes about the pack (`parts.Attention`); made once for all blocks.
        time_buckets: the bucket of the time between any two tokens, for blocks with a time bias.
        visibility: which earlier tokens a token sees; None: all of its history.
        places: where the tokens of prefixes and events stand, if there are prefixes.
    """

    cu_seqlens: Tensor
    timestamp: Tensor
    query_timestamp: Tensor
    randomness: Randomness | None
    inner_randomness: Randomness | None
    outer_randomness: Randomness | None
    plan: AttentionPlan
    time_buckets: TimeBuckets | None = None
    visibility: Visibility | None = None
    places: "PrefixPlaces | None" = None


@dataclass(frozen=True, kw_only=True)
class PrefixPlaces:
    """Where the tokens of histories with a prefix stand among `num_tokens`.

    A prefix is what is known of a user before the history. Its tokens come first and see only each other; every event
    sees all of them. In the public production code of HSTU they see the whole history as well: through the next block
    an event would then see later ones, and here every event is trained on.

    Attributes:
        cu_seqlens: `[B + 1]`, where each history begins, its prefix included, in tokens.
        prefix: `[B * P]`, the places of the prefixes' tokens.
        event: `[L]`, the places of the tokens of living events.
        num_tokens: all tokens; what is named nowhere is dead.
        num_event_tokens: the tokens of events before the prefixes came, those of dead ones too.
    """

    cu_seqlens: Tensor
    prefix: Tensor
    event: Tensor
    num_tokens: int
    num_event_tokens: int

    def merge(self, prefix: Tensor, event: Tensor) -> Tensor:
        """Rows of prefixes `[B * P, *]` and of events `[T * k, *]` in their places, `[num_tokens, *]`; others are 0."""
        merged = event.new_zeros(self.num_tokens, *event.shape[1:])
        places, rows = torch.cat([self.prefix, self.event]), torch.cat([prefix, event[: len(self.event)]])
        return merged.index_copy(0, places, rows)

    def events_of(self, merged: Tensor) -> Tensor:
        """The rows of events, `[num_event_tokens, *]` with zeros for the dead: the way back of `merge`."""
        rows = merged.index_select(0, self.event)
        return torch.cat([rows, merged.new_zeros(self.num_event_tokens - len(rows), *merged.shape[1:])])


def place_prefixes(cu_seqlens: Tensor, *, per_event: int, num_prefix: int, num_events: int) -> PrefixPlaces:
    """Room for `num_prefix` tokens before each history of a pack of `num_events` events, a dead tail included.

    The dead tail gives way to the prefixes, so that a pack keeps its size; where it is too short, tokens are added.
    """
    users = torch.arange(len(cu_seqlens), device=cu_seqlens.device)
    cu_tokens = cu_seqlens * per_event + users * num_prefix
    prefix = cu_tokens[:-1, None] + torch.arange(num_prefix, device=cu_seqlens.device)
    event = torch.arange(int(cu_seqlens[-1]) * per_event, device=cu_seqlens.device)
    event = event + (torch.searchsorted(cu_seqlens * per_event, event, right=True)) * num_prefix
    num_tokens = max(num_events * per_event, int(cu_tokens[-1]))
    return PrefixPlaces(
        cu_seqlens=cu_tokens,
        prefix=prefix.flatten(),
        event=event,
        num_tokens=num_tokens,
        num_event_tokens=num_events * per_event,
    )


def split_events(
    cu_seqlens: Tensor,
    timestamp: Tensor,
    next_timestamp: Tensor,
    *,
    randomness: Randomness | None,
    per_event: int,
    num_prefix: int = 0,
    num_candidates: Tensor | None = None,
    plan: Callable[..., AttentionPlan] = plan_all_tokens,
) -> Tokens:
    """The tokens of events that are split into `per_event` tokens each; the arguments speak of events.

    All tokens of an event carry its time; only the last one is asked at the time of the next event. `num_prefix` tokens
    before each history carry, and are asked at, the time of its first event. `plan` is that of `parts.Attention`.
    """
    query_timestamp = timestamp.unsqueeze(1).repeat(1, per_event)
    query_timestamp[:, -1] = next_timestamp
    if randomness is not None:
        number = randomness.token.unsqueeze(1) * per_event + torch.arange(per_event, device=timestamp.device)
        randomness = Randomness(key=randomness.key, token=number.flatten())
    times = timestamp.repeat_interleave(per_event), query_timestamp.flatten()
    places, cu_tokens = None, cu_seqlens * per_event
    if num_prefix:
        places = place_prefixes(cu_seqlens, per_event=per_event, num_prefix=num_prefix, num_events=len(timestamp))
        cu_tokens = places.cu_seqlens
        begin = timestamp[cu_seqlens[:-1]].repeat_interleave(num_prefix)
        times = places.merge(begin, times[0]), places.merge(begin, times[1])
        if randomness is not None:
            randomness = Randomness(key=randomness.key, token=torch.arange(places.num_tokens, device=timestamp.device))
    visibility = None
    if num_candidates is not None:
        visibility = candidate_suffix(cu_tokens, num_candidates, group=per_event, num_tokens=len(times[0]))
    return Tokens(
        cu_seqlens=cu_tokens,
        timestamp=times[0],
        query_timestamp=times[1],
        randomness=randomness,
        inner_randomness=randomness,
        outer_randomness=randomness,
        plan=plan(cu_tokens, num_tokens=len(times[0]), visibility=visibility),
        visibility=visibility,
        places=places,
    )


def interleave(vectors: Sequence[Tensor]) -> Tensor:
    """Vectors `[T, D]` of the kinds of tokens, to `[T * len(vectors), D]`: all tokens of an event, then the next's."""
    return torch.stack(tuple(vectors), dim=1).flatten(0, 1)


def token_of_event(states: Tensor, per_event: int, number: int) -> Tensor:
    """States `[T * per_event, D]` of all tokens, to those `[T, D]` of every event's token `number`."""
    return states.view(-1, per_event, states.shape[1])[:, number]


def next_event(x: Tensor, cu_seqlens: Tensor, slices: Slices) -> Tensor:
    """Row t of `[T, D]` becomes row t + 1 where both are of one history, else zero; `x` is this rank's slice."""
    index = torch.arange(1, x.shape[0] + 1, device=x.device) + slices.index * x.shape[0]
    same_history = (index < cu_seqlens[-1]) & ~torch.isin(index, cu_seqlens)
    return slices.next_row(x) * same_history.unsqueeze(1)
