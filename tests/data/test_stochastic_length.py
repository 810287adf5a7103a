"""Stochastic length: the published lengths, the stated draw, the same sample wherever a user is met in an epoch."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.base.random import derive_key, hash_numpy, uniform_numpy
from megarec.data.block import Block
from megarec.data.packs import Pack
from megarec.data.reader import BlockReader
from megarec.data.stochastic_length import StochasticLength
from megarec.data.stream import StreamConfig, TrainStream
from tests.data.small_datasets import write_histories

# A count of n independent draws of chance p stays within 5 sqrt(n p (1 - p)) of n p but for 6 in 10^7 cases.
DEVIATIONS = 5.0


def rule_of(**changes: Any) -> StochasticLength:
    return StochasticLength(**{"max_history_events": 24, "alpha": 1.5, "sampler": "recency", "seed": 5} | changes)


def block_of(times: Iterable[Iterable[int]], *, first_user: int = 0) -> Block:
    """Users whose events have the given times; the item is the event's place."""
    histories = [list(history) for history in times]
    return Block(
        user=first_user + np.arange(len(histories)),
        offsets=np.cumsum([0, *map(len, histories)]),
        columns={
            "item": np.array([i for history in histories for i in range(len(history))], dtype=np.int64),
            "tags": np.array([[i, t % 7] for h in histories for i, t in enumerate(h)], dtype=np.int64).reshape(-1, 2),
            "timestamp": np.array([time for history in histories for time in history], dtype=np.int64),
        },
    )


def places_of(block: Block) -> list[list[int]]:
    return [block.columns["item"][a:b].tolist() for a, b in itertools.pairwise(block.offsets.tolist())]


def slow_weights(times: list[int], sampler: str) -> list[float]:
    if sampler == "uniform":
        return [1.0] * len(times)
    elapsed = [times[-1] - time for time in times]
    if not any(elapsed):
        elapsed = [len(times) - 1 - i for i in range(len(times))]
    return [1.0 - f / sum(elapsed) for f in elapsed]


def slow_places(times: list[int], user: int, *, rule: StochasticLength, epoch: int) -> list[int]:
    """The events of one user that stay, from the rule, one at a time."""
    n, most = len(times), rule.max_history_events
    length = math.floor(most ** (rule.alpha / 2) + 1e-9)
    key = derive_key(rule.seed, "stochastic length", epoch)
    one = np.array([user])
    if n <= length or uniform_numpy(derive_key(key, "whole"), one)[0] < most**rule.alpha / n**2:
        return list(range(n))
    first = int(hash_numpy(derive_key(key, "user"), one)[0])
    arrivals = []
    for i, weight in enumerate(slow_weights(times, rule.sampler)):
        counter = np.array([(first + i) % 2**64], dtype=np.uint64)
        draw = float(uniform_numpy(derive_key(key, "event"), counter)[0])
        arrivals.append((-math.log1p(-draw) / weight if weight else math.inf, i))
    return sorted(i for _, i in sorted(arrivals)[:length])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_block_is_shortened_as_each_user_alone(data: st.DataObject) -> None:
    rule = rule_of(
        max_history_events=data.draw(st.integers(3, 24)),
        alpha=data.draw(st.sampled_from([1.3, 1.6, 2.0])),
        sampler=data.draw(st.sampled_from(["recency", "uniform"])),
    )
    gaps = data.draw(st.lists(st.lists(st.sampled_from([0, 0, 1, 50, 10**9]), max_size=40), max_size=12))
    times = [np.cumsum(history, dtype=np.int64).tolist() for history in gaps]
    for epoch in range(3):
        short = rule.shorten(block_of(times, first_user=70), epoch=epoch)
        wanted = [slow_places(h, 70 + u, rule=rule, epoch=epoch) for u, h in enumerate(times)]
        assert places_of(short) == wanted
        stay = [h[i] for h, places in zip(times, wanted, strict=True) for i in places]
        assert short.columns["timestamp"].tolist() == stay
        assert short.columns["tags"].tolist() == [[i, h[i] % 7] for h, p in zip(times, wanted, strict=True) for i in p]


@pytest.mark.parametrize(
    ("most", "alpha", "length"), [(24, 1.5, 10), (24, 2.0, 24), (1000, 1.2, 63), (100, 1.0001, 10)]
)
def test_the_length_and_how_often_a_history_stays_whole(most: int, alpha: float, length: int) -> None:
    rule = rule_of(max_history_events=most, alpha=alpha)
    assert rule.short_length == length <= most ** (alpha / 2) < length + 1
    users = 2000
    for n in (length, length + 1, 2 * length):
        found = Counter(np.diff(rule.shorten(block_of([range(n)] * users), epoch=0).offsets).tolist())
        assert set(found) <= {n, length}
        whole = 1.0 if n == length else min(1.0, most**alpha / n**2)
        assert abs(found[n] - users * whole) <= DEVIATIONS * math.sqrt(users * whole * (1 - whole))


def test_a_whole_power_is_not_missed_by_rounding() -> None:
    """125^(2/3) is 24.999... in floats."""
    assert 125 ** (4 / 3 / 2) < 25
    assert rule_of(max_history_events=125, alpha=4 / 3).short_length == 25


def chance_of_sets(weights: list[float], size: int) -> dict[tuple[int, ...], float]:
    """How likely each set is when `size` are drawn one after the other, by every order in which that can happen."""
    chances: Counter[tuple[int, ...]] = Counter()
    for order in itertools.permutations(range(len(weights)), size):
        chance, left = 1.0, sum(weights)
        for i in order:
            chance *= weights[i] / left
            left -= weights[i]
        chances[tuple(sorted(order))] += chance
    return dict(chances)


def farthest_count(rule: StochasticLength, times: list[int], sampler: str) -> float:
    """How many deviations the count of some set of events lies from what `sampler` says, over users and epochs."""
    users, epochs = 8000, 3
    chances = chance_of_sets(slow_weights(times, sampler), rule.short_length)
    found: Counter[tuple[int, ...]] = Counter()
    for epoch in range(epochs):
        places = places_of(rule.shorten(block_of([times] * users), epoch=epoch))
        found.update(tuple(p) for p in places if len(p) < len(times))
    total = found.total()
    assert total > users
    return max(abs(found[s] - total * p) / math.sqrt(total * p * (1 - p) or 1e-9) for s, p in chances.items())


TIMES = {"spread": [0, 80, 90, 99, 100, 100], "all at once": [7] * 6, "one long ago": [0, 9, 9, 9, 9, 9]}


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("sampler", ["recency", "uniform"])
def test_events_are_drawn_in_proportion_to_weights_without_replacement(sampler: Any, times: list[int]) -> None:
    rule = rule_of(max_history_events=3, alpha=2.0, sampler=sampler)
    assert farthest_count(rule, times, sampler) <= DEVIATIONS


@pytest.mark.parametrize(("sampler", "other"), [("recency", "uniform"), ("uniform", "recency")])
def test_another_draw_would_be_seen(sampler: Any, other: str) -> None:
    rule = rule_of(max_history_events=3, alpha=2.0, sampler=sampler)
    assert farthest_count(rule, TIMES["spread"], other) > 3 * DEVIATIONS


def test_the_share_of_events_that_stay_is_as_the_rule_says() -> None:
    rule = rule_of(max_history_events=64, alpha=1.7)
    lengths = np.random.default_rng(0).lognormal(4, 1, 3000).astype(np.int64) + 1
    whole = np.where(lengths > rule.short_length, np.minimum(1.0, 64**1.7 / lengths**2), 1.0)
    dropped = lengths - np.minimum(lengths, rule.short_length)
    expected = float((lengths - (1 - whole) * dropped).sum())
    deviation = math.sqrt(float((whole * (1 - whole) * dropped**2).sum()))
    found = int(rule.shorten(block_of(map(range, lengths)), epoch=0).offsets[-1])
    assert abs(found - expected) <= DEVIATIONS * deviation < 0.1 * expected < 0.1 * lengths.sum()


def test_a_sample_depends_on_seed_user_and_epoch_alone() -> None:
    draw = np.random.default_rng(1)
    times = [np.sort(draw.integers(0, 10**6, n)).tolist() for n in draw.integers(0, 60, 40)]
    rule, block = rule_of(), block_of(times, first_user=100)
    here = places_of(rule.shorten(block, epoch=3))
    for user in (4, 17, 39):
        alone = block_of([times[user]], first_user=100 + user)
        assert places_of(rule.shorten(alone, epoch=3)) == [here[user]]
    for other, epoch in ((rule, 4), (rule_of(seed=6), 3)):
        there = places_of(other.shorten(block, epoch=epoch))
        differing = [a != b for a, b, history in zip(here, there, times, strict=True) if len(history) > 30]
        assert sum(differing) > len(differing) / 2
    moved = places_of(rule.shorten(replace(block, user=block.user + 1), epoch=3))
    assert moved != here


def packs_of(stream: TrainStream, count: int) -> list[Pack]:
    packs = [pack for _ in range(count) for pack in stream.next_step()]
    stream.close()
    return packs


def stream_config(**changes: Any) -> StreamConfig:
    base = {"tokens_per_pack": 64, "max_history_events": 24, "pool_blocks": 2, "seed": 5, "lanes": 1}
    return StreamConfig(**{**base, "stochastic_length_alpha": 1.5, **changes})


def test_the_next_event_is_the_next_that_stays(tmp_path: Path) -> None:
    dataset = write_histories(tmp_path, np.random.default_rng(3).integers(0, 40, 60).tolist(), users_per_block=7)
    config = stream_config()
    rule, reader = config.stochastic_length, BlockReader(dataset, "train")
    assert rule is not None
    short = 0
    for pack in packs_of(TrainStream(dataset, config, lanes=[0]), 20):
        for b, (begin, end) in enumerate(itertools.pairwise(pack.cu_seqlens.tolist())):
            user = int(pack.user[b])
            whole = reader.read(user // 7)
            # A window may be carried over the end of an epoch: it is as the epoch before drew it.
            samples = [rule.shorten(whole, epoch=epoch) for epoch in (pack.epoch, max(pack.epoch - 1, 0))]
            windows = []
            for block in samples:
                rows = slice(int(block.offsets[user % 7]), int(block.offsets[user % 7 + 1]))
                windows.append({name: column[rows][-25:] for name, column in block.columns.items()})
            window = next(w for w in windows if w["item"][:-1].tolist() == pack.fields["item"][begin:end].tolist())
            for name in pack.fields:
                np.testing.assert_array_equal(pack.fields[name][begin:end], window[name][:-1])
                np.testing.assert_array_equal(pack.next_fields[name][begin:end], window[name][1:])
            np.testing.assert_array_equal(pack.timestamp[begin:end], window["timestamp"][:-1])
            np.testing.assert_array_equal(pack.next_timestamp[begin:end], window["timestamp"][1:])
            np.testing.assert_array_equal(pack.position[begin:end], np.arange(end - begin))
            short += len(window["item"]) == rule.short_length
    assert short > 20


def test_counts_say_what_was_sampled_out(tmp_path: Path) -> None:
    lengths = [0, 1, 5, 10, 11, 30, 60] * 6
    dataset = write_histories(tmp_path, lengths, users_per_block=6)
    config = stream_config()
    rule, reader = config.stochastic_length, BlockReader(dataset, "train")
    assert rule is not None
    stream = TrainStream(dataset, config, lanes=[0])
    epochs = 0
    while epochs < 2:
        stream.next_step()
        epochs = stream.counts["histories"] // len(lengths)
    stay = [
        np.diff(rule.shorten(reader.read(number), epoch=epoch).offsets)
        for epoch in range(epochs)
        for number in range(reader.num_blocks)
    ]
    counts = stream.counts
    stream.close()
    assert counts["histories"] == epochs * len(lengths)
    assert counts["events"] == epochs * sum(lengths)
    assert counts["sampled_out_events"] == counts["events"] - sum(int(n.sum()) for n in stay) > 0
    assert counts["dropped_events"] == sum(int(np.maximum(n - 25, 0).sum()) for n in stay) > 0


def test_a_carried_window_is_of_its_own_epoch(tmp_path: Path) -> None:
    """Were it read again as another epoch draws it, a restart would serve other events."""
    dataset = write_histories(tmp_path, [60] * 40, users_per_block=4)
    config = stream_config()
    stream = TrainStream(dataset, config, lanes=[0])
    while not (state := stream.state()["0"])["carried"] or state["epoch"] == 0:
        stream.next_step()
    stream.close()
    served = []
    for shift in (0, 1):
        state = json.loads(json.dumps(state))
        state["carried"] = [[epoch - shift, *rest] for epoch, *rest in state["carried"]]
        again = TrainStream(dataset, config, lanes=[0])
        again.restore({"0": state})
        served.append([pack.fields["item"].tolist() for pack in packs_of(again, 3)])
    assert served[0] != served[1]
