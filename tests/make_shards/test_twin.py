"""Every event of a log comes back from the shards exactly once, in order, as the slow twin says."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_shards.twin import rank_values, read_users, split_user
from megarec_tools.make_shards.config import MakeShardsConfig, SplitConfig
from megarec_tools.make_shards.pipeline import make_shards

from megarec.data.dataset import open_dataset

CUT, GAP = 60, 10
EDGES = [2.0, 5.0]
SCHEMA = {
    "name": "small",
    "user": "u",
    "item": "i",
    "timestamp": "t",
    "timestamp_unit": "s",
    "fields": {
        "surface": {"column": "surface", "role": "context", "kind": "categorical"},
        "score": {"column": "score", "role": "feedback", "kind": "numeric", "edges": EDGES},
        "good": {"column": "score", "role": "feedback", "kind": "flag", "at_least": 4},
        "tags": {"column": "tags", "role": "context", "kind": "categorical", "max_values": 2},
        "artist": {"column": "artist", "role": "item_side", "kind": "id"},
    },
}
RULES = {
    "leave_last_out": SplitConfig(),
    "global_time": SplitConfig(rule="global_time", cut=str(CUT), gap=GAP),
    "user_holdout": SplitConfig(rule="user_holdout", fraction=0.5),
}

events_of_a_log = st.lists(
    st.fixed_dictionaries(
        {
            "u": st.sampled_from(["", "ann", "bob", "cy", "dan", "eve"]).filter(bool),
            "i": st.integers(-3, 12) | st.sampled_from([2**62, -(2**63)]),
            "time": st.integers(0, 12).map(lambda t: t * 10),
            "surface": st.sampled_from(["home", "search", None]),
            "score": st.sampled_from([None, 0.0, 2.0, 3.5, 4.0, 9.0]),
            "tags": st.lists(st.sampled_from(["x", "y", "z"]), max_size=3),
        }
    ),
    min_size=1,
    max_size=40,
)


def write_parquet(path, events):
    columns = {name: [e[name] for e in events] for name in ("u", "i", "surface", "score", "tags")}
    table = pa.table(
        {
            "u": columns["u"],
            "i": pa.array(columns["i"], pa.int64()),
            "t": pa.array([e["time"] for e in events], pa.int64()),
            "surface": pa.array(columns["surface"], pa.string()),
            "score": pa.array(columns["score"], pa.float64()),
            "tags": pa.array(columns["tags"], pa.list_(pa.string())),
            "artist": pa.array([e["i"] % 3 for e in events], pa.int64()),
        }
    )
    pq.write_table(table, path, row_group_size=7)


def shards_of(folder, events, rule, **options):
    folder.mkdir()
    half = len(events) // 2
    parts = [part for part in (events[:half], events[half:]) if part]
    for number, part in enumerate(parts):
        write_parquet(folder / f"{number}.parquet", part)
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    config = MakeShardsConfig(
        input=[str(folder / f"{number}.parquet") for number in range(len(parts))],
        output=str(folder / "made"),
        schema=str(folder / "schema.yaml"),
        split=RULES[rule],
        users_per_block=2,
        blocks_per_shard=2,
        num_processes=1,
        **options,
    )
    return make_shards(config)


def expected_columns(events, dataset, vocabularies):
    ids = {name: {v: k for k, v in enumerate(raw)} for name, raw in vocabularies.items()}
    columns = {"timestamp": [e["time"] for e in events], "item": [ids["item"].get(e["i"], 0) for e in events]}
    columns["surface"] = [0 if e["surface"] is None else ids["surface"].get(e["surface"], 0) for e in events]
    columns["score"] = [0 if e["score"] is None else 1 + sum(edge <= e["score"] for edge in EDGES) for e in events]
    columns["good"] = [0 if e["score"] is None else 1 + (e["score"] >= 4) for e in events]
    columns["tags"] = [[*(ids["tags"].get(t, 0) for t in e["tags"][:2]), -1, -1][:2] for e in events]
    return columns


def users_of(events):
    users = {}
    for event in events:
        users.setdefault(event["u"], []).append(event)
    return users


@pytest.mark.parametrize("rule", list(RULES))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=events_of_a_log)
def test_every_event_comes_back_once(rule, events, tmp_path_factory):
    folder = tmp_path_factory.mktemp("twin") / "log"
    train_possible = rule != "global_time" or any(e["time"] < CUT - GAP for e in events)
    users = users_of(events)
    if not train_possible or (rule == "global_time" and not any(e["time"] >= CUT for e in events)):
        return
    if rule == "leave_last_out" and all(len(e) == 1 for e in users.values()):
        return
    if rule == "user_holdout":
        events = [*events, *({**events[0], "u": f"extra{n}"} for n in range(40) for _ in range(2))]
        users = users_of(events)
    dataset = open_dataset(shards_of(folder, events, rule).path)
    raw_users = pq.read_table(dataset.path / "vocab/user.parquet").to_pylist()
    assert [row["user"] for row in raw_users] == list(range(len(raw_users)))
    train, evaluation = read_users(dataset, "train"), read_users(dataset, "eval")
    vocabularies = {"item": dataset.item_raw()}
    for name in ("surface", "tags"):
        vocabularies[name] = [None, *pq.read_table(dataset.path / f"vocab/{name}.parquet")["raw"].to_pylist()]
    train_events, catalog = [], []
    for row in raw_users:
        of_user = users.pop(row["raw"])
        history, targets = split_user(
            of_user, rule=rule, held_out=row["user"] in evaluation and rule == "user_holdout", cut=CUT, gap=GAP
        )
        held_out = rule == "user_holdout" and bool(targets)
        expected = expected_columns(history, dataset, vocabularies)
        if history and not held_out:
            train_events += history
            assert train.pop(row["user"])["columns"] == expected
        if targets:
            found = evaluation.pop(row["user"])
            assert found["columns"] == expected
            assert found["targets"] == expected_columns(targets, dataset, vocabularies)
            assert found["query_time"] == (CUT if rule == "global_time" else targets[0]["time"])
        catalog += history if rule == "global_time" else [*history, *targets]
    assert not train and not evaluation
    assert all(CUT - GAP <= e["time"] < CUT for rest in users.values() for e in rest)  # only in the gap
    expected_ids = rank_values([e["i"] for e in train_events], [e["i"] for e in catalog])
    assert {v: n for n, v in enumerate(vocabularies["item"]) if n} == expected_ids
    counts = dataset.item_counts()
    assert counts[0] == 0
    assert {v: int(counts[n]) for v, n in expected_ids.items()} == {
        v: sum(e["i"] == v for e in train_events) for v in expected_ids
    }
    artists = [None, *pq.read_table(dataset.path / "vocab/artist.parquet")["raw"].to_pylist()]
    side = dataset.item_side()["artist"]
    assert [artists[side[n]] for n in range(1, len(side))] == [v % 3 for v in vocabularies["item"][1:]]
    dataset.verify()


def some_events(num=400, seed=0):
    random = np.random.default_rng(seed)
    return [
        {
            "u": f"user{random.integers(0, 30)}",
            "i": int(random.integers(0, 50)),
            "time": int(random.integers(0, 100)),
            "surface": ["home", "search", None][random.integers(0, 3)],
            "score": float(random.integers(0, 9)),
            "tags": ["x", "y", "z"][: random.integers(0, 4)],
        }
        for _ in range(num)
    ]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_nothing_after_the_cut_leaks_into_training(tmp_path):
    schema = {
        **SCHEMA,
        "fields": {
            **SCHEMA["fields"],
            "bins": {"column": "score", "role": "feedback", "kind": "numeric", "num_quantiles": 4},
        },
    }
    events = some_events()
    changed = [
        e if e["time"] < CUT else {**e, "u": "late" + e["u"], "i": e["i"] * 7 + 1000, "score": 99.0, "surface": "new"}
        for e in events
    ] + [{**events[0], "time": 99, "u": f"newcomer{n}", "i": 7} for n in range(300)]
    made = []
    for name, log in (("a", events), ("b", changed)):
        SCHEMA_BEFORE = dict(SCHEMA)
        SCHEMA.update(schema)
        try:
            made.append(shards_of(tmp_path / name, log, "global_time"))
        finally:
            SCHEMA.update(SCHEMA_BEFORE)
    a, b = (files_below(dataset.path) for dataset in made)
    mine = [
        n for n in a if n.startswith("train/") or n == "items.parquet" or (n.startswith("vocab/") and "user" not in n)
    ]
    assert len(mine) >= 6
    assert all(a[name] == b[name] for name in mine)
    assert sum(n.startswith("train/") for n in b) == sum(n.startswith("train/") for n in a)
    assert made[0].fields == made[1].fields
    assert [s for s in made[0].shards if s.split == "train"] == [s for s in made[1].shards if s.split == "train"]
    assert a["dataset.json"] != b["dataset.json"]  # the change was seen


@pytest.mark.parametrize("rule", list(RULES))
def test_the_bytes_do_not_depend_on_processes_or_buckets(tmp_path, rule, monkeypatch):
    events = some_events()
    one = files_below(shards_of(tmp_path / "one", events, rule).path)
    monkeypatch.setattr("megarec_tools.make_shards.pipeline.EVENTS_PER_BUCKET", 64)
    many = files_below(shards_of(tmp_path / "many", events, rule).path)
    skip = "rejects.parquet"
    assert {n: d for n, d in one.items() if n != skip} == {n: d for n, d in many.items() if n != skip}
    if rule == "leave_last_out":
        config = MakeShardsConfig(
            input=[str(tmp_path / "many" / "0.parquet"), str(tmp_path / "many" / "1.parquet")],
            output=str(tmp_path / "two"),
            schema=str(tmp_path / "many" / "schema.yaml"),
            users_per_block=2,
            blocks_per_shard=2,
            num_processes=2,
        )
        assert files_below(make_shards(config).path) == many


def test_quantiles_of_the_train_events_have_equal_shares(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    random = np.random.default_rng(0)
    values = random.integers(0, 1000, 2000)
    pq.write_table(pa.table({"u": np.arange(2000) % 20, "i": np.arange(2000) % 7, "v": values}), folder / "l.parquet")
    schema = {
        "name": "q",
        "user": "u",
        "item": "i",
        "fields": {"v": {"column": "v", "role": "context", "kind": "numeric", "num_quantiles": 4}},
    }
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    dataset = make_shards(
        MakeShardsConfig(input=str(folder / "l.parquet"), output=str(folder / "d"), schema=str(folder / "schema.yaml"))
    )
    train = np.sort(np.delete(values, np.arange(1980, 2000)))  # the last event of each of the 20 users is its target
    assert dataset.fields["v"].edges == tuple(float(train[j * 1980 // 4]) for j in (1, 2, 3))
    shares = np.bincount(np.concatenate([u["columns"]["v"] for u in read_users(dataset, "train").values()])) / 1980
    assert shares[0] == 0 and np.abs(shares[1:] - 0.25).max() < 0.01
    assert not dataset.has_timestamps
    assert json.loads((dataset.path / "dataset.json").read_text())["has_timestamps"] is False
