"""The true probabilities of each user's last listen, and the file `oracle.parquet` that holds them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from megarec_tools.make_log.catalog import MAX_ITEMS_PER_ARTIST, Catalog, raw_ids
from megarec_tools.make_log.choice import (
    FIRST_FAVOURITE,
    FIRST_SAME_ARTIST,
    MOOD,
    MOOD_WAY,
    POPULAR,
    SLOT_OF_WAY,
    WAYS,
)
from megarec_tools.make_log.draws import Draws, Floats, Ints
from megarec_tools.make_log.process import Listens
from megarec_tools.make_log.reaction import HALF
from megarec_tools.make_log.state import EMPTY, State
from megarec_tools.make_log.writer import open_parquet, to_timestamp

TOP = 200
USERS_PER_GROUP = 256  # users of a row group; chunks of users are whole groups, so bytes do not depend on chunks
ORACLE_SCHEMA = pa.schema(
    [
        ("uid", pa.uint32()),
        ("timestamp", pa.uint32()),
        ("item_id", pa.uint32()),
        ("listened", pa.bool_()),
        ("p_listened", pa.float32()),
        ("item_ids", pa.list_(pa.uint32())),
        ("probabilities", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The items that can be among the best for some user by popularity, taste and mood alone.

    Within a genre those three ways rank items by popularity, so the first `TOP` of each genre are enough; any other
    item gets there only through a memory slot. `item` is in the catalogue's order, so by genre; `place` is an item's
    index in `item` or `EMPTY`.
    """

    item: Ints
    num_by_genre: Ints
    place: Ints


def find_heads(catalog: Catalog) -> Heads:
    """The `TOP` most popular items of each genre."""
    order = np.lexsort([np.arange(catalog.num_items), -catalog.popularity, catalog.genre])
    rank_in_genre = np.arange(catalog.num_items) - catalog.genre_first[catalog.genre[order]]
    item = np.sort(order[rank_in_genre < TOP])
    place = np.full(catalog.num_items, EMPTY)
    place[item] = np.arange(len(item))
    return Heads(item=item, num_by_genre=np.minimum(np.diff(catalog.genre_first), TOP), place=place)


def best_items(catalog: Catalog, heads: Heads, state: State) -> tuple[Ints, Floats]:
    """The likeliest next items of each user and their exact probabilities.

    Returns:
        Items and probabilities, `[users, min(TOP, items)]`, likeliest first, equal ones by the lower raw id.
    """
    scale = _scale_by_genre(catalog, state)
    user, item, extra = _by_memory(catalog, state)
    place = heads.place[item]
    outside = np.flatnonzero(place == EMPTY)
    place[outside] = len(heads.item) + np.arange(len(outside)) - np.searchsorted(user[outside], user[outside])

    # One column per head, then what each user remembers beyond them; unused columns never reach the top.
    p = np.full((len(scale), max(len(heads.item), int(place.max(initial=-1)) + 1)), -1.0)
    p[:, : len(heads.item)] = catalog.popularity[heads.item] * np.repeat(scale, heads.num_by_genre, axis=1)
    p[user[outside], place[outside]] = (
        catalog.popularity[item[outside]] * scale[user[outside], catalog.genre[item[outside]]]
    )
    p[user, place] += extra
    beyond = np.zeros((len(p), p.shape[1] - len(heads.item) + 1), dtype=np.int64)
    beyond[user[outside], place[outside] - len(heads.item)] = item[outside]

    top = min(TOP, catalog.num_items)
    chosen = np.argpartition(p, p.shape[1] - top, axis=1)[:, -top:]
    p = np.take_along_axis(p, chosen, axis=1)
    of_beyond = np.take_along_axis(beyond, (chosen - len(heads.item)).clip(0), axis=1)
    items = np.where(chosen < len(heads.item), heads.item[np.minimum(chosen, len(heads.item) - 1)], of_beyond)
    order = np.lexsort([catalog.raw_item[items], -p], axis=1)
    return np.take_along_axis(items, order, axis=1), np.take_along_axis(p, order, axis=1)


def _scale_by_genre(catalog: Catalog, state: State) -> Floats:
    """`[users, genres]`: p(i) without the ways that look at memory, over popularity_i, for the items i of a genre."""
    empty = state.memory[:, SLOT_OF_WAY[:MOOD_WAY]] == EMPTY
    taste = 1.0 - WAYS.sum() + (empty * WAYS[:MOOD_WAY]).sum(axis=1) + MOOD * (state.mood == EMPTY)
    genre_weight = taste[:, None] * np.diff(state.genre_ends, axis=1, prepend=0.0)
    row = np.flatnonzero(state.mood != EMPTY)
    genre_weight[row, state.mood[row]] += MOOD
    genre_popularity = np.diff(catalog.cumulative[catalog.genre_first])
    return POPULAR + genre_weight / np.where(genre_popularity > 0.0, genre_popularity, 1.0)


def _by_memory(catalog: Catalog, state: State) -> tuple[Ints, Ints, Floats]:
    """What the memory slots add: (user, item, probability), each pair of user and item once, sorted."""
    slots = state.memory[:, SLOT_OF_WAY[:MOOD_WAY]]
    weight = np.broadcast_to(WAYS[:MOOD_WAY], slots.shape)
    item = slots.copy()
    item[:, :FIRST_SAME_ARTIST] = catalog.successor[slots[:, :FIRST_SAME_ARTIST]]
    direct = slots != EMPTY
    direct[:, FIRST_SAME_ARTIST:FIRST_FAVOURITE] = False
    user = np.broadcast_to(np.arange(len(slots))[:, None], slots.shape)

    recent = slots[:, FIRST_SAME_ARTIST:FIRST_FAVOURITE]
    first, end = (catalog.artist_first[catalog.artist[recent] + more][..., None] for more in (0, 1))
    of_artist = first + np.arange(MAX_ITEMS_PER_ARTIST)
    valid = (of_artist < end) & (recent != EMPTY)[..., None]
    of_artist = np.minimum(of_artist, end - 1)
    share = catalog.popularity[of_artist] / (catalog.cumulative[end] - catalog.cumulative[first])
    share *= WAYS[FIRST_SAME_ARTIST:FIRST_FAVOURITE, None]
    user_of_artist = np.broadcast_to(np.arange(len(slots))[:, None, None], share.shape)

    users = np.concatenate([user[direct], user_of_artist[valid]])
    items = np.concatenate([item[direct], of_artist[valid]])
    pair, place = np.unique(users * catalog.num_items + items, return_inverse=True)
    extra = np.bincount(place, weights=np.concatenate([weight[direct], share[valid]])).astype(np.float64)
    return pair // catalog.num_items, pair % catalog.num_items, extra


class OracleFile:
    """Writes the file group by group and keeps the means that log.json reports; closes as a context manager."""

    def __init__(self, path: Path, catalog: Catalog, draws: Draws) -> None:
        self._catalog, self._draws, self._heads = catalog, draws, find_heads(catalog)
        self._file = open_parquet(path, ORACLE_SCHEMA, repetitive=False)
        self._users = 0
        self._ndcg = 0.0
        self._p_listened = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, listens: Listens) -> None:
        """Appends the users of `listens`, which begin at a whole group."""
        for first in range(0, len(listens.user), USERS_PER_GROUP):
            self._add_group(listens, np.arange(first, min(first + USERS_PER_GROUP, len(listens.user))))

    def summary(self) -> dict[str, float]:
        """Means over users: what the NDCG@10 of ranking by the truth is expected to be, and p_listened."""
        return {"ndcg@10": self._ndcg / self._users, "p_listened": self._p_listened / self._users}

    def _add_group(self, listens: Listens, row: Ints) -> None:
        items, p = best_items(self._catalog, self._heads, listens.last.rows(row))
        event = listens.last_event[row]
        offsets = np.arange(len(row) + 1, dtype=np.int32) * p.shape[1]
        columns = {
            "uid": raw_ids("user", listens.user[row], self._draws),
            "timestamp": to_timestamp(listens.time[event]),
            "item_id": self._catalog.raw_item[listens.item[event]],
            "listened": listens.ratio[event] >= HALF,
            "p_listened": listens.p_listened[row],
            "item_ids": pa.ListArray.from_arrays(
                offsets, pa.array(self._catalog.raw_item[items].ravel().astype(np.uint32))
            ),
            "probabilities": pa.ListArray.from_arrays(offsets, pa.array(p.ravel().astype(np.float32))),
        }
        table = pa.table({name: pa.array(column) for name, column in columns.items()}).cast(ORACLE_SCHEMA)
        self._file.write_table(table)
        self._users += len(row)
        discount = 1.0 / np.log2(np.arange(2, 2 + min(10, p.shape[1])))
        self._ndcg += float((p[:, :10] * discount).sum())
        self._p_listened += float(listens.p_listened[row].sum())
