"""What an evaluation measured, as fields that are stored beside every number it gave."""

from dataclasses import dataclass
from typing import Literal

from megarec.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The rules of one evaluation. Rows under different protocols cannot be compared.

    Every known item of the dataset is a candidate, and equal scores are ordered by the lower item id. A target
    that is unknown to the dataset's vocabulary or filtered away can never be found and counts as a miss.

    Attributes:
        name: what to call this set of rules.
        max_history_events: how many of the newest events the history keeps; None: `megarec-evaluate` puts in what the
            model was trained with, elsewhere it means all.
        filter_seen: items that cannot be recommended: `none`, those inside the kept history (`window`, as the
            public HSTU code does), or those of the user's whole history (`full`, as gSASRec does).
        query_time: the time at which the question is asked: `dataset` is the one the split stored (the target's
            own time when the last event is left out, the cut when the log was split by time), `last_event` that
            of the newest known event.
        query_context: the context fields of the question: those of the first `target` (context is known before the
            choice), those of the `last_event`, or `missing`.
        ks: cut-offs of the ranking metrics, in items.
    """

    name: str = "default"
    max_history_events: int | None = None
    filter_seen: Literal["none", "window", "full"] = "none"
    query_time: Literal["dataset", "last_event"] = "dataset"
    query_context: Literal["target", "last_event", "missing"] = "target"
    ks: tuple[int, ...] = (1, 5, 10, 20, 50, 100, 200)

    def __post_init__(self) -> None:
        if self.max_history_events is not None and self.max_history_events < 1:
            raise UserError("must be at least 1", where="max_history_events")
        if not self.ks or min(self.ks) < 1 or list(self.ks) != sorted(set(self.ks)):
            raise UserError(f"must be growing numbers from 1, got {list(self.ks)}", where="ks")
