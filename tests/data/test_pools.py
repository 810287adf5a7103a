"""Packs come out full and level, and everything is dealt once."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.data.packs import PackRule, Windows
from megarec.data.pools import deal, fill_pool


def slow_deal(lengths: list[int], num_carried: int, capacity: int) -> list[int]:
    """What `deal` says it does, by looking at every pack every time."""
    packs: list[list[int]] = [[] for _ in range(sum(lengths) // capacity)]
    dealt = []
    for index, length in enumerate(lengths):
        if index < num_carried and all(sum(pack) + length > capacity for pack in packs):
            packs.append([])
        fitting = [(sum(n * n for n in pack), i) for i, pack in enumerate(packs) if sum(pack) + length <= capacity]
        dealt.append(min(fitting)[1] if fitting else -1)
        if fitting:
            packs[dealt[-1]].append(length)
    return dealt


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(0, 60), st.integers(20, 50))
def test_windows_are_dealt_as_stated(lengths: list[int], num_carried: int, capacity: int) -> None:
    num_carried = min(num_carried, len(lengths))
    for order in (lengths, sorted(lengths, reverse=True)):
        dealt = deal(np.array(order, dtype=np.int64), num_carried=num_carried, capacity=capacity)
        assert dealt.tolist() == slow_deal(order, num_carried, capacity)
        load = np.bincount(dealt[dealt >= 0], np.array(order)[dealt >= 0]) if order else np.zeros(0)
        assert (load > 0).all()
        assert (load <= capacity).all()
        assert (dealt[:num_carried] >= 0).all()


def windows_of_lengths(lengths: np.ndarray, *, block: int) -> Windows:
    n = len(lengths)
    start = np.cumsum(lengths + 1) - lengths - 1
    return Windows(
        reference=np.stack(
            [np.zeros(n, dtype=np.int64), np.full(n, block), np.arange(n), np.zeros(n, dtype=np.int64)], axis=1
        ),
        user=np.arange(n),
        start=start,
        num_targets=lengths,
        columns={"item": np.arange(int((lengths + 1).sum()))},
    )


def test_a_pool_deals_every_window_once_or_carries_it() -> None:
    draw = np.random.default_rng(0)
    rule = PackRule(num_events=100, max_targets=60, stride=0, keep_last_event=False)
    carried = None
    for turn in range(20):
        parts = [windows_of_lengths(draw.integers(1, 61, draw.integers(0, 30)), block=turn * 2 + b) for b in range(2)]
        pool = fill_pool(parts, carried=carried, rule=rule, key=turn)
        dealt = np.concatenate([*pool.packs, np.zeros(0, dtype=np.int64)]).tolist()
        assert len(set(dealt)) == len(dealt)
        undealt = sorted(set(range(len(pool.windows.user))) - set(dealt))
        by_reference = {tuple(r): i for i, r in enumerate(pool.windows.reference.tolist())}
        places = [by_reference[tuple(r)] for r in pool.carried.reference.tolist()]
        assert sorted(places) == undealt
        for place, start, num_targets in zip(places, pool.carried.start, pool.carried.num_targets, strict=True):
            first = pool.windows.start[place]
            np.testing.assert_array_equal(
                pool.carried.columns["item"][start : start + num_targets + 1],
                pool.windows.columns["item"][first : first + num_targets + 1],
            )
        assert carried is None or set(range(len(carried.user))) <= set(dealt)
        carried = pool.carried


def test_the_shuffle_depends_on_the_key_alone() -> None:
    rule = PackRule(num_events=100, max_targets=60, stride=0, keep_last_event=False)
    parts = [windows_of_lengths(np.random.default_rng(1).integers(1, 61, 200), block=0)]
    packs = [[p.tolist() for p in fill_pool(parts, carried=None, rule=rule, key=key).packs] for key in (1, 1, 2)]
    assert packs[0] == packs[1] != packs[2]
    assert {frozenset(p) for p in packs[0]} != {frozenset(p) for p in packs[2]}


def test_packs_of_zipf_lengths_come_out_full_and_level() -> None:
    """8 blocks of 512 users, lengths from 1 to 512 with a heavy tail, packs of 4096 events."""
    draw = np.random.default_rng(7)
    lengths = np.minimum(draw.zipf(1.5, 4096) * 3, 512)
    rule = PackRule(num_events=4096, max_targets=512, stride=0, keep_last_event=False)
    pool = fill_pool([windows_of_lengths(lengths, block=0)], carried=None, rule=rule, key=3)
    tokens = np.array([lengths[pack].sum() for pack in pool.packs])
    squares = np.array([(lengths[pack] ** 2).sum() for pack in pool.packs])
    in_log_order = np.bincount(np.cumsum(lengths) // 4096, lengths**2)[:-1]
    spread = {
        "tokens": tokens.max() / tokens.mean(),
        "squared lengths": squares.max() / squares.mean(),
        "squared lengths in log order": in_log_order.max() / in_log_order.mean(),
    }
    fill = tokens.mean() / 4096
    print(f"{len(pool.packs)} packs, fill {fill:.4f}; max/mean:", {name: f"{s:.4f}" for name, s in spread.items()})
    assert fill >= 0.97
    assert spread["tokens"] <= 1.01
    assert spread["squared lengths"] <= 1.05 < 1.2 < spread["squared lengths in log order"]
    assert lengths[pool.carried.reference[:, 2]].sum() <= 4096
