"""How a listen goes: a logistic model of the user, the item, the context and the state."""

import numpy as np

from megarec_tools.make_log.catalog import Catalog
from megarec_tools.make_log.draws import Bools, Floats, Ints
from megarec_tools.make_log.state import State

# Weights of the listening logit, set so that 63 % of listens reach half of the item and that the AUC of the truth
# is near .84, of an item's mean .63, of a user's mean .61.
BASE = 0.1
TASTE = 0.65
TYPICAL_TASTE = 1.0  # the mean taste for what users choose
IN_MOOD = 0.9
IS_FAVOURITE = 0.7
ENGAGEMENT = 1.1
ORGANIC = 0.3
EVENING = 0.25
EVENING_HOUR = 20.0
BIAS_DEVIATION = 0.1

ZERO_SHARE = 0.2  # of skips, so 7 % of listens
REPLAY_SHARE = 0.22  # of completed listens of a sure user
MAX_RATIO = 159
HALF = 50
FULL = 100


def listening_logit(catalog: Catalog, state: State, *, item: Ints, organic: Bools, bias: Floats) -> Floats:
    """The logit of p(played_ratio_pct >= 50 | user, item, context, state).

    BASE + bias_user + quality_item + TASTE (taste_genre - 1) + IN_MOOD [artist recent or genre of the mood]
    + IS_FAVOURITE [favourite] + ENGAGEMENT engagement + ORGANIC (+1 or -1) + EVENING cos(2 pi (hour - 20) / 24)
    """
    genre = catalog.genre[item]
    in_mood = same_artist(catalog, state, item).any(axis=1) | (genre == state.mood)
    logit = BASE + bias + catalog.quality[item]
    logit += TASTE * (state.taste[np.arange(len(item)), genre] - TYPICAL_TASTE)
    logit += IN_MOOD * in_mood + IS_FAVOURITE * is_favourite(state, item).any(axis=1)
    logit += ENGAGEMENT * state.engagement + np.where(organic, ORGANIC, -ORGANIC)
    hour = state.time % 86_400 / 3_600
    logit += EVENING * np.cos(2.0 * np.pi / 24.0 * (hour - EVENING_HOUR))
    return logit


def played_ratio(p_listened: Floats, uniform: Floats) -> Ints:
    """The played ratio in percent, the inverse of its distribution function at `uniform`.

    Below `p_listened` lie the listened ones (101 to 159 for replays, likelier the larger `p_listened`; 50 to 100,
    most at the end of the item), above it the skips (0, or 1 to 49, most early).
    """
    listened = uniform < p_listened
    place = np.where(listened, uniform, uniform - p_listened) / np.where(listened, p_listened, 1.0 - p_listened)
    replays = REPLAY_SHARE * p_listened
    replay = FULL + 1 + (place / replays * (MAX_RATIO - FULL)).astype(np.int64)
    whole = HALF + np.ceil((FULL - HALF) * np.sqrt((place - replays).clip(0.0) / (1.0 - replays)))
    skip = 1 + ((HALF - 1) * ((place - ZERO_SHARE).clip(0.0) / (1.0 - ZERO_SHARE)) ** 2).astype(np.int64)
    skip[place < ZERO_SHARE] = 0
    return np.where(listened, np.where(place < replays, replay, whole), skip).astype(np.int64)


def same_artist(catalog: Catalog, state: State, item: Ints) -> Bools:
    """Which recent slots hold the artist of `item`; `[users, slots]`."""
    artist = catalog.artist[item]
    first, end = catalog.artist_first[artist], catalog.artist_first[artist + 1]
    return (state.recent >= first[:, None]) & (state.recent < end[:, None])


def is_favourite(state: State, item: Ints) -> Bools:
    """Which favourite slots hold `item`; `[users, slots]`."""
    return state.favourites == item[:, None]
