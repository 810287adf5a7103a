"""Histories and the questions asked about them: what every model and every baseline answers."""

import typing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megarec.base.jagged import Int64, gather_indices, lengths_to_offsets

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Histories:
    """B histories end to end, and when and in which context the next item is asked for.

    Attributes:
        user: user index, `[B]`; -1 when nobody knows it.
        cu_seqlens: where each history begins, `[B + 1]`.
        timestamp: seconds, `[T]`.
        fields: ids of every field of every event, `[T]` or `[T, slots]`.
        query_time: the time of the question, in seconds, `[B]`.
        query_fields: ids of the context fields of the question, `[B]` or `[B, slots]`; a field left out is missing.
    """

    user: Int64
    cu_seqlens: Int64
    timestamp: Int64
    fields: dict[str, Array]
    query_time: Int64
    query_fields: dict[str, Array] = field(default_factory=dict)

    def slice(self, first: int, last: int) -> "Histories":
        """The histories of the users `first` to `last - 1`."""
        events = slice(int(self.cu_seqlens[first]), int(self.cu_seqlens[last]))
        return Histories(
            user=self.user[first:last],
            cu_seqlens=self.cu_seqlens[first : last + 1] - self.cu_seqlens[first],
            timestamp=self.timestamp[events],
            fields={name: column[events] for name, column in self.fields.items()},
            query_time=self.query_time[first:last],
            query_fields={name: column[first:last] for name, column in self.query_fields.items()},
        )

    def newest(self, limit: int) -> "Histories":
        """The newest `limit` events of each history."""
        lengths = np.minimum(np.diff(self.cu_seqlens), limit)
        if int(lengths.sum()) == len(self.timestamp):
            return self
        index = gather_indices(self.cu_seqlens[1:] - lengths, lengths)
        return replace(
            self,
            cu_seqlens=lengths_to_offsets(lengths),
            timestamp=self.timestamp[index],
            fields={name: column[index] for name, column in self.fields.items()},
        )

    def user_of_event(self) -> Int64:
        """The row of each event's user, `[T]`."""
        return np.repeat(np.arange(len(self.user)), np.diff(self.cu_seqlens))


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What happened next: jagged over the B users of the histories.

    Attributes:
        offsets: where each user's targets begin, `[B + 1]`.
        timestamp: seconds, `[M]`.
        fields: ids of every field, feedback included, `[M]` or `[M, slots]`.
    """

    offsets: Int64
    timestamp: Int64
    fields: dict[str, Array]

    def user_of_target(self) -> Int64:
        """The row of each target's user, `[M]`."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answer.

    Attributes:
        scores: a score for every item id, `[B, V]` (column 0 is ignored), or None when items are not scored.
        feedback: logits of each target's feedback from its item and context, `[M, 1]` for two classes (the second
            one's) and `[M, n]` for n, by field.
    """

    scores: Tensor | None = None
    feedback: dict[str, Tensor] = field(default_factory=dict)


class Predictor(typing.Protocol):
    """A model, a baseline or the truth: whatever answers questions about histories."""

    @property
    def name(self) -> str:
        """What its row in a table is called."""
        ...

    def predict(self, histories: Histories, targets: Targets) -> Prediction:
        """Scores every item, and the feedback of the given targets.

        Only the item and the context of a target may be used, and only for the target's feedback.
        """
        ...
