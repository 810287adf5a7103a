"""What tests of publishers' layouts share: small logs, datasets of them, and what must be in these."""

from collections import defaultdict

import numpy as np
import pyarrow.parquet as pq
from make_shards.twin import read_users
from megarec_tools.make_shards.config import MakeShardsConfig
from megarec_tools.make_shards.pipeline import make_shards

from megarec.data.dataset import Dataset, open_dataset

START = 978_300_000


def make(folder, schema, log, *, items="", users="", name="made", **options) -> Dataset:
    def below(names):
        return [str(folder / n) for n in names] if isinstance(names, list) else names and str(folder / names)

    config = {"input": below(log), "items": below(items), "users": below(users), "schema": schema}
    config["output"] = str(folder / name)
    return open_dataset(make_shards(MakeShardsConfig(**config, num_processes=1, **options)).path)


def ratings(num_users=8, num_items=12, seed=0, scale=1):
    """(user, item, rating, time), in an order of its own; no user has two events at a time."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(1, num_users + 1):
        times = random.permutation(200)
        for n, item in enumerate(random.permutation(num_items)[: random.integers(3, num_items)].tolist()):
            rows.append((user, item + 1, int(random.integers(1, 6)), (START + int(times[n])) * scale))
    return [rows[n] for n in random.permutation(len(rows))]


def raw_of(dataset, field):
    return [None, *pq.read_table(dataset.path / f"vocab/{field}.parquet")["raw"].to_pylist()]


def histories(dataset):
    """By the user's own id: the whole history, (item, time, fields by name), its target last."""
    users = pq.read_table(dataset.path / "vocab/user.parquet")["raw"].to_pylist()
    raw = {"item": dataset.item_raw()}
    for name, info in dataset.fields.items():
        if info.role in ("context", "feedback") and info.kind in ("id", "categorical"):
            raw[name] = raw_of(dataset, name)
    found = {}
    train, asked = read_users(dataset, "train"), read_users(dataset, "eval")
    for number in train | asked:
        parts = [train.get(number, {}).get("columns"), asked.get(number, {}).get("targets")]
        columns = defaultdict(list)
        for part in parts:
            for name, values in (part or {}).items():
                columns[name] += [raw[name][v] for v in values] if name in raw else values
        found[users[number]] = dict(columns)
    return found


def expected(rows, *, user=lambda u: u, item=lambda i: i, time=lambda t: t):
    by_user = defaultdict(list)
    for u, i, rating, t in sorted(rows, key=lambda row: row[3]):
        by_user[user(u)].append((item(i), rating, time(t)))
    return by_user


def check_ratings(dataset, rows, *, text=str, **maps):
    wanted = expected(rows, **maps)
    found = histories(dataset)
    assert set(found) == set(wanted)
    for user, events in wanted.items():
        assert found[user]["item"] == [item for item, _, _ in events]
        assert found[user]["timestamp"] == [time for _, _, time in events]
        assert found[user]["liked"] == [1 + (rating >= 4) for _, rating, _ in events]
        assert [str(value) for value in found[user]["rating"]] == [text(rating) for _, rating, _ in events]


def some_people(users):
    """What MovieLens says of all `users` but the first."""
    jobs, codes = ["writer", "other", "none"], ["48067", "02460-1234", "T8H1N"]
    return {
        user: {"gender": "FM"[n % 2], "age": str(17 + n * 6), "occupation": jobs[n % 3], "zip_code": codes[n // 3]}
        for n, user in enumerate(sorted(users)[1:])
    }


def check_people(dataset, people, *, num_absent=0):
    """What user files say stands in every event of a user, and nothing in those of the user they lack."""
    found, fields = histories(dataset), list(next(iter(people.values())))
    assert {name for name, info in dataset.fields.items() if info.role == "context"} >= set(fields)
    assert dataset.counts["user_rows"] == len(people) and dataset.counts["users_undescribed"] == 1
    assert (dataset.counts["user_rows_rejected"], dataset.counts["absent_user_fields"]) == (0, num_absent)
    for user, columns in found.items():
        for name in fields:
            nothing = 0 if dataset.fields[name].kind == "numeric" else None
            assert set(columns[name]) == {people[user][name] if user in people else nothing}


def side_of(dataset, field):
    """The raw values of an item-side vocabulary field, by raw item."""
    names, ids = raw_of(dataset, field), dataset.item_side()[field]
    rows = ids.reshape(len(ids), -1).tolist()
    return {
        raw: [names[i] for i in row if i > 0]
        for raw, row in zip(dataset.item_raw(), rows, strict=True)
        if raw is not None
    }
