"""The settings of `megarec-make-log`."""

from dataclasses import dataclass

from megarec.base.errors import UserError

MAX_RAW_ID = 2**31 - 1  # a prime: raw ids are multiples of a random number modulo it, so they never collide
MAX_DAYS = 40_000  # seconds stay below 2^32


@dataclass(frozen=True, kw_only=True)
class MakeLogConfig:
    """What log to write, and where.

    Attributes:
        output: the folder to make.
        num_users: users, each with at least one listen.
        num_items: items of the catalogue.
        num_events: listens, about: every user's length is drawn on its own.
        seed: another seed, another world.
        num_days: the time that the log covers.
        num_genres: genres that the artists belong to.
        popularity_exponent: Zipf exponent of the item popularity.
        length_sigma: standard deviation of the logarithm of a user's length.
        taste_strength: how far a user's taste tilts popularity; 0 is no taste.
        taste_drift: turns that a taste makes during the log; at 0.25 the last taste is independent of the first.
        session_events: mean number of listens in a session.
        listens_only: leave out the rows for likes, unlikes, dislikes and undislikes.
        events_per_file: mean number of listens per file.
        chunk_events: listens made at once, about, and never less than 256 users; sets the memory, not the output.
    """

    output: str
    num_users: int = 4_000
    num_items: int = 3_000
    num_events: int = 500_000
    seed: int = 0
    num_days: int = 60
    num_genres: int = 16
    popularity_exponent: float = 0.5
    length_sigma: float = 0.9
    taste_strength: float = 1.5
    taste_drift: float = 0.25
    session_events: float = 14.0
    listens_only: bool = True
    events_per_file: int = 200_000
    chunk_events: int = 2_000_000

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        _within("num_users", self.num_users, 1, MAX_RAW_ID - 1)
        _within("num_genres", self.num_genres, 1, 256)
        _within("num_items", self.num_items, max(10, self.num_genres), MAX_RAW_ID - 1)
        _within("num_events", self.num_events, self.num_users, 2**48)
        _within("num_days", self.num_days, 1, MAX_DAYS)
        _within("popularity_exponent", self.popularity_exponent, 0, 3)
        _within("length_sigma", self.length_sigma, 0, 2)
        _within("taste_strength", self.taste_strength, 0, 5)
        _within("taste_drift", self.taste_drift, 0, 100)
        _within("session_events", self.session_events, 1, 10_000)
        _within("events_per_file", self.events_per_file, 1_000, 2**31)
        _within("chunk_events", self.chunk_events, 1, 2**31)

    @property
    def num_files(self) -> int:
        """Files that the log is cut into, by time."""
        return -(-self.num_events // self.events_per_file)

    @property
    def duration_seconds(self) -> int:
        """Seconds that the log covers."""
        return self.num_days * 86_400


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{value} is out of range", where=name, fix=f"Give a number from {low} to {high}")
