"""Yambda, flat and with a user's events as lists in one row, and sequences of items: a user a line."""

import gzip
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_shards.publications import histories, make, side_of
from megarec_tools.make_shards.log import pieces
from megarec_tools.make_shards.log.files import find_files

from megarec.base.errors import UserError
from megarec.data.schema import load_schema


def yambda_events(num_users=9, seed=3):
    random = np.random.default_rng(seed)
    events = []
    for user in range(num_users):
        time = 0
        for _ in range(int(random.integers(2, 60))):
            time += int(random.integers(1, 50)) * 5
            kind = ["listen", "listen", "like", "unlike", "dislike"][random.integers(0, 5)]
            listen = kind == "listen"
            events.append(
                {
                    "uid": user * 100,
                    "timestamp": time,
                    "item_id": int(random.integers(0, 40)),
                    "is_organic": int(random.integers(0, 2)),
                    "event_type": kind,
                    "played_ratio_pct": int(random.integers(0, 120)) if listen else None,
                    "track_length_seconds": 180 if listen else None,
                }
            )
    return events


TYPES = {
    "uid": pa.uint32(),
    "timestamp": pa.uint32(),
    "item_id": pa.uint32(),
    "is_organic": pa.uint8(),
    "event_type": pa.string(),
    "played_ratio_pct": pa.uint16(),
    "track_length_seconds": pa.uint32(),
}


def write_flat(path, events, columns, **options):
    pq.write_table(pa.table({c: pa.array([e[c] for e in events], TYPES[c]) for c in columns}), path, **options)


def write_sequential(path, events, columns, **options):
    users = defaultdict(list)
    for event in events:
        users[event["uid"]].append(event)
    table = {"uid": pa.array(list(users), TYPES["uid"])}
    for c in columns:
        if c != "uid":
            table[c] = pa.array([[e[c] for e in mine] for mine in users.values()], pa.list_(TYPES[c]))
    pq.write_table(pa.table(table), path, **options)


def same_shards(a, b):
    return [s.sha256 for s in a.shards] == [s.sha256 for s in b.shards] and a.item_raw() == b.item_raw()


LISTENS = [c for c in TYPES if c != "event_type"]
LIKES = ["uid", "timestamp", "item_id", "is_organic"]


@pytest.mark.parametrize("schema", ["yambda_50m", "yambda_5b", "yambda_events"])
def test_yambda_flat_and_sequential_are_the_same(tmp_path, schema, monkeypatch):
    events = yambda_events()
    write_flat(tmp_path / "multi_event.parquet", events, list(TYPES), row_group_size=50)
    write_sequential(tmp_path / "sequential.parquet", events, list(TYPES), row_group_size=4)
    flat = make(tmp_path, schema, "multi_event.parquet", name="flat")
    monkeypatch.setattr(pieces, "PIECE_ROWS", 40)  # row groups hold more than a piece
    sequential = make(tmp_path, schema, "sequential.parquet", name="sequential")
    assert same_shards(flat, sequential) and flat.counts == sequential.counts
    assert flat.counts["rows"] == len(events)
    listens = [e for e in events if e["event_type"] == "listen" or schema == "yambda_events"]
    assert flat.counts["events"] == len(listens)
    for user, found in histories(flat).items():
        mine = [e for e in listens if e["uid"] == user]
        assert found["item"] == [e["item_id"] for e in mine]
        assert found["timestamp"] == [e["timestamp"] for e in mine]
        ratios = [e["played_ratio_pct"] for e in mine]
        assert found["listened"] == [0 if ratio is None else 1 + (ratio >= 50) for ratio in ratios]
        if schema == "yambda_events":
            assert found["event_type"] == [e["event_type"] for e in mine]


def test_yambda_listens_likes_and_maps(tmp_path):
    events = yambda_events()
    items = np.arange(60, dtype=np.uint32)
    pq.write_table(pa.table({"artist_id": items // 3, "item_id": items}), tmp_path / "artist_item_mapping.parquet")
    pq.write_table(pa.table({"album_id": items // 2, "item_id": items}), tmp_path / "album_item_mapping.parquet")
    maps = ["artist_item_mapping.parquet", "album_item_mapping.parquet"]
    for kind, columns in (("listen", LISTENS), ("like", LIKES)):
        mine = [e for e in events if e["event_type"] == kind]
        for write in (write_flat, write_sequential):
            write(tmp_path / f"{kind}s.parquet", mine, columns)
            made = make(tmp_path, "yambda_500m", f"{kind}s.parquet", items=maps, name=f"{kind}_{write.__name__}")
            assert made.counts["events"] == made.counts["rows"] == len(mine)
            assert set(made.item_raw()[1:]) == {e["item_id"] for e in mine}
            assert side_of(made, "artist_id") == {item: [item // 3] for item in made.item_raw()[1:]}
            assert side_of(made, "album_id") == {item: [item // 2] for item in made.item_raw()[1:]}
            assert ("played_ratio_pct" in made.fields) == (kind == "listen")


def test_a_row_group_of_lists_is_never_in_memory_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_ROWS", 20_000)
    monkeypatch.setattr(pieces, "READ_BYTES", 1 << 16)
    num_users, num_events = 1000, 1000
    offsets = pa.array((np.arange(num_users + 1) * num_events).astype(np.int32))
    values = np.random.default_rng(0).integers(0, 2**32, (2, num_users * num_events), dtype=np.uint32)
    table = {"uid": pa.array(np.arange(num_users, dtype=np.uint32))}
    for name, column in zip(("item_id", "timestamp"), values, strict=True):
        table[name] = pa.ListArray.from_arrays(offsets, pa.array(column))
    pq.write_table(pa.table(table), tmp_path / "likes.parquet", row_group_size=num_users, use_dictionary=False)
    del table
    files = find_files([str(tmp_path / "likes.parquet")], file_format="auto")
    columns = ["uid", "item_id", "timestamp"]
    before, most, rows = pa.total_allocated_bytes(), 0, 0
    for piece in pieces.cut_pieces(files, written=load_schema("yambda"), list_columns=columns, item="item_id"):
        most = max(most, pa.total_allocated_bytes() - before)
        rows += piece.batch.num_rows
        assert piece.batch.num_rows <= 20
    assert rows == num_users
    assert 0 < most < values.nbytes / 2  # 8 MB in all; some pages of 1 MB are


def test_a_row_of_unequal_lists_is_a_reject(tmp_path):
    good = {
        "uid": [1, 2, 3, 4],
        "timestamp": [[5, 10], [5], [], [20, 25, 30]],
        "is_organic": [[0, 1], [1], [], [1] * 3],
    }
    items = [[7, 8], [7], [], [7, 8, 9]]
    pq.write_table(pa.table({**good, "item_id": items}), tmp_path / "likes.parquet")
    made = make(tmp_path, "yambda", "likes.parquet", max_rejects=0.2)
    assert (made.counts["users"], made.counts["events"], made.counts["rows"]) == (3, 6, 6)
    pq.write_table(pa.table({**good, "item_id": [[7, 8], [7, 9], [], [7, 8, 9]]}), tmp_path / "likes.parquet")
    with pytest.raises(UserError, match=r"1 of 6 rows .*the lists of the row have different lengths.*row 2 of"):
        make(tmp_path, "yambda", "likes.parquet", name="b")
    made = make(tmp_path, "yambda", "likes.parquet", max_rejects=0.2, name="c")
    assert (made.counts["users"], made.counts["events"], made.counts["rows_rejected"]) == (2, 5, 1)
    (reject,) = pq.read_table(made.path / "rejects.parquet").to_pylist()
    assert (reject["row"], reject["reason"]) == (2, "the lists of the row have different lengths")


def test_bad_events_inside_lists_keep_the_number_of_their_row(tmp_path, monkeypatch):
    table = pa.table(
        {
            "uid": [1, 2, 3],
            "timestamp": [[5, 10], [5, None, 7], [20, 25]],
            "is_organic": [[0, 1], [1, 1, 1], [1, 1]],
            "item_id": [[7, 8], [7, 8, 9], [7, None]],
        }
    )
    monkeypatch.setattr(pieces, "PIECE_ROWS", 2)  # a row a piece
    pq.write_table(table, tmp_path / "likes.parquet")
    made = make(tmp_path, "yambda", "likes.parquet", max_rejects=0.5)
    assert (made.counts["rows"], made.counts["rows_rejected"], made.counts["events"]) == (7, 2, 5)
    rejects = pq.read_table(made.path / "rejects.parquet").to_pylist()
    assert [(r["row"], r["reason"]) for r in rejects] == [(2, "no time in 'timestamp'"), (3, "no id in 'item_id'")]


@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
@pytest.mark.parametrize("piece_bytes", [1 << 20, 64])
def test_sequences_of_items(tmp_path, monkeypatch, suffix, piece_bytes):
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    random = np.random.default_rng(0)
    lines = [random.integers(0, 30, random.integers(0 if n % 7 == 3 else 2, 40)).tolist() for n in range(50)]
    lines[3] = []  # a user without events
    text = "".join(" ".join(map(str, line)) + "\n" for line in lines)
    second = "5 6\t 7\r\n8 9 10"  # other blanks, and no line break at the end
    for name, content in (("a", text), ("b", second)):
        data = content.encode()
        (tmp_path / f"{name}.{suffix}").write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    made = make(tmp_path, "sequences", [f"a.{suffix}", f"b.{suffix}"])
    expect = {n + 1: line for n, line in enumerate([*lines, [5, 6, 7], [8, 9, 10]]) if line}
    assert {user: found["item"] for user, found in histories(made).items()} == expect
    assert not made.has_timestamps and made.counts["events"] == sum(map(len, expect.values()))


def test_ids_in_sequences_that_are_no_integers(tmp_path):
    (tmp_path / "a.txt").write_text("1 2 3\n4 5 x 6\n7 8\n")
    with pytest.raises(UserError, match=r"'items' is not an integer.*row 2 of .*'x'"):
        make(tmp_path, "sequences", "a.txt")
    (tmp_path / "a.txt").write_text("a b c\nb c a\n")
    assert set(make(tmp_path, "sequences", "a.txt").item_raw()[1:]) == {"a", "b", "c"}
