"""Which item comes next: a mixture of a few ways to choose.

    p(i | state) = sum_k GO_ON_k        [i follows recent item k in its artist's running order]
                 + sum_k SAME_ARTIST_k  [i is by the artist of recent item k]  popularity_i / popularity(artist)
                 + sum_k FAVOURITE      [i is favourite item k]
                 + MOOD                 [i is of the mood's genre]              popularity_i / popularity(genre)
                 + POPULAR              popularity_i
                 + taste                p(genre of i | taste)                   popularity_i / popularity(genre)

where `taste` is what is left of 1. A way whose slot or mood is empty leaves its weight to `taste`.
"""

import numpy as np

from megarec_tools.make_log.catalog import Catalog
from megarec_tools.make_log.draws import Floats, Ints
from megarec_tools.make_log.state import EMPTY, FAVOURITE_SLOTS, RECENT_SLOTS, State

# The artist that was just played is not the likeliest to go on: a model must look further back than one event.
GO_ON = (0.1, 0.18, 0.18)
SAME_ARTIST = (0.02, 0.02, 0.02)
FAVOURITE = 0.04
MOOD = 0.1
POPULAR = 0.04

WAYS = np.array([*GO_ON, *SAME_ARTIST, *(FAVOURITE,) * FAVOURITE_SLOTS, MOOD, POPULAR])
WAY_ENDS = np.cumsum(WAYS)  # beyond the last end lies taste
FIRST_SAME_ARTIST = RECENT_SLOTS
FIRST_FAVOURITE = 2 * RECENT_SLOTS
MOOD_WAY = FIRST_FAVOURITE + FAVOURITE_SLOTS
POPULAR_WAY = MOOD_WAY + 1
# The memory slot that each way looks at; mood, popular and taste look at none and have any.
_RECENT = range(RECENT_SLOTS)
_FAVOURITES = range(RECENT_SLOTS, RECENT_SLOTS + FAVOURITE_SLOTS)
SLOT_OF_WAY = np.array([*_RECENT, *_RECENT, *_FAVOURITES, 0, 0, 0])


def choose_items(catalog: Catalog, state: State, *, way: Floats, genre: Floats, item: Floats) -> Ints:
    """Draws one item per user from `p(i | state)`.

    Args:
        catalog: the items.
        state: the users.
        way: uniform numbers that choose the way.
        genre: uniform numbers that choose a genre by taste.
        item: uniform numbers that choose an item in a range of items.
    """
    ways = np.searchsorted(WAY_ENDS, way, side="right")
    remembered = state.memory[np.arange(len(ways)), SLOT_OF_WAY[ways]]
    by_slot = (ways < MOOD_WAY) & (remembered != EMPTY)
    by_artist = by_slot & (ways >= FIRST_SAME_ARTIST) & (ways < FIRST_FAVOURITE)
    artists = catalog.artist[remembered]
    genres = (state.genre_ends[:, :-1] <= genre[:, None]).sum(axis=1)
    genres = np.where((ways == MOOD_WAY) & (state.mood != EMPTY), state.mood, genres)
    first = np.where(by_artist, catalog.artist_first[artists], catalog.genre_first[genres])
    end = np.where(by_artist, catalog.artist_first[artists + 1], catalog.genre_first[genres + 1])
    first[ways == POPULAR_WAY] = 0
    end[ways == POPULAR_WAY] = catalog.num_items
    low, high = catalog.cumulative[first], catalog.cumulative[end]
    drawn = np.searchsorted(catalog.cumulative, low + item * (high - low), side="right") - 1
    drawn = np.clip(drawn, first, end - 1)
    direct = np.where(ways < FIRST_SAME_ARTIST, catalog.successor[remembered], remembered)
    return np.where(by_slot & ~by_artist, direct, drawn)


def genre_ends_of(catalog: Catalog, taste: Floats, strength: float) -> Floats:
    """Cumulative p(genre | taste), popularity tilted by `exp(strength * taste)`; `[users, genres]`."""
    weight = np.diff(catalog.cumulative[catalog.genre_first]) * np.exp(strength * taste)
    ends = np.cumsum(weight, axis=1)
    return ends / ends[:, -1:]
