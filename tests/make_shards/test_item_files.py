"""Item files beside the log: who is in the catalog, what each item is, and what is wrong with a file."""

import json
from collections import Counter

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

FIELDS = {
    "tags": {"column": "tags", "role": "item_side", "kind": "categorical", "max_values": 2, "separator": "|"},
    "price": {"column": "price", "role": "item_side", "kind": "numeric", "num_quantiles": 3},
    "new": {"column": "new", "role": "item_side", "kind": "flag"},
}
SCHEMA = {
    "name": "shop",
    "user": "user",
    "item": "item",
    "timestamp": "time",
    "fields": FIELDS,
    "items": {"item": "id", "fields": list(FIELDS), "extends_catalog": True},
}


def events(num=200, seed=0):
    random = np.random.default_rng(seed)
    return [(int(u), int(i), 1000 + n) for n, (u, i) in enumerate(random.integers(0, 12, (num, 2)).tolist())]


def write_log(path, rows):
    path.write_text("user,item,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    return path


def make(folder, schema=SCHEMA, *, name="made", **options) -> Dataset:
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    config = {
        "input": str(folder / "log.csv"),
        "items": str(folder / "items.csv"),
        "output": str(folder / name),
        "schema": str(folder / "schema.yaml"),
        "num_processes": 1,
        "max_rejects": 0.0,
    }
    return open_dataset(make_shards(MakeShardsConfig(**{**config, **options})).path)


def train_counts(rows):
    """Train events of each item when the last event of every user is its target; `rows` are in the order of time."""
    last = {user: n for n, (user, _, _) in enumerate(rows)}
    several = {user for user, times in Counter(user for user, _, _ in rows).items() if times > 1}
    return Counter(item for n, (user, item, _) in enumerate(rows) if n != last[user] or user not in several)


def shop(folder, num_items=20):
    """An item file with items that the log lacks, and a log with one item that the file lacks."""
    rows = [*events(), (3, 77, 900)]
    write_log(folder / "log.csv", sorted(rows, key=lambda row: row[2]))
    items = {
        n: (["red|big|new", "big", "", "red"][n % 4], f"{n}.5" if n % 5 else "", ["yes", "no"][n % 2])
        for n in range(num_items - 1, -1, -1)
    }
    lines = "".join(f"{n},{tags},{price},{new}\n" for n, (tags, price, new) in items.items())
    (folder / "items.csv").write_text("id,tags,price,new\n" + lines)
    return sorted(rows, key=lambda row: row[2]), items


def test_every_item_of_the_file_is_in_the_catalog_and_described(tmp_path):
    rows, items = shop(tmp_path)
    made = make(tmp_path)
    counts = train_counts(rows)
    known = {item for _, item, _ in rows}
    expected = sorted({*items, *known}, key=lambda item: (-counts[item], item))
    assert made.item_raw() == [None, *expected]
    assert made.item_counts().tolist() == [0, *(counts[item] for item in expected)]
    assert made.counts["items_added"] == len(set(items) - known) > 0
    assert made.counts["items_undescribed"] == 1 and made.counts["item_rows"] == len(items)
    table = pq.read_table(made.path / "items.parquet").to_pylist()
    first = {}
    for _, item, time in rows:
        first.setdefault(item, time)
    assert [row["first_seen"] for row in table] == [first.get(item) for item in expected]
    side = made.item_side()
    tags = [None, *pq.read_table(made.path / "vocab/tags.parquet")["raw"].to_pylist()]
    prices = {item: float(price) for item, (_, price, _) in items.items() if price}
    train = sorted(price for item, price in prices.items() for _ in range(counts[item]))
    edges = [train[len(train) * j // 3] for j in (1, 2)]
    assert made.fields["price"].edges == tuple(edges)
    for number, item in enumerate(expected, start=1):
        text, _, new = items.get(item, ("", "", None))
        assert [tags[i] for i in side["tags"][number] if i > 0] == [t for t in text.split("|")[:2] if t]
        assert side["new"][number] == {None: 0, "no": 1, "yes": 2}[new]
        price = prices.get(item)
        assert side["price"][number] == (0 if price is None else 1 + sum(edge <= price for edge in edges))
    of_tags = Counter()
    for item, (text, _, _) in items.items():
        of_tags.update({tag: counts[item] for tag in text.split("|")[:2] if tag})
    vocabulary = pq.read_table(made.path / "vocab/tags.parquet").to_pylist()
    assert {row["raw"]: row["count"] for row in vocabulary} == dict(of_tags)
    assert [row["raw"] for row in vocabulary] == sorted(of_tags, key=lambda tag: (-of_tags[tag], tag))


def test_a_file_that_does_not_extend_the_catalog_only_describes(tmp_path):
    rows, _ = shop(tmp_path)
    schema = {**SCHEMA, "items": {**SCHEMA["items"], "extends_catalog": False}}
    made, extended = make(tmp_path, schema), make(tmp_path, name="extended")
    known = {item for _, item, _ in rows}
    assert set(made.item_raw()[1:]) == known and made.counts["items_added"] == 0
    assert made.item_raw() == extended.item_raw()[: len(known) + 1]
    for name in ("price", "new"):
        assert made.item_side()[name].tolist() == extended.item_side()[name][: len(known) + 1].tolist()
    assert [s.sha256 for s in made.shards] == [s.sha256 for s in extended.shards]
    rare = make(tmp_path, name="rare", min_item_count=5)
    assert rare.counts["items_added"] == 0 and 77 not in rare.item_raw()


def test_the_bytes_do_not_depend_on_pieces_or_processes(tmp_path, monkeypatch):
    shop(tmp_path, num_items=400)
    one = make(tmp_path)
    two = make(tmp_path, name="two", num_processes=2)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 300)
    many = make(tmp_path, name="many")
    for other in (two, many):
        for file in sorted(path.relative_to(one.path) for path in one.path.rglob("*.parquet")):
            if file.name != "rejects.parquet":
                assert (one.path / file).read_bytes() == (other.path / file).read_bytes(), file
        assert other.shards == one.shards and other.counts == one.counts


MAPS = {
    "name": "maps",
    "user": "user",
    "item": "item",
    "timestamp": "time",
    "fields": {
        "artist": {"column": "artist_id", "role": "item_side", "kind": "id"},
        "album": {"column": "album_id", "role": "item_side", "kind": "id"},
    },
    "items": {"item": "item_id", "fields": ["artist", "album"]},
}


def test_several_item_files_with_other_columns(tmp_path):
    rows = [(u, i, t) for u, i, t in events() if i != 11]
    write_log(tmp_path / "log.csv", rows)
    ids = np.arange(40, dtype=np.uint32)[::-1]
    pq.write_table(pa.table({"artist_id": ids // 3, "item_id": ids}), tmp_path / "artists.parquet", row_group_size=7)
    twice = np.concatenate([ids, [3, 3]]).astype(np.uint32)  # item 3 is on three albums; its first row counts
    albums = np.concatenate([ids.astype(np.uint64) // 2 + 2**40, [5, 9]]).astype(np.uint64)
    pq.write_table(pa.table({"item_id": twice, "album_id": albums}), tmp_path / "albums.parquet")
    files = [str(tmp_path / "artists.parquet"), str(tmp_path / "albums.parquet")]
    made = make(tmp_path, MAPS, items=files)
    values = {}
    for name in ("artist", "album"):
        raw = [None, *pq.read_table(made.path / f"vocab/{name}.parquet")["raw"].to_pylist()]
        values[name] = [raw[i] for i in made.item_side()[name]]
    assert values["artist"] == [None, *(item // 3 for item in made.item_raw()[1:])]
    assert values["album"] == [None, *(item // 2 + 2**40 for item in made.item_raw()[1:])]
    assert made.counts["item_side_conflicts"] == 1 and made.counts["absent_fields"] == 0
    assert made.fields["artist"].num_ids == 1 + len({item // 3 for item in range(11)})  # none of an unknown item
    one = make(tmp_path, MAPS, items=files[0], name="one")
    assert list(one.fields) == ["item", "artist"] and one.counts["absent_fields"] == 1
    assert one.item_side()["artist"].tolist() == made.item_side()["artist"].tolist()


def test_without_item_files_their_fields_come_from_an_optional_column_or_are_absent(tmp_path, capsys):
    write_log(tmp_path / "log.csv", events())
    made = make(tmp_path, MAPS, items="")
    assert list(made.fields) == ["item"] and made.schema.items is None
    assert "item-side fields left out: in no file" in capsys.readouterr().out and made.counts["absent_fields"] == 2
    lines = "".join(f"{u},{i},{t},{i // 3},{i // 2}\n" for u, i, t in events())
    (tmp_path / "log.csv").write_text("user,item,time,artist_id,album_id\n" + lines)
    maps = {**MAPS, "optional_columns": ["artist_id"]}
    made = make(tmp_path, maps, items="", name="from_log")
    assert list(made.fields) == ["item", "artist"] and made.counts["absent_fields"] == 1
    pq.write_table(pa.table({"item_id": np.arange(12), "artist_id": np.arange(12) + 50}), tmp_path / "a.parquet")
    made = make(tmp_path, maps, items=str(tmp_path / "a.parquet"), name="from_file")
    assert set(pq.read_table(made.path / "vocab/artist.parquet")["raw"].to_pylist()) == set(range(50, 62))


def test_ids_are_text_or_integers_as_in_the_log(tmp_path):
    (tmp_path / "log.csv").write_text("user,item,time\n" + "".join(f"{n % 3},{2**63 + n % 5},{n}\n" for n in range(30)))
    rows = [{"id": 2**63 + n, "tags": ["a", "b"]} for n in range(7)] + [{"id": str(2**63 + 8), "tags": "a|c"}]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    schema = {
        **SCHEMA,
        "fields": {"tags": FIELDS["tags"]},
        "items": {"item": "id", "fields": ["tags"], "extends_catalog": True},
    }
    made = make(tmp_path, schema, items=str(tmp_path / "items.jsonl"))
    assert sorted(made.item_raw()[1:]) == [2**63 + n for n in (0, 1, 2, 3, 4, 5, 6, 8)]
    (tmp_path / "log.csv").write_text("user,item,time\n" + "".join(f"{n % 3},B{n % 5},{n}\n" for n in range(30)))
    pq.write_table(pa.table({"id": [1, 2], "tags": ["x", "y"]}), tmp_path / "numbers.parquet")
    made = make(tmp_path, schema, items=str(tmp_path / "numbers.parquet"), name="text")
    assert made.item_raw()[-2:] == ["1", "2"]


def test_nothing_after_the_cut_counts_and_the_file_still_names_the_item(tmp_path):
    rows = [(u, i, t) for u, i, t in events() if i != 5 or t > 1150]
    write_log(tmp_path / "log.csv", rows)
    (tmp_path / "items.csv").write_text("id,tags,price,new\n5,late,1,yes\n99,never,2,no\n")
    split = SplitConfig(rule="global_time", cut="1150")
    made = make(tmp_path, split=split)
    raw = made.item_raw()
    assert raw[-2:] == [5, 99] and made.counts["items_added"] == 2
    late = pq.read_table(made.path / "items.parquet").to_pylist()[-2]
    assert (late["count"], late["first_seen"], late["last_seen"]) == (0, None, None)
    targets = [raw[i] for user in read_users(made, "eval").values() for i in user["targets"]["item"]]
    assert sorted(targets) == sorted(i for _, i, t in rows if t >= 1150)
    assert made.counts["targets_unseen"] == sum(i == 5 for _, i, _ in rows)


def test_bad_rows_of_item_files_are_rejects(tmp_path):
    shop(tmp_path)
    good = (tmp_path / "items.csv").read_text()
    bad = "seven,red,1,yes\n,red,1,yes\n7,red,cheap,yes\n7,red,1,perhaps\n7,red\n"
    (tmp_path / "items.csv").write_text(good + bad)
    with pytest.raises(UserError, match=r"5 of 25 rows cannot be used .*First: row 21 of .*items.csv, .*'seven'"):
        make(tmp_path)
    made = make(tmp_path, max_rejects=0.3)
    assert made.counts["item_rows_rejected"] == 5 and made.counts["rows_rejected"] == 0
    rejects = pq.read_table(made.path / "rejects.parquet").to_pylist()
    assert {row["file"] for row in rejects} == {str(tmp_path / "items.csv")}
    assert {row["row"]: row["reason"] for row in rejects} == {
        21: "'id' is not an integer",
        22: "no id in 'id'",
        23: "'price' is not a number",
        24: "'new' is neither true nor false",
        25: "the line has another number of values than the header",
    }


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_the_encoding_is_the_schemas_and_a_wrong_one_is_loud(tmp_path, suffix):
    write_log(tmp_path / "log.csv", events())
    titles = {n: f"Amélie, teil {n}" if n % 2 else "plain" for n in range(12)}
    if suffix == "csv":
        text = "id,title\n" + "".join(f'{n},"{title}"\n' for n, title in titles.items())
    else:
        text = "".join(json.dumps({"id": n, "title": t}, ensure_ascii=False) + "\n" for n, t in titles.items())
    fields = {"title": {"column": "title", "role": "item_side", "kind": "categorical"}}
    schema = {**SCHEMA, "fields": fields, "items": {"item": "id", "fields": ["title"]}}
    latin = {**schema, "items": {**schema["items"], "encoding": "latin-1"}}
    file = tmp_path / f"items.{suffix}"
    file.write_bytes(text.encode("latin-1"))
    made = make(tmp_path, latin, items=str(file))
    assert set(pq.read_table(made.path / "vocab/title.parquet")["raw"].to_pylist()) == set(titles.values())
    with pytest.raises(UserError, match="6 x 'title' is not UTF-8 text"):
        make(tmp_path, schema, items=str(file), name="b")
    file.write_text(text)
    with pytest.raises(UserError, match=r"the schema says latin-1, but the text is UTF-8.*encoding"):
        make(tmp_path, latin, items=str(file), name="c")
    again = make(tmp_path, schema, items=str(file), name="d")
    assert again.item_side()["title"].tolist() == made.item_side()["title"].tolist()


def test_mistakes_are_named(tmp_path):
    shop(tmp_path)
    plain = {key: value for key, value in SCHEMA.items() if key not in ("items", "fields")}
    with pytest.raises(UserError, match="does not say how to read item files"):
        make(tmp_path, plain)
    with pytest.raises(UserError, match="no column 'id'"):
        make(tmp_path, items=str(tmp_path / "log.csv"))
    with pytest.raises(UserError, match="none of the columns artist_id, album_id"):
        make(tmp_path, {**MAPS, "items": {**MAPS["items"], "item": "id"}})
    with pytest.raises(UserError, match="named twice"):
        make(tmp_path, items=[str(tmp_path / "items.csv")] * 2)
    with pytest.raises(UserError, match="no such file"):
        make(tmp_path, items=str(tmp_path / "absent*.csv"))
    with pytest.raises(UserError, match="'tagz', which is no item-side field"):
        make(tmp_path, {**SCHEMA, "items": {"item": "id", "fields": ["tagz"]}})
    assert not (tmp_path / "made").exists()
