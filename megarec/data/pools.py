"""Pools: a few blocks whose windows are dealt into packs of level work."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace

import numpy as np

from megarec.base.jagged import Int64
from megarec.base.random import derive_key, permutation
from megarec.data.packs import PackRule, Windows, concatenate_windows


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The windows of a few blocks, dealt into packs.

    Attributes:
        windows: those carried into the pool, then those of its blocks.
        packs: the windows of each pack, as indices.
        carried: the windows that found no room, with their rows: the next pool takes them first.
    """

    windows: Windows
    packs: list[Int64]
    carried: Windows


def fill_pool(parts: Sequence[Windows], *, carried: Windows | None, rule: PackRule, key: int) -> Pool:
    """Deals the windows of `parts`, and before them those `carried` from the pool before, into packs.

    Args:
        parts: the windows of each block.
        carried: what the pool before had no room for; all of it gets room here.
        rule: how large a pack is.
        key: of the shuffle, another for every pool.
    """
    num_carried = 0 if carried is None else len(carried.user)
    windows = concatenate_windows(parts if carried is None else [carried, *parts])
    lengths = windows.num_targets + rule.keep_last_event + rule.prefix_events
    shuffled = num_carried + permutation(derive_key(key, "windows"), len(lengths) - num_carried)
    order = np.concatenate([_longest_first(np.arange(num_carried), lengths), _longest_first(shuffled, lengths)])
    dealt = deal(lengths[order], num_carried=num_carried, capacity=rule.num_events)
    # Windows of one pack keep the order in which they were dealt; the packs themselves come shuffled.
    by_pack = np.argsort(dealt, kind="stable")
    groups = np.split(order[by_pack], np.searchsorted(dealt[by_pack], np.arange(dealt.max(initial=-1) + 1)))
    packs = [groups[1 + pack] for pack in permutation(derive_key(key, "packs"), len(groups) - 1)]
    return Pool(windows=windows, packs=packs, carried=windows.take(groups[0]))


def deal(lengths: Int64, *, num_carried: int, capacity: int) -> Int64:
    """Deals windows, in the order given, into as many packs as they can fill.

    Each goes into the pack with the smallest sum of squared lengths that has room, so that attention, which is
    quadratic in a window's length, comes out level; tokens do because the packs fill up. The order should be the
    longest first (Graham, "Bounds on multiprocessing timing anomalies", 1969).

    Args:
        lengths: events of each window, each from 1 to `capacity`, `[n]`.
        num_carried: so many windows at the front get room whatever it takes: packs are opened for them.
        capacity: events of a pack.

    Returns:
        The pack of each window, or -1 when none has room, `[n]`. No pack is empty.
    """
    room = [capacity] * (int(lengths.sum()) // capacity)
    level = [(0, pack) for pack in range(len(room))]
    full: list[tuple[int, int, int]] = []
    dealt = []
    for index, length in enumerate(lengths.tolist()):
        # A pack that is too full for a long window waits aside until a window comes that it has room for.
        while full and -full[0][0] >= length:
            _, squares, pack = heappop(full)
            heappush(level, (squares, pack))
        while level and room[level[0][1]] < length:
            squares, pack = heappop(level)
            heappush(full, (-room[pack], squares, pack))
        if not level and index < num_carried:
            level.append((0, len(room)))
            room.append(capacity)
        if level:
            squares, pack = level[0]
            room[pack] -= length
            heapreplace(level, (squares + length * length, pack))
        dealt.append(pack if level else -1)
    return np.array(dealt, dtype=np.int64)


def _longest_first(index: Int64, lengths: Int64) -> Int64:
    return index[np.argsort(-lengths[index], kind="stable")]
