"""The settings of the baselines. Imports no torch."""

from dataclasses import dataclass

from megarec.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Settings of the baselines.

    Attributes:
        half_life_days: DecayPop: an event this old counts one half.
        num_neighbours: ItemKNN: neighbours kept for each item.
        max_user_items: ItemKNN: the newest distinct items of a user that count.
        prior_events: Markov: popularity weighs as much as this many transitions.
        prior_feedback: feedback rates: the overall rate weighs as much as this many events.
    """

    half_life_days: float = 7.0
    num_neighbours: int = 100
    max_user_items: int = 1000
    prior_events: float = 1.0
    prior_feedback: float = 10.0

    def __post_init__(self) -> None:
        for name in ("half_life_days", "num_neighbours", "max_user_items", "prior_events", "prior_feedback"):
            if not getattr(self, name) > 0:
                raise UserError(f"{getattr(self, name)} is not above 0", where=name)
