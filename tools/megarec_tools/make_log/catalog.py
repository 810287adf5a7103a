"""The items of the synthetic world: genres of artists of albums of items, how popular and how good each item is."""

from dataclasses import dataclass

import numpy as np

from megarec_tools.make_log.config import MAX_RAW_ID, MakeLogConfig
from megarec_tools.make_log.draws import Draws, Floats, Ints

MIN_ITEMS_PER_ARTIST = 2
MAX_ITEMS_PER_ARTIST = 6
ITEMS_PER_ALBUM = 3
GENRE_EXPONENT = 0.5  # genres differ in size, the largest having about 1/8 of 16 genres' artists
ARTIST_SHARE = 0.6  # of the variance of an item's rank score that its artist explains
QUALITY_DEVIATION = 0.65  # in units of the listening logit; gives item means an AUC of about .63
MEDIAN_SECONDS = 200.0
SECONDS_SIGMA = 0.3
MAX_SECONDS = 900.0  # so that even a replay ends before a session gap does


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Items in genre-major, then artist-major, then running order: every genre and artist is a range of items.

    `popularity` sums to 1 and `cumulative[i]` is the popularity before item `i`, so that one lookup in it draws from
    any range. `artist_first[a] : artist_first[a + 1]` are the items of artist `a`, genres likewise.
    `successor` is the next item of the same artist, after the last one the first.
    """

    artist: Ints
    genre: Ints
    album: Ints
    successor: Ints
    artist_first: Ints
    genre_first: Ints
    popularity: Floats
    cumulative: Floats
    quality: Floats
    seconds: Ints
    raw_item: Ints
    raw_artist: Ints
    raw_album: Ints

    @property
    def num_items(self) -> int:
        """Items."""
        return len(self.artist)

    @property
    def num_genres(self) -> int:
        """Genres, some of which may be empty in a small catalogue."""
        return len(self.genre_first) - 1


def make_catalog(config: MakeLogConfig, draws: Draws) -> Catalog:
    """The catalogue of a log: a function of the seed and the settings."""
    items = np.arange(config.num_items, dtype=np.int64)
    span = MAX_ITEMS_PER_ARTIST - MIN_ITEMS_PER_ARTIST + 1
    most = np.arange(-(-config.num_items // MIN_ITEMS_PER_ARTIST), dtype=np.int64)
    ends = np.cumsum(MIN_ITEMS_PER_ARTIST + (draws.uniform("artist size", most) * span).astype(np.int64))
    num_artists = int(np.searchsorted(ends, config.num_items)) + 1
    artist_first = np.concatenate([[0], np.minimum(ends[:num_artists], config.num_items)])
    artists = np.arange(num_artists, dtype=np.int64)
    artist = np.repeat(artists, np.diff(artist_first))
    order = items - artist_first[artist]
    album_of_artist = -(-np.diff(artist_first) // ITEMS_PER_ALBUM)
    album = (np.cumsum(album_of_artist) - album_of_artist)[artist] + order // ITEMS_PER_ALBUM

    share = np.cumsum(np.arange(1, config.num_genres + 1) ** -GENRE_EXPONENT)
    genre_of_artist = np.searchsorted(share / share[-1], np.sort(draws.uniform("artist genre", artists)), side="right")
    genre = genre_of_artist[artist]

    score = np.sqrt(ARTIST_SHARE) * draws.normal("artist popularity", artists)[artist]
    score += np.sqrt(1.0 - ARTIST_SHARE) * draws.normal("item popularity", items)
    rank = np.empty(config.num_items, dtype=np.int64)
    rank[np.argsort(-score, kind="stable")] = items
    weight = np.power(rank + 1.0, -config.popularity_exponent)
    popularity = weight / weight.sum()
    seconds = np.minimum(MEDIAN_SECONDS * np.exp(SECONDS_SIGMA * draws.normal("seconds", items)), MAX_SECONDS)
    return Catalog(
        artist=artist,
        genre=genre,
        album=album,
        successor=np.where(items + 1 < artist_first[artist + 1], items + 1, artist_first[artist]),
        artist_first=artist_first,
        genre_first=np.searchsorted(genre, np.arange(config.num_genres + 1)),
        popularity=popularity,
        cumulative=np.concatenate([[0.0], np.cumsum(popularity)]),
        quality=QUALITY_DEVIATION * draws.normal("quality", items),
        seconds=(seconds // 5 * 5).astype(np.int64),
        raw_item=raw_ids("item", items, draws),
        raw_artist=raw_ids("artist", artists, draws),
        raw_album=raw_ids("album", np.arange(int(album[-1]) + 1), draws),
    )


def raw_ids(kind: str, index: Ints, draws: Draws) -> Ints:
    """Sparse ids in [1, 2^31 - 1), distinct for distinct `index`: consumers must renumber them."""
    factor = 1 + int(draws.uniform(f"raw {kind}", np.zeros(1, dtype=np.int64))[0] * (MAX_RAW_ID - 2))
    return (index + 1) * factor % MAX_RAW_ID
