"""The hidden state of users: all that the next event depends on."""

from dataclasses import dataclass, fields

import numpy as np

from megarec_tools.make_log.draws import Bools, Floats, Ints

RECENT_SLOTS = 3  # artists that a session goes back and forth between
FAVOURITE_SLOTS = 5  # items that a user comes back to
EMPTY = -1


@dataclass(frozen=True, kw_only=True)
class State:
    """One row per user, changed in place.

    `memory[:, :3]` are the recent items, each the last played one of an artist that the session goes on with, newest
    first; `memory[:, 3:]` the favourite items, newest first; `EMPTY` where there is none. `mood` is the genre of the
    session or `EMPTY`. `taste` is standard normal per genre, `genre_ends` the cumulative probabilities of genres
    under it. `engagement` is standard normal per session. `time` is when the next item can begin, in seconds.
    """

    memory: Ints
    mood: Ints
    taste: Floats
    genre_ends: Floats
    engagement: Floats
    time: Floats

    @classmethod
    def new(cls, num_users: int, num_genres: int) -> "State":
        """Users before their first event."""
        return cls(
            memory=np.full((num_users, RECENT_SLOTS + FAVOURITE_SLOTS), EMPTY),
            mood=np.full(num_users, EMPTY),
            taste=np.zeros((num_users, num_genres)),
            genre_ends=np.zeros((num_users, num_genres)),
            engagement=np.zeros(num_users),
            time=np.full(num_users, -np.inf),
        )

    @property
    def recent(self) -> Ints:
        """A view of the recent items."""
        return self.memory[:, :RECENT_SLOTS]

    @property
    def favourites(self) -> Ints:
        """A view of the favourite items."""
        return self.memory[:, RECENT_SLOTS:]

    def rows(self, chosen: slice | Ints) -> "State":
        """Some users: a view when `chosen` is a slice, a copy when it is a list of rows."""
        return State(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


def push(slots: Ints, value: Ints, *, at: Ints) -> Ints:
    """`slots` with `value` in front of each row; what was before slot `at` moves back, what was in it is lost."""
    moved = np.concatenate([value[:, None], slots[:, :-1]], axis=1)
    return np.where(np.arange(slots.shape[1]) <= at[:, None], moved, slots)


def slot_to_lose(slots: Ints, preferred: Bools | None = None) -> Ints:
    """The slot to overwrite in each row: the first `preferred` one, else the first empty one, else the last."""
    worth = np.where(slots == EMPTY, 2, 0)
    worth[:, -1] = np.maximum(worth[:, -1], 1)
    if preferred is not None:
        worth[preferred] = 4
    return worth.argmax(axis=1)
