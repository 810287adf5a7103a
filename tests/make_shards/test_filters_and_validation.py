"""The filters of published protocols, and the targets to tune on."""

from collections import Counter, defaultdict

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml
from make_shards.twin import read_users
from megarec_tools.make_shards.config import MakeShardsConfig, SplitConfig
from megarec_tools.make_shards.partition import hash_users
from megarec_tools.make_shards.pipeline import make_shards

from megarec.base.errors import UserError
from megarec.data.dataset import Dataset, open_dataset
from megarec.data.evaluation import evaluation_batches

SCHEMA = {"name": "s", "user": "user", "item": "item", "timestamp": "time", "timestamp_unit": "s"}


def log(folder, seed=0, num_users=60, num_items=90):
    """Users of 1 to 20 events, items of 1 to some ten: each row has a time of its own."""
    random = np.random.default_rng(seed)
    pairs = [
        (user, int(num_items * random.random() ** 2))
        for user in range(num_users)
        for _ in range(int(random.integers(1, 21)))
    ]
    rows = [(*pairs[n], 10 * t) for t, n in enumerate(random.permutation(len(pairs)).tolist())]
    (folder / "log.csv").write_text("user,item,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    return rows


def make(folder, *, name="made", **options) -> Dataset:
    config = {
        "input": str(folder / "log.csv"),
        "output": str(folder / name),
        "schema": str(folder / "schema.yaml"),
        "num_processes": 1,
        "users_per_block": 4,
        "blocks_per_shard": 2,
    }
    return open_dataset(make_shards(MakeShardsConfig(**{**config, **options})).path)


def by_user(rows):
    users = defaultdict(list)
    for user, item, time in rows:
        users[user].append((item, time))
    return users


def read(dataset, split):
    """Of each user of a split, by its own id: (item, time) of the history, of the targets, and the query time."""
    users = pq.read_table(dataset.path / "vocab/user.parquet")["raw"].to_pylist()
    raw = dataset.item_raw()

    def events(columns):
        return [(raw[i], t) for i, t in zip(columns["item"], columns["timestamp"], strict=True)]

    return {
        users[number]: (
            events(found["columns"]),
            events(found.get("targets", found["columns"])),
            found.get("query_time"),
        )
        for number, found in read_users(dataset, split).items()
    }


def published_filter(rows, *, num, drop_users):
    """Meta's preprocessing of Amazon Books: both counts from all rows, then the users that are left short."""
    items, users = Counter(i for _, i, _ in rows), Counter(u for u, _, _ in rows)
    kept = [r for r in rows if items[r[1]] >= num and (not drop_users or users[r[0]] >= num)]
    catalog = {i for _, i, _ in kept}
    left = Counter(u for u, _, _ in kept)
    return [r for r in kept if not drop_users or left[r[0]] >= num], catalog


def files_below(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("drop_users", [False, True])
def test_rare_items_and_short_users_are_dropped_as_published(tmp_path, drop_users, capsys):
    rows = log(tmp_path)
    kept, catalog = published_filter(rows, num=5, drop_users=drop_users)
    made = make(tmp_path, rare_items="drop", min_item_count=5, min_user_events=5 if drop_users else 1)
    users = by_user(kept)
    targets = {user: target for user, (_, target, _) in read(made, "eval").items()}
    assert {u: [*h, *targets.get(u, [])] for u, (h, _, _) in read(made, "train").items()} == users
    assert set(made.item_raw()[1:]) == catalog
    counts = made.counts
    assert counts["events"] == len(kept) and counts["users"] == len(users)
    assert counts["rows"] == len(kept) + counts["rare_events"] + counts["short_events"]
    assert counts["dropped_users"] == len(by_user(rows)) - len(users)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"events of rare items dropped {counts['rare_events']}" in printed
    assert (counts["short_events"] > 0) == drop_users


def test_an_item_of_users_left_short_is_in_the_catalog_without_events(tmp_path):
    log(tmp_path)
    rows = [(u, item, 10 * u + n) for u in range(5) for n, item in enumerate((1, 2, 1))]
    rows += [(9, 3, 60), (9, 3, 61)]  # too few events: gone at once
    rows += [(8, 2, 70), (8, 4, 71), (8, 3, 72)]  # too few when the rare item 4 is gone; 2 and 3 have been counted
    rows += [(7, 5, 80), (7, 5, 81), (6, 5, 82)]  # item 5 is not rare, but nobody has it when the users are gone
    (tmp_path / "log.csv").write_text("user,item,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    made = make(tmp_path, rare_items="drop", min_item_count=3, min_user_events=3)
    assert made.item_raw() == [None, 1, 2, 3] and made.item_counts().tolist() == [0, 5, 5, 0]
    assert published_filter(rows, num=3, drop_users=True)[1] == {1, 2, 3}
    counts = made.counts
    assert (counts["rare_events"], counts["short_events"], counts["dropped_users"]) == (1, 7, 4)
    assert counts["users"] == 5 and counts["events"] == 15


def test_filters_with_buckets_processes_and_repeated_rows(tmp_path, monkeypatch):
    log(tmp_path)
    options = {"rare_items": "drop", "min_item_count": 5, "min_user_events": 4, "duplicates": "drop"}
    options["split"] = SplitConfig(validation_users=7)
    one = make(tmp_path, name="one", **options)
    two = make(tmp_path, name="two", num_processes=2, **options)
    monkeypatch.setattr("megarec_tools.make_shards.pipeline.EVENTS_PER_BUCKET", 16)
    many = make(tmp_path, name="many", **options)
    assert files_below(one.path) == files_below(two.path) == files_below(many.path)
    assert one.counts["valid_users"] == 7


def test_the_filters_say_what_they_cannot_do(tmp_path):
    log(tmp_path)
    with pytest.raises(UserError, match="no item has min_item_count=1000 events"):
        make(tmp_path, rare_items="drop", min_item_count=1000)
    with pytest.raises(UserError, match="nothing to train on"):
        make(tmp_path, min_user_events=1000)
    for options in ({"rare_items": "drop"}, {"min_user_events": 2}):
        with pytest.raises(UserError, match="after the cut"):
            make(tmp_path, split=SplitConfig(rule="global_time", cut="100"), **options)
    with pytest.raises(UserError, match="rare_items=drop drops nothing"):
        make(tmp_path, rare_items="drop")
    with pytest.raises(UserError, match="user_holdout has a fraction"):
        SplitConfig(fraction=0.2)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("num_users", [1, 11])
def test_the_second_to_last_event_is_a_target_to_tune_on(tmp_path, num_users, monkeypatch):
    monkeypatch.setattr("megarec_tools.make_shards.pipeline.EVENTS_PER_BUCKET", 100)
    users = by_user(log(tmp_path))
    made = make(tmp_path, split=SplitConfig(validation_users=num_users))
    hashes = hash_users(pl.Series(list(users)), seed=0)
    order = [user for _, user in sorted(zip(hashes.tolist(), users, strict=True)) if len(users[user]) >= 3]
    chosen = set(order[:num_users])
    train, valid, evaluation = (read(made, split) for split in ("train", "valid", "eval"))
    assert valid == {u: (users[u][:-2], users[u][-2:-1], users[u][-2][1]) for u in chosen}
    asked = {u: e for u, e in users.items() if len(e) >= 2}
    assert evaluation == {u: (e[:-1], e[-1:], e[-1][1]) for u, e in asked.items()}
    held_back = {u: (2 if u in chosen else 1) if u in asked else 0 for u in users}
    assert {u: h for u, (h, _, _) in train.items()} == {u: e[: len(e) - held_back[u]] for u, e in users.items()}
    counts = Counter(item for history, _, _ in train.values() for item, _ in history)
    assert {raw: n for raw, n in zip(made.item_raw(), made.item_counts().tolist(), strict=True) if n} == dict(counts)
    assert set(made.item_raw()[1:]) == {item for events in users.values() for item, _ in events}
    assert made.counts["valid_users"] == made.counts["valid_targets"] == num_users
    assert made.split == {"rule": "leave_last_out", "validation_users": num_users}
    made.verify()
    sizes = {"max_history_events": 100, "users_per_batch": 3}
    batches = list(evaluation_batches(made, split="valid", **sizes))
    assert sum(len(batch.user) for batch in batches) == num_users
    numbers = pq.read_table(made.path / "vocab/user.parquet")["raw"].to_pylist()
    raw = made.item_raw()
    for batch in batches:
        for at, user in enumerate(batch.user.tolist()):
            assert raw[batch.target_fields["item"][at]] == users[numbers[user]][-2][0]
            assert batch.query_time[at] == users[numbers[user]][-2][1]
    assert sum(len(batch.user) for batch in evaluation_batches(made, **sizes)) == len(asked)


def test_who_is_tuned_on_is_a_matter_of_the_seed(tmp_path):
    log(tmp_path)
    split = SplitConfig(validation_users=10)
    a, b, other = (make(tmp_path, split=split, seed=s, name=n) for s, n in ((0, "a"), (0, "b"), (1, "other")))
    assert files_below(a.path) == files_below(b.path)
    assert set(read(a, "valid")) != set(read(other, "valid"))
    plain = make(tmp_path, name="plain")
    assert not (plain.path / "valid").exists() and plain.shards_of("valid") == []
    assert read(plain, "eval") == read(a, "eval")
    assert plain.counts["train_events"] == a.counts["train_events"] + 10


def test_more_users_than_can_be_tuned_on(tmp_path):
    users = by_user(log(tmp_path))
    possible = sum(len(events) >= 3 for events in users.values())
    make(tmp_path, split=SplitConfig(validation_users=possible))
    with pytest.raises(UserError, match=f"only {possible} users have three events"):
        make(tmp_path, split=SplitConfig(validation_users=possible + 1), name="b")
    for wrong in (
        {"rule": "user_holdout", "validation_users": 3},
        {"validation": 5.0},
        {"rule": "global_time", "cut": "1", "validation_users": 3},
    ):
        with pytest.raises(UserError, match="validation"):
            SplitConfig(**wrong)


def test_a_window_to_tune_on_before_the_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("megarec_tools.make_shards.pipeline.EVENTS_PER_BUCKET", 100)
    users = by_user(log(tmp_path))
    cut, gap, window = 4000, 300, 1000
    start = cut - gap - window
    made = make(tmp_path, split=SplitConfig(rule="global_time", cut=str(cut), gap=gap, validation=window))

    def between(events, low, high):
        return [event for event in events if low <= event[1] < high]

    end = 10**9
    train = {u: between(e, 0, start - gap) for u, e in users.items()}
    assert {u: h for u, (h, _, _) in read(made, "train").items()} == {u: h for u, h in train.items() if h}
    known = {item for history in train.values() for item, _ in history}
    assert set(made.item_raw()[1:]) == known

    def hidden(events):
        return [(item if item in known else None, time) for item, time in events]

    valid = {u: (h, hidden(between(users[u], start, cut - gap)), start) for u, h in train.items()}
    assert read(made, "valid") == {u: v for u, v in valid.items() if v[1]}
    asked = {u: (hidden(between(e, 0, cut - gap)), hidden(between(e, cut, end)), cut) for u, e in users.items()}
    assert read(made, "eval") == {u: v for u, v in asked.items() if v[1]}
    gaps = sum(len(between(e, cut - gap, cut)) for e in users.values())
    # what lies in the gap before the window is history of the eval split
    assert made.counts["gap_events"] == gaps
    assert made.split == {"rule": "global_time", "cut": cut, "gap": gap, "validation": window}
    with pytest.raises(UserError, match="nothing to tune on"):
        make(tmp_path, split=SplitConfig(rule="global_time", cut=str(cut), gap=gap, validation=0.5), name="b")


def tied_log(folder, *, num_users=150):
    """Users of nine events: one alone, two and six at one time; the item is the place in the history."""
    rows = [(user, n, 100 * user + (0, 1, 1, 2, 2, 2, 2, 2, 2)[n]) for n in range(9) for user in range(num_users)]
    (folder / "log.csv").write_text("user,item,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))


def test_equal_times_keep_the_order_of_the_log_and_are_counted(tmp_path):
    tied_log(tmp_path)
    made = make(tmp_path)
    assert made.counts["tied_events"] == 150 * 6
    assert all(
        [item for item, _ in history + target] == list(range(9)) for history, target, _ in read(made, "eval").values()
    )


def test_shuffled_equal_times(tmp_path, monkeypatch):
    tied_log(tmp_path)
    made = make(tmp_path, equal_times="shuffle")
    users = read(made, "eval")
    assert len(users) == 150 and made.counts["tied_events"] == 150 * 6
    orders = np.array([[item for item, _ in history + target] for history, target, _ in users.values()])
    assert (orders[:, 0] == 0).all() and (np.sort(orders[:, 1:3]) == [1, 2]).all()
    assert (np.sort(orders[:, 3:]) == range(3, 9)).all()
    # Each item of a group is as often at each of its places: 150 draws of 1/2 and of 1/6, within 4.5 standard errors.
    assert abs((orders[:, 1] == 1).mean() - 1 / 2) < 4.5 * np.sqrt(1 / 4 / 150)
    shares = np.array([[(orders[:, 3 + place] == item).mean() for item in range(3, 9)] for place in range(6)])
    assert np.abs(shares - 1 / 6).max() < 4.5 * np.sqrt(5 / 36 / 150)
    assert len({tuple(order) for order in orders[:, 3:].tolist()}) > 100  # of 720: users do not share an order
    two = make(tmp_path, name="two", num_processes=2, equal_times="shuffle")
    other = make(tmp_path, name="other", seed=1, equal_times="shuffle")
    monkeypatch.setattr("megarec_tools.make_shards.pipeline.EVENTS_PER_BUCKET", 64)
    many = make(tmp_path, name="many", equal_times="shuffle")
    assert files_below(made.path) == files_below(two.path) == files_below(many.path)
    assert read(other, "eval") != users


def test_shuffled_equal_times_drop_the_same_repeated_rows(tmp_path):
    tied_log(tmp_path, num_users=40)
    once = read(make(tmp_path, name="once", equal_times="shuffle"), "eval")
    text = (tmp_path / "log.csv").read_text()
    (tmp_path / "log.csv").write_text(text + text.partition("\n")[2])
    made = make(tmp_path, name="twice", duplicates="drop", equal_times="shuffle")
    assert made.counts["duplicates"] == 40 * 9 and read(made, "eval") == once
