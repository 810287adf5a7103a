"""User files beside the log: their values stand in every event of a user, as if the log had them; and what is wrong."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from make_shards.twin import read_users
from megarec_tools.make_shards.config import MakeShardsConfig, SplitConfig
from megarec_tools.make_shards.log import pieces
from megarec_tools.make_shards.pipeline import make_shards

from megarec.base.errors import UserError
from megarec.data.dataset import Dataset, open_dataset
from megarec.data.schema import parse_schema, schema_text
from megarec.inference.requests import RawReader, Request

FIELDS = {
    "gender": {"column": "gender", "role": "context", "kind": "categorical"},
    "age": {"column": "age", "role": "context", "kind": "numeric", "num_quantiles": 4},
    "adult": {"column": "age", "role": "context", "kind": "flag", "at_least": 18},
    "paying": {"column": "paying", "role": "context", "kind": "flag"},
    "home": {"column": "home", "role": "context", "kind": "id"},
    "likes": {"column": "likes", "role": "context", "kind": "categorical", "max_values": 2, "separator": "|"},
}
OF_LOG = {
    "surface": {"column": "surface", "role": "context", "kind": "categorical"},
    "maker": {"column": "maker", "role": "item_side", "kind": "categorical"},
}
WIDE = {"name": "wide", "user": "user", "item": "item", "timestamp": "time", "fields": {**OF_LOG, **FIELDS}}
SCHEMA = {**WIDE, "name": "people", "users": {"user": "id", "fields": list(FIELDS)}}
COLUMNS = ["gender", "age", "paying", "home", "likes"]
RULES = {
    "leave_last_out": {},
    "validation": {"split": SplitConfig(validation_users=3)},
    "filtered": {"min_item_count": 12, "rare_items": "drop", "min_user_events": 9, "duplicates": "drop"},
    "global_time": {"split": SplitConfig(rule="global_time", cut="1250", gap=30)},
    "user_holdout": {"split": SplitConfig(rule="user_holdout", fraction=0.5)},
}


def some_events(num=300, num_users=30, seed=0):
    random = np.random.default_rng(seed)
    users, items, times = (random.integers(0, high, num).tolist() for high in (num_users, 25, num))
    return [
        (u, i, 1000 + t, ["home", "search", ""][(u + i) % 3], f"m{i % 4}")
        for u, i, t in zip(users, items, times, strict=True)
    ]


def some_people(seed=1):
    """Rows of users 1 to 34: some twice, some values missing, user 0 nowhere, users from 30 on not in the log."""
    random = np.random.default_rng(seed)
    rows = []
    for user in [*random.permutation(np.arange(1, 35)).tolist(), *random.integers(1, 35, 12).tolist()]:
        likes = "|".join(np.array(["war", "art", "tea"])[random.permutation(3)[: random.integers(0, 4)]])
        values = [["f", "m", ""], [str(random.integers(9, 80)), ""], ["yes", "0", ""], [str(user % 5), ""], [likes]]
        rows.append((user, *(choice[random.integers(0, len(choice))] for choice in values)))
    return rows


def first_values(rows):
    """The slow twin: of every user and column, the first value there is."""
    people = {}
    for user, *values in rows:
        mine = people.setdefault(user, dict.fromkeys(COLUMNS, ""))
        for column, value in zip(COLUMNS, values, strict=True):
            mine[column] = mine[column] or value
    return people


def write_csv(path: Path, columns, rows):
    text = "".join(",".join(map(str, row)) + "\n" for row in [columns, *rows])
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_all(folder, events, people):
    write_csv(folder / "log.csv", ["user", "item", "time", "surface", "maker"], events)
    write_csv(folder / "people.csv", ["id", *COLUMNS], people)


def make(folder, schema=SCHEMA, *, name="made", log="log.csv", users="people.csv", **options) -> Dataset:
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema, sort_keys=False))
    named = [str(folder / n) for n in users] if isinstance(users, list) else users and str(folder / users)
    config = {
        "input": str(folder / log),
        "users": named,
        "output": str(folder / name),
        "schema": str(folder / "schema.yaml"),
        "num_processes": 1,
        "max_rejects": 0.0,
        "users_per_block": 4,
        "blocks_per_shard": 2,
    }
    return open_dataset(make_shards(MakeShardsConfig(**{**config, **options})).path)


def same_bytes(one: Dataset, other: Dataset) -> bool:
    assert other.shards == one.shards and other.fields == one.fields
    tables = sorted(
        path.relative_to(one.path) for path in one.path.rglob("*.parquet") if path.name != "rejects.parquet"
    )
    assert len(tables) >= 5
    return all((one.path / file).read_bytes() == (other.path / file).read_bytes() for file in tables)


def raw_of(dataset: Dataset, name: str):
    return [None, *pq.read_table(dataset.path / f"vocab/{name}.parquet")["raw"].to_pylist()]


@pytest.mark.parametrize("rule", list(RULES))
def test_all_is_as_if_the_log_had_the_columns(tmp_path, rule):
    events, rows = some_events(), some_people()
    write_all(tmp_path, events, rows)
    made = make(tmp_path, **RULES[rule])
    people, nobody = first_values(rows), dict.fromkeys(COLUMNS, "")
    wide = [(*event, *people.get(event[0], nobody).values()) for event in events]
    write_csv(tmp_path / "wide.csv", ["user", "item", "time", "surface", "maker", *COLUMNS], wide)
    twin = make(tmp_path, WIDE, name="twin", log="wide.csv", users="", **RULES[rule])
    assert same_bytes(made, twin)
    about_users = ("user_rows", "users_undescribed", "user_conflicts")
    assert {k: v for k, v in made.counts.items() if k not in about_users} == {
        k: v for k, v in twin.counts.items() if k not in about_users
    }
    known = set(raw_of(made, "user")[1:])
    several = {u: [{row[k] for row in rows if row[0] == u and row[k]} for k in range(1, 6)] for u in known}
    expected = {
        "user_rows": len(rows),
        "users_undescribed": len(known - set(people)),
        "user_conflicts": sum(len(values) > 1 for columns in several.values() for values in [*columns, columns[1]]),
    }
    assert {name: made.counts[name] for name in about_users} == expected
    assert expected["user_conflicts"] > 0 and (0 in known) == expected["users_undescribed"]


def test_the_bytes_do_not_depend_on_pieces_processes_or_buckets(tmp_path, monkeypatch):
    write_all(tmp_path, some_events(), some_people())
    one = make(tmp_path)
    two = make(tmp_path, name="two", num_processes=2)
    assert same_bytes(one, two) and one.counts == two.counts
    monkeypatch.setattr("megarec_tools.make_shards.pipeline.EVENTS_PER_BUCKET", 16)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 200)
    many = make(tmp_path, name="many", num_processes=2)
    assert same_bytes(one, many) and one.counts == many.counts


def small(folder, people="id,gender,age\nann,f,30\nbob,m,\neve,x,99\n", name="people.csv"):
    events = [(user, n % 3, n) for n, user in enumerate(["ann", "bob", "cy", "ann", "bob", "cy", "ann"])]
    write_csv(folder / "log.csv", ["user", "item", "time"], events)
    (folder / name).write_text(people)
    fields = {name: FIELDS[name] for name in ("gender", "adult")}
    return {**WIDE, "fields": fields, "users": {"user": "id", "fields": list(fields)}}


def columns_by_user(dataset: Dataset, split="train"):
    users, found = pq.read_table(dataset.path / "vocab/user.parquet")["raw"].to_pylist(), {}
    for number, user in read_users(dataset, split).items():
        found[users[number]] = user["columns"], user.get("targets")
    return found


def test_a_user_without_a_row_is_unknown_and_counted(tmp_path, capsys):
    made = make(tmp_path, small(tmp_path))
    assert [info.role for info in made.fields.values()] == ["item", "context", "context"]
    assert raw_of(made, "gender") == [None, "f", "m"]  # that of eve, who has no event, is in no vocabulary
    train, asked = columns_by_user(made), columns_by_user(made, "eval")
    for user, gender, adult in (("ann", 1, 2), ("bob", 2, 0), ("cy", 0, 0)):
        columns = train[user][0]
        assert set(columns["gender"]) == {gender} and set(columns["adult"]) == {adult}
        assert (asked[user][1]["gender"], asked[user][1]["adult"]) == ([gender], [adult])
    counts = pq.read_table(made.path / "vocab/gender.parquet").to_pylist()
    assert [(row["raw"], row["count"]) for row in counts] == [("f", 2), ("m", 1)]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in printed if line.startswith("users that no user file describes ")] == ["1"]
    assert [line.split()[-1] for line in printed if line.startswith("rows of user files read ")] == ["3"]


def test_of_several_rows_of_a_user_the_first_value_counts(tmp_path):
    people = "id,gender,age\nann,,12\nbob,m,20\nann,f,40\nann,g,12\nbob,m,20\neve,a,1\neve,b,1\n"
    made = make(tmp_path, small(tmp_path, people))
    train = columns_by_user(made)
    genders = raw_of(made, "gender")
    assert {genders[g] for g in train["ann"][0]["gender"]} == {"f"} and set(train["ann"][0]["adult"]) == {1}
    assert {genders[g] for g in train["bob"][0]["gender"]} == {"m"}
    assert made.counts["user_conflicts"] == 2 and made.counts["users_undescribed"] == 1  # both of ann's fields


@pytest.mark.parametrize("suffix", ["csv.gz", "jsonl", "parquet"])
def test_several_files_with_other_columns(tmp_path, suffix):
    rows = some_people()
    write_all(tmp_path, some_events(), rows)
    one = make(tmp_path)
    half = len(rows) // 2
    names = []
    for number, (part, columns) in enumerate(((rows[:half], COLUMNS), (rows[half:], COLUMNS), (rows, ["gender"]))):
        names.append(f"{number}.{suffix}")
        table = [dict(zip(["id", *COLUMNS], row, strict=True)) for row in part]
        table = [{key: row[key] for key in ["id", *columns]} for row in table]
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(table), tmp_path / names[-1], row_group_size=5)
        elif suffix == "jsonl":
            table = [{key: v.split("|") if key == "likes" else v for key, v in row.items()} for row in table]
            (tmp_path / names[-1]).write_text("".join(json.dumps(row) + "\n" for row in table))
        else:
            write_csv(tmp_path / names[-1], ["id", *columns], [row.values() for row in table])
    several = make(tmp_path, users=names, name="several")
    assert same_bytes(one, several) and several.counts["user_rows"] == 2 * len(rows)
    few = make(tmp_path, users=names[2:], name="few")
    assert list(few.fields) == ["item", "surface", "maker", "gender"] and few.counts["absent_user_fields"] == 5
    assert few.schema.users is not None and few.schema.users.fields == ("gender",)
    assert columns_by_user(few)[5][0]["gender"] == columns_by_user(one)[5][0]["gender"]


def test_without_user_files_their_fields_come_from_an_optional_column_or_are_absent(tmp_path, capsys):
    schema = small(tmp_path)
    made = make(tmp_path, schema, users="")
    assert list(made.fields) == ["item"] and made.schema.users is None and made.counts["absent_user_fields"] == 2
    assert "user fields left out: in no file" in capsys.readouterr().out
    write_csv(tmp_path / "log.csv", ["user", "item", "time", "gender"], [("ann", n, n, "fgh"[n % 3]) for n in range(6)])
    schema = {**schema, "optional_columns": ["gender"]}
    made = make(tmp_path, schema, users="", name="from_log")
    assert list(made.fields) == ["item", "gender"] and set(raw_of(made, "gender")[1:]) == {"f", "g", "h"}
    made = make(tmp_path, schema, name="from_file")
    assert list(made.fields) == ["item", "gender", "adult"] and raw_of(made, "gender")[1:] == ["f"]


def test_item_and_user_files_together(tmp_path):
    write_all(tmp_path, some_events(), some_people())
    write_csv(tmp_path / "items.csv", ["item", "maker"], [(item, f"m{item % 4}") for item in range(25)])
    schema = {**SCHEMA, "items": {"item": "item", "fields": ["maker"]}}
    made, alone = make(tmp_path, schema, items=str(tmp_path / "items.csv")), make(tmp_path, name="alone")
    assert same_bytes(alone, made) and made.counts["item_rows"] == 25


def test_ids_of_users_are_text_or_integers_as_in_the_log(tmp_path):
    big = 2**63
    schema = small(tmp_path)
    write_csv(tmp_path / "log.csv", ["user", "item", "time"], [(big + n % 3, n % 4, n) for n in range(20)])
    pq.write_table(
        pa.table({"id": pa.array([big, big + 2], pa.uint64()), "gender": ["f", "m"]}), tmp_path / "p.parquet"
    )
    made = make(tmp_path, schema, users="p.parquet")
    genders = {user: set(columns["gender"]) for user, (columns, _) in columns_by_user(made).items()}
    assert genders == {big: {1}, big + 1: {0}, big + 2: {2}}
    write_csv(tmp_path / "log.csv", ["user", "item", "time"], [(f"0{n % 3}", n % 4, n) for n in range(20)])
    (tmp_path / "p.csv").write_text("id,gender\n00,f\n2,m\n02,m\n")
    made = make(tmp_path, schema, users="p.csv", name="text")
    assert made.counts["users_undescribed"] == 1 and raw_of(made, "gender")[1:] == ["f", "m"]
    write_csv(tmp_path / "log.csv", ["user", "item", "time"], [(n % 3, n % 4, n) for n in range(20)])
    pq.write_table(pa.table({"id": pa.array([big], pa.uint64()), "gender": ["f"]}), tmp_path / "p.parquet")
    (tmp_path / "p.csv").write_text("id,gender\n-1,f\n")
    with pytest.raises(UserError, match="'user' has ids below 0 and ids of 2"):
        make(tmp_path, schema, users=["p.parquet", "p.csv"], name="signs")


def test_nothing_of_users_after_the_cut_is_learned(tmp_path):
    late = next(user for user, _, time, *_ in some_events() if user and time >= 1250)
    events = [e for e in some_events() if e[0] != late or e[2] >= 1250]
    rows = [(user, "late" if user == late else gender, *rest) for user, gender, *rest in some_people()]
    write_all(tmp_path, events, rows)
    made = make(tmp_path, **RULES["global_time"])
    assert "late" not in raw_of(made, "gender")
    assert "late" in raw_of(make(tmp_path, name="last"), "gender")
    columns, targets = columns_by_user(made, "eval")[late]
    assert not columns["item"] and targets["item"] and set(targets["gender"]) == {0}


def test_bad_rows_of_user_files_are_rejects(tmp_path):
    write_all(tmp_path, some_events(), some_people())
    good = (tmp_path / "people.csv").read_text()
    bad = "seven,f,1,yes,1,\n,f,1,yes,1,\n7,f,old,yes,1,\n7,f,1,perhaps,1,\n7,f\n"
    (tmp_path / "people.csv").write_text(good + bad)
    with pytest.raises(UserError, match=r"5 of 51 rows cannot be used .*First: row 47 of .*people.csv, .*'seven'"):
        make(tmp_path)
    made = make(tmp_path, max_rejects=0.3)
    assert made.counts["user_rows_rejected"] == 5 and made.counts["rows_rejected"] == 0
    rejects = pq.read_table(made.path / "rejects.parquet").to_pylist()
    assert {row["file"] for row in rejects} == {str(tmp_path / "people.csv")}
    assert {row["row"]: row["reason"] for row in rejects} == {
        47: "'id' is not an integer",
        48: "no id in 'id'",
        49: "'age' is not a number",
        50: "'paying' is neither true nor false",
        51: "the line has another number of values than the header",
    }
    (tmp_path / "people.csv").write_text(good)
    assert same_bytes(made, make(tmp_path, name="good"))


def test_mistakes_are_named(tmp_path):
    schema = small(tmp_path)
    with pytest.raises(UserError, match=r"users: .*does not say how to read user files.*section 'users'"):
        make(tmp_path, {key: value for key, value in schema.items() if key != "users"})
    with pytest.raises(UserError, match="no column 'id'"):
        make(tmp_path, schema, users="log.csv")
    with pytest.raises(UserError, match=r"none of the columns gender, age.*describe users"):
        make(tmp_path, {**schema, "users": {**schema["users"], "user": "user"}}, users="log.csv")
    with pytest.raises(UserError, match="named twice"):
        make(tmp_path, schema, users=["people.csv", "people.csv"])
    with pytest.raises(UserError, match="no such file"):
        make(tmp_path, schema, users="absent*.csv")
    with pytest.raises(UserError, match=r"users\.fields names 'age', which is no context field"):
        make(tmp_path, {**schema, "users": {"user": "id", "fields": ["age"]}})
    for name in ("time", "hash"):
        with pytest.raises(UserError, match=f"the field name '{name}' is taken"):
            make(tmp_path, {**schema, "fields": {name: FIELDS["gender"]}, "users": {"user": "id", "fields": [name]}})
    feedback = {"gender": {**FIELDS["gender"], "role": "feedback"}}
    with pytest.raises(UserError, match=r"users\.fields names 'gender', which is no context field"):
        make(tmp_path, {**schema, "fields": feedback, "users": {"user": "id", "fields": ["gender"]}})
    for text, message in (("id,gender,age\n", "the log has no rows"), ("", "the log has no header line")):
        (tmp_path / "empty.csv").write_text(text)
        with pytest.raises(UserError, match=f"empty.csv: {message}"):
            make(tmp_path, schema, users="empty.csv")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["row", "draw", "key", "raw", "start", "slot0", "len"])
def test_other_names_of_fields_are_free(tmp_path, name):
    schema = {**small(tmp_path), "fields": {name: FIELDS["gender"]}, "users": {"user": "id", "fields": [name]}}
    assert raw_of(make(tmp_path, schema, equal_times="shuffle"), name) == [None, "f", "m"]


def test_the_schema_goes_to_text_and_back(tmp_path):
    schema = parse_schema(yaml.safe_dump(SCHEMA), where="here")
    assert parse_schema(schema_text(schema), where="there") == schema
    write_all(tmp_path, some_events(), some_people())
    assert make(tmp_path).schema == schema


def test_a_request_gives_the_users_columns_once(tmp_path):
    made = make(tmp_path, small(tmp_path))
    reader = RawReader(made)
    events = [{"item": 0, "timestamp": 1}, {"item": 1, "timestamp": 2, "gender": "m"}]
    histories = reader.read([Request(events=events, context={"gender": "f", "age": 12})])
    assert histories.fields["gender"].tolist() == [1, 2] and histories.fields["adult"].tolist() == [1, 1]
    assert histories.query_fields["gender"].tolist() == [1] and not reader.ignored
