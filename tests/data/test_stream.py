"""The stream: the same for every layout, exact after a restart, everyone once an epoch."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megarec.base.errors import UserError
from megarec.data.dataset import Dataset
from megarec.data.packs import Pack
from megarec.data.reader import BlockReader
from megarec.data.stream import StreamConfig, TrainStream
from tests.data.small_datasets import FIELDS, make_block, write_dataset_of, write_histories

STEPS = 25


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    lengths = np.random.default_rng(3).integers(0, 40, 150).tolist()
    return write_histories(tmp_path_factory.mktemp("stream"), lengths, users_per_block=7)


def config_of(**changes: Any) -> StreamConfig:
    return StreamConfig(**{"tokens_per_pack": 64, "max_history_events": 24, "pool_blocks": 2, "seed": 5} | changes)


def steps_of(stream: TrainStream, count: int) -> list[list[Pack]]:
    steps = [stream.next_step() for _ in range(count)]
    stream.close()
    return steps


def assert_same_packs(left: list[Pack], right: list[Pack]) -> None:
    assert len(left) == len(right)
    for ours, theirs in zip(left, right, strict=True):
        for name, value in vars(ours).items():
            other = getattr(theirs, name)
            for key in value if isinstance(value, dict) else [None]:
                a, b = (value, other) if key is None else (value[key], other[key])
                assert np.asarray(a).dtype == np.asarray(b).dtype
                np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize(("packs_per_lane", "alpha"), [(1, 0.0), (2, 0.0), (1, 1.5)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_is_the_same_on_any_number_of_ranks(
    dataset: Dataset, ranks: int, packs_per_lane: int, alpha: float
) -> None:
    config = config_of(lanes=4, packs_per_lane=packs_per_lane, stochastic_length_alpha=alpha)
    whole = steps_of(TrainStream(dataset, config, lanes=range(4)), STEPS)
    served = [steps_of(TrainStream(dataset, config, lanes=range(r, 4, ranks)), STEPS) for r in range(ranks)]
    for step, packs in enumerate(whole):
        assert [pack.lane for pack in packs] == [lane for lane in range(4) for _ in range(packs_per_lane)]
        assert {pack.number // packs_per_lane for pack in packs} == {step}
        together = sorted((p for rank in served for p in rank[step]), key=lambda pack: (pack.lane, pack.number))
        assert_same_packs(together, packs)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_restart_at_any_step_changes_nothing(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 30), min_size=12, max_size=60))
    users_per_block = data.draw(st.integers(1, 5))
    lanes = data.draw(st.integers(1, 3))
    most = data.draw(st.integers(2, 24))
    alpha = data.draw(st.sampled_from([0.0, 1.5, 2.0]))
    config = config_of(
        tokens_per_pack=data.draw(st.sampled_from([24, 40, 150])),
        keep_last_event=data.draw(st.booleans()),
        lanes=lanes,
        pool_blocks=data.draw(st.integers(1, 4)),
        max_history_events=most,
        stochastic_length_alpha=alpha if most ** (alpha / 2) >= 2 else 0.0,
        window=data.draw(st.sampled_from(["newest", "stride:1"])),
        packs_per_lane=data.draw(st.integers(1, 2)),
    )
    lengths[: lanes * users_per_block] = [9] * lanes * users_per_block  # every lane has something to serve
    lengths += [9] * lanes * users_per_block
    dataset = write_histories(
        tmp_path_factory.mktemp("restart"), lengths, users_per_block=users_per_block, blocks_per_shard=99
    )
    try:
        reference = TrainStream(dataset, config, lanes=range(lanes))
        states, steps, epochs = [], [], []
        for _ in range(STEPS):
            states.append(json.dumps(reference.state()))
            epochs.append(reference.epochs())
            steps.append(reference.next_step())
        counts = reference.counts
        reference.close()
    except UserError as error:
        assert "holds no history with two events" in str(error)
        return
    for step in {0, 1, STEPS - 1, data.draw(st.integers(0, STEPS - 1))}:
        stream = TrainStream(dataset, config, lanes=range(lanes))
        stream.restore(json.loads(states[step]))
        assert json.dumps(stream.state()) == states[step]
        assert stream.epochs() == epochs[step]
        for packs in steps[step:]:
            assert_same_packs(stream.next_step(), packs)
        assert stream.counts == counts
        stream.close()


def test_a_restart_on_other_ranks_takes_over_the_lanes(dataset: Dataset) -> None:
    config = config_of(lanes=4)
    whole = TrainStream(dataset, config, lanes=range(4))
    for _ in range(9):
        whole.next_step()
    saved = json.loads(json.dumps(whole.state()))
    step = whole.next_step()
    halves = [TrainStream(dataset, config, lanes=range(rank, 4, 2)) for rank in range(2)]
    for half in halves:
        half.restore(saved)
    merged = halves[0].state() | halves[1].state()
    assert merged == saved
    assert_same_packs([pack for half in halves for pack in half.next_step()], [step[i] for i in (0, 2, 1, 3)])
    for stream in (whole, *halves):
        stream.close()


def test_states_cover_carried_windows_and_pool_ends(dataset: Dataset) -> None:
    """The restart test means little unless it meets these."""
    stream = TrainStream(dataset, config_of(lanes=1), lanes=[0])
    seen = Counter[str]()
    for _ in range(120):
        stream.next_step()
        state = stream.state()["0"]
        after = stream._lanes[0]
        seen["carried"] += bool(state["carried"])
        seen["epochs"] = max(seen["epochs"], state["epoch"])
        seen["at a pool's end"] += after._pool is not None and state["pack"] == len(after._pool.packs)
        seen["inside a pool"] += after._pool is not None and state["pack"] < len(after._pool.packs)
    stream.close()
    assert min(seen["carried"], seen["at a pool's end"], seen["inside a pool"]) > 3
    assert seen["epochs"] >= 2


@pytest.mark.parametrize(
    "changes", [{"seed": 6}, {"pool_blocks": 3}, {"max_history_events": 23}, {"stochastic_length_alpha": 1.5}]
)
def test_a_state_of_other_settings_is_refused(dataset: Dataset, changes: dict[str, Any]) -> None:
    stream = TrainStream(dataset, config_of(lanes=2), lanes=[0, 1])
    other = TrainStream(dataset, config_of(lanes=2, **changes), lanes=[0, 1])
    with pytest.raises(UserError, match="another dataset or of other stream settings"):
        other.restore(stream.state())
    with pytest.raises(UserError, match="no lane 0"):
        stream.restore({})
    ahead = TrainStream(dataset, config_of(lanes=2, prefetch_steps=9), lanes=[0, 1])
    ahead.restore(stream.state())
    for each in (stream, other, ahead):
        each.close()


def test_a_state_of_another_dataset_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    other = write_histories(tmp_path, [9] * 150, users_per_block=7)
    streams = [TrainStream(each, config_of(lanes=1), lanes=[0]) for each in (dataset, other)]
    with pytest.raises(UserError, match="another dataset"):
        streams[1].restore(streams[0].state())
    for stream in streams:
        stream.close()


Window = tuple[int, tuple[int, ...]]


def slow_windows(items: list[int], config: StreamConfig) -> list[list[int]]:
    """The items of each window of one history, newest window first, cut one by one."""
    most = config.max_history_events + (0 if config.keep_last_event else 1)
    stride = 0 if config.window == "newest" else int(config.window.removeprefix("stride:"))
    windows: list[list[int]] = []
    end = len(items)
    while len(items) >= 2 and (not windows or (stride and end + stride > most)):
        windows.append(items[max(end - most, 0) : end])
        end -= stride
    return windows


def windows_of(packs: list[Pack]) -> list[Window]:
    """User and items of every window in some packs, the last target's item included."""
    found = []
    for pack in packs:
        for b, (begin, end) in enumerate(itertools.pairwise(pack.cu_seqlens.tolist())):
            items = pack.fields["item"][begin:end].tolist() + pack.next_fields["item"][end - 1 : end].tolist()
            found.append((int(pack.user[b]), tuple(item for item in items if item >= 0)))
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"keep_last_event": True},
        {"window": "stride:10"},
        {"window": "stride:24"},
        {"window": "stride:3", "keep_last_event": True},
        {"pool_blocks": 1},
        {"tokens_per_pack": 24},
        {"tokens_per_pack": 150},
        {"stochastic_length_alpha": 1.5},
        {"stochastic_length_alpha": 2.0, "window": "stride:3", "keep_last_event": True},
    ],
)
def test_every_window_comes_once_an_epoch_and_waits_at_most_one_pool(dataset: Dataset, changes: dict[str, Any]) -> None:
    config = config_of(lanes=2, **changes)
    reader = BlockReader(dataset, "train")
    rule = config.stochastic_length
    cut: dict[tuple[int, ...], Window] = {}
    for epoch, number in itertools.product(range(3), range(reader.num_blocks)):
        block = reader.read(number) if rule is None else rule.shorten(reader.read(number), epoch=epoch)
        for u, (begin, end) in enumerate(itertools.pairwise(block.offsets.tolist())):
            windows = slow_windows(block.columns["item"][begin:end].tolist(), config)
            cut |= {(epoch, number, u, k): (int(block.user[u]), tuple(w)) for k, w in enumerate(windows)}
    total: Counter[Window] = Counter()
    for lane in range(2):
        stream = TrainStream(dataset, config, lanes=[lane])
        before: set[tuple[int, ...]] = set()
        place = (0, 0)
        while True:
            packs = stream.next_step()
            state = stream.state()[str(lane)]
            carried = {tuple(reference) for reference in state["carried"]}
            if (state["epoch"], state["pool"]) != place:
                assert state["epoch"] != place[0] or not before & carried, "a carried window had to wait again"
                before, place = carried, (state["epoch"], state["pool"])
            if packs[0].epoch == 3:
                break
            total.update(windows_of(packs))
        total.update(cut[reference] for reference in carried)  # served next, though of the epochs before
        stream.close()
    assert total == Counter(cut.values())


@pytest.mark.parametrize("keep_last_event", [False, True])
def test_packs_hold_what_the_histories_say(dataset: Dataset, keep_last_event: bool) -> None:
    config = config_of(lanes=3, keep_last_event=keep_last_event)
    reader = BlockReader(dataset, "train")
    histories: dict[int, dict[str, Any]] = {}
    for number in range(reader.num_blocks):
        block = reader.read(number)
        for u, (begin, end) in enumerate(itertools.pairwise(block.offsets.tolist())):
            histories[int(block.user[u])] = {name: column[begin:end] for name, column in block.columns.items()}
    for packs in steps_of(TrainStream(dataset, config, lanes=range(3)), STEPS):
        for pack in packs:
            assert len(pack.position) == len(pack.has_target) == 64
            for b, (begin, end) in enumerate(itertools.pairwise(pack.cu_seqlens.tolist())):
                num_events = end - begin
                num_targets = num_events - keep_last_event
                history = histories[int(pack.user[b])]
                own, following = slice(begin, end), slice(begin, begin + num_targets)
                first = len(history["item"]) - num_targets - 1
                np.testing.assert_array_equal(pack.position[own], np.arange(num_events))
                np.testing.assert_array_equal(pack.has_target[own], np.arange(num_events) < num_targets)
                assert num_events <= 24
                assert first == 0 or num_events == 24
                timestamp = history.pop("timestamp")
                np.testing.assert_array_equal(pack.timestamp[own], timestamp[first : first + num_events])
                np.testing.assert_array_equal(pack.next_timestamp[following], timestamp[first + 1 :])
                assert (
                    set(history) == set(pack.fields) == set(pack.next_fields) == {"item", "surface", "tags", "played"}
                )
                for name, column in history.items():
                    np.testing.assert_array_equal(pack.fields[name][own], column[first : first + num_events])
                    np.testing.assert_array_equal(pack.next_fields[name][following], column[first + 1 :])
                history["timestamp"] = timestamp
                if keep_last_event:
                    assert pack.next_timestamp[end - 1] == pack.timestamp[end - 1]
                    assert all((column[end - 1] == -1).all() for column in pack.next_fields.values())
            dead = slice(int(pack.cu_seqlens[-1]), None)
            for column in (pack.position, pack.timestamp, pack.next_timestamp, pack.has_target):
                assert not column[dead].any()
            assert all((c[dead] == -1).all() for c in (*pack.fields.values(), *pack.next_fields.values()))


def test_an_event_is_seen_as_next_by_the_one_before_and_by_nobody_else(tmp_path: Path) -> None:
    """Perturb one event: only `next_*` of its predecessor and its own columns change, nothing earlier."""
    plain = [make_block([9, 12, 8], first_user=0, seed=1)]
    changed = {name: column.copy() for name, column in plain[0].columns.items()}
    row = 9 + 7  # user 1, event 7
    for name, column in changed.items():
        column[row] = column[row] + 1 if name == "timestamp" else (column[row] + 1) % FIELDS[name].num_ids
    config = config_of(lanes=1, max_history_events=12, tokens_per_pack=24)
    pairs = []
    for number, blocks in enumerate([plain, [replace(plain[0], columns=changed)]]):
        dataset = write_dataset_of(tmp_path / str(number), train=[blocks])
        stream = TrainStream(dataset, config, lanes=[0])
        pairs.append(steps_of(stream, 1)[0][0])
    before, after = pairs
    at = int(before.cu_seqlens[before.user.tolist().index(1)]) + 7
    for ours, theirs, place in (
        [(before.fields[name], after.fields[name], at) for name in before.fields]
        + [(before.next_fields[name], after.next_fields[name], at - 1) for name in before.fields]
        + [(before.timestamp, after.timestamp, at), (before.next_timestamp, after.next_timestamp, at - 1)]
    ):
        differing = (ours != theirs).reshape(len(ours), -1).any(axis=1)
        assert np.flatnonzero(differing).tolist() == [place]
    for name in ("cu_seqlens", "user", "position", "has_target"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


def test_counts(tmp_path: Path) -> None:
    dataset = write_histories(tmp_path, [0, 1, 2, 30, 25, 26] * 2, users_per_block=6)
    stream = TrainStream(dataset, config_of(lanes=1), lanes=[0])
    for _ in range(3):
        stream.next_step()
    epochs = stream.counts["histories"] // 12
    expected = {"histories": 12, "short_histories": 4, "events": 168, "dropped_events": 2 * (5 + 1), "windows": 8}
    expected["sampled_out_events"] = 0
    assert stream.counts == {name: epochs * count for name, count in expected.items()}
    stream.close()


def test_zstd_and_missing_timestamps(dataset: Dataset, tmp_path: Path) -> None:
    reader = BlockReader(dataset, "train")
    blocks = [reader.read(number) for number in range(reader.num_blocks)]
    packed = write_dataset_of(tmp_path / "zstd", train=[blocks], compression="zstd")
    untimed = write_dataset_of(tmp_path / "untimed", train=[blocks], has_timestamps=False)
    streams = [TrainStream(each, config_of(lanes=2), lanes=[0, 1]) for each in (dataset, packed, untimed)]
    for _ in range(STEPS):
        plain, zstd, timeless = (stream.next_step() for stream in streams)
        assert_same_packs(plain, zstd)
        for pack, other in zip(plain, timeless, strict=True):
            np.testing.assert_array_equal(pack.fields["tags"], other.fields["tags"])
            assert not other.timestamp.any()
            assert not other.next_timestamp.any()
    for stream in streams:
        stream.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 0}, "lanes is 0"),
        ({"max_history_events": 65}, "a pack holds 64 events"),
        ({"tokens_per_event": 3}, "a pack holds 21 events"),
        ({"max_history_events": 1, "keep_last_event": True}, "max_history_events is 1"),
        ({"window": "oldest"}, "window is 'oldest'"),
        ({"window": "stride:0"}, "N from 1 to 24"),
        ({"window": "stride:25"}, "N from 1 to 24"),
        ({"window": "stride:24", "keep_last_event": True}, "N from 1 to 23"),
        ({"window": "stride:x"}, "window is 'stride:x'"),
        ({"stochastic_length_alpha": 1.0}, "stochastic_length_alpha is 1. Set it above 1 and at most to 2"),
        ({"stochastic_length_alpha": 2.1}, "stochastic_length_alpha is 2.1"),
        ({"stochastic_length_alpha": -1}, "stochastic_length_alpha is -1"),
        ({"stochastic_length_alpha": float("nan")}, "stochastic_length_alpha is nan"),
        ({"stochastic_length_alpha": 1.5, "max_history_events": 2}, "leaves 1 of 2 events: no target"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(**changes)


def test_a_stream_that_cannot_be_is_refused(tmp_path: Path) -> None:
    few = write_histories(tmp_path / "few", [5] * 6, users_per_block=2)
    with pytest.raises(UserError, match=r"train on: 3, fewer than stream.lanes=4. Set stream.lanes=3"):
        TrainStream(few, config_of(lanes=4), lanes=[0])
    short = write_histories(tmp_path / "short", [1, 0] * 6, users_per_block=2)
    stream = TrainStream(short, config_of(lanes=2), lanes=[0])
    with pytest.raises(UserError, match="lane 0 holds no history with two events"):
        stream.next_step()
    stream.close()


def test_damage_is_named_by_the_step_that_meets_it(tmp_path: Path) -> None:
    dataset = write_histories(tmp_path, [9] * 12, users_per_block=2)
    shard = tmp_path / "train" / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    stream = TrainStream(dataset, config_of(lanes=1), lanes=[0])
    with pytest.raises(UserError, match=r"shard-000001\.tar, block 0: damaged block: its checksum is wrong"):
        for _ in range(9):
            stream.next_step()
    stream.close()
    shard.write_bytes(content[:-512])
    with pytest.raises(UserError, match=r"shard-000001\.tar: the shard has .* bytes, dataset\.json says"):
        TrainStream(dataset, config_of(lanes=1), lanes=[0])
    shard.unlink()
    with pytest.raises(UserError, match="the shard is missing"):
        TrainStream(dataset, config_of(lanes=1), lanes=[0])


def test_every_epoch_gives_a_lane_other_blocks_in_another_order(dataset: Dataset) -> None:
    stream = TrainStream(dataset, config_of(lanes=2), lanes=[0])
    users: list[set[int]] = [set(), set(), set()]
    while (packs := stream.next_step())[0].epoch < 3:
        users[packs[0].epoch].update(packs[0].user.tolist())
    stream.close()
    assert users[0] != users[1] != users[2] != users[0]
