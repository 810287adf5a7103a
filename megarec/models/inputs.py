"""The tensors a model sees."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megarec.layers.dropout import Randomness

Lookup = Callable[[Tensor], Tensor]
"""Rows `[..., S]` (int64) to the sum of their vectors `[..., E]`; -1 gives nothing."""


EVENT_PARTS = ("prefix", "context", "item", "feedback", "next_context", "next_item")
"""What has rows in `Events`: part `item` is the field `item_rows`."""


@dataclass(frozen=True, kw_only=True)
class Events:
    """`T` events of `B` histories end to end; what follows `cu_seqlens[-1]` is dead padding.

    The slots of the `*_rows` are laid out by `megarec.models.shape.InputShape`. Where ranks share a pack, the rows are
    those of this rank's slice of the events, but for the prefixes; everything else is of all events.

    Attributes:
        cu_seqlens: `[B + 1]` int64, where each history begins, in events.
        position: `[T]` int64, place of the event in its window, from 0.
        timestamp: `[T]` int64, seconds.
        next_timestamp: `[T]` int64, the time at which the next event is asked about.
        prefix_rows: `[T, Sp]` int64, what was known before the history: those of a window's first event count.
        context_rows: `[T, Sc]` int64, what was known before the event.
        item_rows: `[T, Si]` int64, the item.
        feedback_rows: `[T, Sf]` int64, how it went.
        next_context_rows: `[T, Sc]` int64, what is known before the next event.
        next_item_rows: `[T, Si]` int64, the next event's item: read by the feedback heads of the fused layout alone.
        randomness: of dropout, by event; None: no dropout.
        num_candidates: `[B]` int64, how many events at the end of each history are candidates, which see the history
            and not each other; None: none.
    """

    cu_seqlens: Tensor
    position: Tensor
    timestamp: Tensor
    next_timestamp: Tensor
    prefix_rows: Tensor
    context_rows: Tensor
    item_rows: Tensor
    feedback_rows: Tensor
    next_context_rows: Tensor
    next_item_rows: Tensor
    randomness: Randomness | None = None
    num_candidates: Tensor | None = None
