"""The oracle against slow twins: the visible log replayed by hand, and the mixture summed over every item."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from megarec_tools.make_log import choice
from megarec_tools.make_log.catalog import Catalog, make_catalog
from megarec_tools.make_log.config import MakeLogConfig
from megarec_tools.make_log.draws import Draws
from megarec_tools.make_log.oracle import best_items, find_heads
from megarec_tools.make_log.process import Listens, make_listens

NUM_USERS = 5_000


@pytest.fixture(scope="module")
def world() -> tuple[Catalog, Listens]:
    config = MakeLogConfig(output="", num_users=NUM_USERS, num_events=NUM_USERS * 40, num_items=6_000, num_genres=8)
    draws = Draws(config.seed)
    catalog = make_catalog(config, draws)
    return catalog, make_listens(config, catalog, draws, np.arange(NUM_USERS), advance=lambda _: None)


def replay(catalog: Catalog, events: list[tuple[int, int, int]]) -> tuple[list[int], list[int], int]:
    """Recent items, favourites and mood from (item, played ratio, time) alone, as docs/synthetic_log.md says it."""
    recent: list[int] = [-1] * 3
    favourites: list[int] = [-1] * 5
    mood, before = -1, -(10**9)
    for item, ratio, time in events:
        if time - before >= 1_790:
            recent, mood = [-1] * 3, -1
        before = time
        if ratio < 0:
            break  # the event that is asked about: only its time is known
        holds = [r >= 0 and catalog.artist[r] == catalog.artist[item] for r in recent]
        if ratio < 50:
            recent = [-1 if hold else r for r, hold in zip(recent, holds, strict=True)]
            favourites = [-1 if f == item else f for f in favourites]
            mood = -1 if mood == catalog.genre[item] else mood
            continue
        lost = holds.index(True) if any(holds) else recent.index(-1) if -1 in recent else 2
        recent = [item, *recent[:lost], *recent[lost + 1 :]]
        if ratio > 100 and item not in favourites:
            lost = favourites.index(-1) if -1 in favourites else 4
            favourites = [item, *favourites[:lost], *favourites[lost + 1 :]]
        mood = int(catalog.genre[item]) if mood == -1 else mood
    return recent, favourites, mood


def test_the_visible_log_tells_memory_and_mood(world: tuple[Catalog, Listens]) -> None:
    catalog, listens = world
    for row in range(300):
        first = 0 if row == 0 else int(listens.last_event[row - 1]) + 1
        last = int(listens.last_event[row])
        time = listens.time[first : last + 1] // 5 * 5
        ratio = [*listens.ratio[first:last].tolist(), -1]
        seen = list(zip(listens.item[first : last + 1].tolist(), ratio, time.tolist(), strict=True))
        recent, favourites, mood = replay(catalog, seen)
        assert listens.last.recent[row].tolist() == recent
        assert listens.last.favourites[row].tolist() == favourites
        assert listens.last.mood[row] == mood


def probabilities(catalog: Catalog, listens: Listens, row: int) -> npt.NDArray[np.float64]:
    """p(i | state) for every item, way by way."""
    state, popularity = listens.last, catalog.popularity
    p, taste = choice.POPULAR * popularity, 1.0 - choice.WAYS.sum()
    for weight_next, weight_artist, item in zip(choice.GO_ON, choice.SAME_ARTIST, state.recent[row], strict=True):
        if item < 0:
            taste += weight_next + weight_artist
            continue
        p[catalog.successor[item]] += weight_next
        same = catalog.artist == catalog.artist[item]
        p += weight_artist * same * popularity / popularity[same].sum()
    for item in state.favourites[row]:
        if item < 0:
            taste += choice.FAVOURITE
        else:
            p[item] += choice.FAVOURITE
    mood = catalog.genre == state.mood[row]
    if mood.any():
        p += choice.MOOD * mood * popularity / popularity[mood].sum()
    else:
        taste += choice.MOOD
    tilted = popularity * np.exp(MakeLogConfig.taste_strength * state.taste[row, catalog.genre])
    return p + taste * tilted / tilted.sum()


def test_best_items_are_those_of_the_mixture_over_every_item(world: tuple[Catalog, Listens]) -> None:
    catalog, listens = world
    rows = np.arange(200)
    items, p = best_items(catalog, find_heads(catalog), listens.last.rows(rows))
    assert items.shape == p.shape == (200, 200)
    remembered_beyond_heads = 0
    for row in rows:
        dense = probabilities(catalog, listens, row)
        assert abs(dense.sum() - 1.0) < 1e-12
        np.testing.assert_allclose(p[row], np.sort(dense)[::-1][:200], rtol=1e-10)
        np.testing.assert_allclose(p[row], dense[items[row]], rtol=1e-10)
        assert len(set(items[row].tolist())) == 200
        remembered_beyond_heads += int((find_heads(catalog).place[items[row]] < 0).sum()) if row < 20 else 0
    assert remembered_beyond_heads > 0, "the case of an unpopular item in memory is covered"


def within(hits: npt.NDArray[Any], p: npt.NDArray[np.float64], errors: float = 4.0) -> bool:
    """Whether the number of hits is the sum of their probabilities, within `errors` standard errors."""
    return bool(abs(hits.sum() - p.sum()) <= errors * np.sqrt((p * (1.0 - p)).sum()))


def test_probabilities_of_items_are_calibrated(world: tuple[Catalog, Listens]) -> None:
    catalog, listens = world
    items, p = best_items(catalog, find_heads(catalog), listens.last)
    target = listens.item[listens.last_event]
    hits = items == target[:, None]
    assert within(hits[:, 0], p[:, 0])
    assert within(hits.any(axis=1), p.sum(axis=1))
    for low, high in ((0, 3), (3, 12), (12, 60), (60, 200)):
        assert within(hits[:, low:high].any(axis=1), p[:, low:high].sum(axis=1))
    for floor, ceiling in ((0.0, 0.005), (0.005, 0.05), (0.05, 0.14), (0.14, 1.0)):
        chosen = (p >= floor) & (p < ceiling)
        assert within(hits[chosen], p[chosen])
    assert not within(np.roll(hits[:, 0], 1) & (items[:, 0] == np.roll(target, 1)), p[:, 0]), (
        "another user's state fails"
    )


def test_probabilities_of_listening_are_calibrated(world: tuple[Catalog, Listens]) -> None:
    _, listens = world
    listened, p = listens.ratio[listens.last_event] >= 50, listens.p_listened
    for floor in np.arange(0.0, 1.0, 0.1):
        chosen = (p >= floor) & (p < floor + 0.1)
        assert within(listened[chosen], p[chosen])
    assert not within(listened, np.full(NUM_USERS, p.mean() + 0.05))
    order = np.argsort(p)
    assert listened[order[-500:]].mean() - listened[order[:500]].mean() > 0.6, "the truth tells listens from skips"
