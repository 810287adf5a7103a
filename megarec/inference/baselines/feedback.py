"""What a feedback head must beat: the past rate of the item, and the past rate of the user.

Rates are smoothed towards the overall rate of the train split: with `n` events of which `n_c` had outcome `c`,
`P(c) = (n_c + prior P_all(c)) / (n + prior)`. Outcome ids are 1, 2, ...; 0 is missing and never counts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megarec.data.block import Block
from megarec.inference.histories import Histories, Prediction, Targets

Counts = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class FeedbackRates:
    """Predicts feedback from how often each outcome was seen, for the target's item or in the user's history.

    Attributes:
        by: what the rate is taken over.
        counts: train events per item and outcome, `[V, n]`, by field.
        prior_events: the weight of the overall rate in events.
    """

    by: Literal["item", "user"]
    counts: dict[str, Counts]
    prior_events: float

    @property
    def name(self) -> str:
        """`item rate` or `user rate`."""
        return f"{self.by} rate"

    def predict(self, histories: Histories, targets: Targets) -> Prediction:
        """The log odds of two outcomes, the log probabilities of more."""
        feedback = {}
        for field, per_item in self.counts.items():
            if self.by == "item":
                seen = per_item[targets.fields["item"]]
            else:
                seen = _count_outcomes(
                    histories.user_of_event(),
                    histories.fields[field],
                    shape=(len(histories.user), per_item.shape[1]),
                )[targets.user_of_target()]
            overall = per_item.sum(0) + 1.0  # an outcome that never occurred stays possible
            prior = self.prior_events * overall / overall.sum()
            feedback[field] = to_logits((seen + prior) / (seen.sum(1, keepdims=True) + self.prior_events))
        return Prediction(feedback=feedback)


def count_feedback(blocks: Iterable[Block], *, num_items: int, classes: Mapping[str, int]) -> dict[str, Counts]:
    """Train events per item and outcome, `[V, n]`, of every feedback field with its number of outcomes `n`."""
    totals = {field: np.zeros((num_items, n)) for field, n in classes.items()}
    for block in blocks:
        for field, total in totals.items():
            total += _count_outcomes(block.columns["item"], block.columns[field], shape=total.shape)
    return totals


def to_logits(probability: Counts) -> Tensor:
    """Probabilities `[M, n]` as a head's logits: `[M, 1]` log odds of the second of two, else log probabilities."""
    p = np.clip(probability, 1e-9, 1.0)
    return torch.from_numpy(np.log(p[:, 1:]) - np.log(p[:, :1]) if p.shape[1] == 2 else np.log(p))


def _count_outcomes(row: npt.NDArray, outcome: npt.NDArray, *, shape: tuple[int, ...]) -> Counts:
    known = outcome > 0
    cell = row[known].astype(np.int64) * shape[1] + outcome[known] - 1
    return np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)
