"""The same log in every format gives the same shards; the ready schemas; what is guessed and what is not."""

import csv
import gzip
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
import zstandard
from make_shards.twin import read_users
from megarec_tools.make_shards.config import MakeShardsConfig, SplitConfig
from megarec_tools.make_shards.log import pieces
from megarec_tools.make_shards.pipeline import make_shards

from megarec.base.errors import UserError
from megarec.data.block import decode_block
from megarec.data.dataset import Dataset, open_dataset
from megarec.data.schema import infer_schema, load_schema, parse_schema, ready_schemas, schema_text

REAL_ML_100K = Path(__file__).parents[3] / "shared/data/ml-100k.inter"
SCHEMA = {
    "name": "plain",
    "user": "user",
    "item": "item",
    "timestamp": "time",
    "fields": {
        "place": {"column": "place", "role": "context", "kind": "categorical"},
        "score": {"column": "score", "role": "feedback", "kind": "numeric", "edges": [2.5, 5]},
    },
}


def plain_rows(num=300):
    random = np.random.default_rng(0)
    return [
        {
            "user": f"u{random.integers(0, 20)}",
            "item": int(random.integers(0, 30)),
            "time": 1_600_000_000 + int(random.integers(0, 1000)),
            "place": ["home", "a, b", 'say "hi"', "two\nlines", None][random.integers(0, 5)],
            "score": [None, 0.5, 3.0, 7.25][random.integers(0, 4)],
        }
        for _ in range(num)
    ]


def as_csv(rows, **options):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n", **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def make(folder, source, *, schema=None, name="made", **options) -> Dataset:
    file = folder / "schema.yaml"
    file.write_text(yaml.safe_dump(schema or SCHEMA))
    config = {"input": str(source), "output": str(folder / name), "schema": str(file), "num_processes": 1}
    return make_shards(MakeShardsConfig(**{**config, **options}))


def contents(dataset):
    return [s.sha256 for s in dataset.shards], dataset.item_raw(), dataset.counts


def test_every_format_gives_the_same_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2000)
    rows = plain_rows()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "log.parquet", row_group_size=50)
    texts = {
        "log.csv": as_csv(rows),
        "log.jsonl": as_jsonl(rows),
        "bom.csv": b"\xef\xbb\xbf" + as_csv(rows).replace(b"\n", b"\r\n").replace(b"two\r\nlines", b"two\nlines"),
        "no_newline_at_the_end.csv": as_csv(rows).rstrip(b"\n"),
    }
    texts |= {f"{n}.gz": gzip.compress(t) for n, t in texts.items()}
    frames = zstandard.ZstdCompressor()
    texts |= {
        f"{n}.zst": frames.compress(t[:100]) + frames.compress(t[100:]) for n, t in texts.items() if n[-3:] != ".gz"
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    expected = contents(make(tmp_path, tmp_path / "log.parquet"))
    for name in texts:
        assert contents(make(tmp_path, tmp_path / name, name=f"made_{name}")) == expected, name


def test_files_globs_directories_and_lists_are_read_in_order(tmp_path):
    rows = plain_rows()
    log = tmp_path / "log"
    (log / "day=1").mkdir(parents=True)
    (log / "_SUCCESS").write_text("")
    (log / "day=0.csv").write_bytes(as_csv(rows[:100]))
    (log / "day=1/b.csv").write_bytes(as_csv(rows[100:]))
    (tmp_path / "whole.csv").write_bytes(as_csv(rows))
    expected = contents(make(tmp_path, tmp_path / "whole.csv"))
    listed = [str(log / "day=0.csv"), str(log / "day=1/b.csv")]
    assert contents(make(tmp_path, log, name="a")) == expected
    assert contents(make(tmp_path, f"{log}/**/*.csv", name="b")) == expected
    assert contents(make(tmp_path, "", name="c", input=listed)) == expected


def test_tabs_without_quotes_and_delimiters_of_two_characters(tmp_path):
    lines = [f'u{n % 3}|{n % 4}|{1000 + n}|5" disc|{n}' for n in range(30)]
    plain = {**SCHEMA, "column_names": ["user", "item", "time", "place", "score"]}
    (tmp_path / "a.tsv").write_text("\n".join(lines).replace("|", "\t"))
    (tmp_path / "b.dat").write_text("\n".join(lines).replace("|", "::"))
    a = make(tmp_path, tmp_path / "a.tsv", schema=plain, name="a")
    b = make(tmp_path, tmp_path / "b.dat", schema={**plain, "file_format": "csv", "delimiter": "::"}, name="b")
    assert contents(a) == contents(b)
    assert pq.read_table(a.path / "vocab/place.parquet")["raw"].to_pylist() == ['5" disc']


@pytest.mark.parametrize(
    ("unit", "write"),
    [
        ("auto", str),
        ("auto", lambda s: f"{s}.75"),
        ("auto", lambda s: str(s * 1000)),
        ("auto", lambda s: str(s * 1_000_000 + 5)),
        ("us", lambda s: str(s * 1_000_000)),
        ("auto", lambda s: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(s))),
        ("iso", lambda s: time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(s))),
        ("auto", lambda s: time.strftime("%Y-%m-%dT%H:%M:%S.5+02:00", time.gmtime(s + 7200))),
    ],
)
def test_times_are_stored_in_seconds(tmp_path, unit, write):
    seconds = [1_600_000_000 + 100 * n for n in range(20)]
    text = "user,item,time\n" + "".join(f"1,{n},{write(s)}\n" for n, s in enumerate(seconds))
    (tmp_path / "log.csv").write_text(text)
    schema = {"name": "t", "user": "user", "item": "item", "timestamp": "time", "timestamp_unit": unit}
    made = make(tmp_path, tmp_path / "log.csv", schema=schema)
    assert read_users(made, "train")[0]["columns"]["timestamp"] == seconds[:-1]
    assert read_users(made, "eval")[0]["query_time"] == seconds[-1]


def test_events_within_one_second_are_ordered_by_their_fraction(tmp_path):
    times = pa.array([1_500, 1_100, 1_900, 1_100], pa.timestamp("ms"))
    pq.write_table(pa.table({"user": [1] * 4, "item": [10, 20, 30, 40], "time": times}), tmp_path / "log.parquet")
    schema = {"name": "t", "user": "user", "item": "item", "timestamp": "time"}
    made = make(tmp_path, tmp_path / "log.parquet", schema=schema)
    raw = made.item_raw()
    assert [raw[i] for i in read_users(made, "train")[0]["columns"]["item"]] == [20, 40, 10]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_ids_up_to_64_bits_keep_their_value(tmp_path, kind):
    ids = [2**64 - 1, 2**63, 2**63 - 1, 0, 7]
    table = pa.table({"user": pa.array(ids * 2, pa.uint64()), "item": pa.array(ids * 2, pa.uint64())})
    if kind == "csv":
        (tmp_path / "log.csv").write_text("user,item\n" + "".join(f"{i},{i}\n" for i in ids * 2))
    else:
        pq.write_table(table, tmp_path / "log.parquet")
    made = make(tmp_path, tmp_path / f"log.{kind}", schema={"name": "w", "user": "user", "item": "item"})
    assert made.item_raw() == [None, *sorted(ids)]
    assert sorted(pq.read_table(made.path / "vocab/user.parquet")["raw"].to_pylist()) == sorted(ids)


def test_text_ids_stay_text(tmp_path):
    (tmp_path / "log.csv").write_text("user,item\n007,1\n007,2\n7,1\n7,2\n")
    schema = {"name": "t", "user": "user", "item": "item", "text_columns": ["user", "item"]}
    made = make(tmp_path, tmp_path / "log.csv", schema=schema)
    assert made.item_raw() == [None, "1", "2"] and made.counts["users"] == 2


def recbole_layout(folder, num_users=30):
    """A file as RecBole ships MovieLens-1M: tab-separated, CRLF, types in the header, titles as item ids."""
    random = np.random.default_rng(1)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(num_users):
        for item in random.permutation(40)[: random.integers(2, 30)]:
            title = f'Film "{item}" (19{60 + item})' if item % 2 else f"Amélie, {item}"
            lines.append(f"1m_{user}\t{title}\t{random.integers(1, 6)}\t{978_300_000 + random.integers(0, 999)}")
    (folder / "ml.inter").write_bytes(("\r\n".join(lines) + "\r\n").encode())
    return [line.split("\t") for line in lines[1:]]


def test_movielens_in_the_layout_of_recbole(tmp_path):
    rows = recbole_layout(tmp_path)
    made = make_shards(
        MakeShardsConfig(input=str(tmp_path / "ml.inter"), output=str(tmp_path / "d"), schema="movielens")
    )
    assert made.counts["events"] == len(rows) and made.counts["eval_users"] == made.counts["users"] == 30
    assert set(made.item_raw()[1:]) == {row[1] for row in rows}
    assert made.fields["rating"].num_ids == 6 and made.fields["liked"].num_ids == 3
    ratings = [None, *pq.read_table(made.path / "vocab/rating.parquet")["raw"].to_pylist()]
    users = pq.read_table(made.path / "vocab/user.parquet")["raw"].to_pylist()
    for user, found in read_users(made, "train").items():
        mine = sorted((row for row in rows if row[0] == users[user]), key=lambda row: int(row[3]))[:-1]
        assert [made.item_raw()[i] for i in found["columns"]["item"]] == [row[1] for row in mine]
        assert [ratings[i] for i in found["columns"]["rating"]] == [row[2] for row in mine]
        assert found["columns"]["liked"] == [1 + (int(row[2]) >= 4) for row in mine]


@pytest.mark.skipif(not REAL_ML_100K.exists(), reason="MovieLens-100K is not here")
def test_the_real_movielens_100k(tmp_path):
    made = make_shards(MakeShardsConfig(input=str(REAL_ML_100K), output=str(tmp_path / "d"), schema="movielens"))
    counts = made.counts
    assert (counts["users"], counts["items"], counts["events"], counts["targets"]) == (943, 1682, 100_000, 943)
    assert made.item_raw()[1] == 50  # Star Wars


def yambda_table(num=500, **columns):
    random = np.random.default_rng(2)
    return pa.table(
        {
            "uid": pa.array(random.integers(0, 20, num), pa.uint32()),
            "item_id": pa.array(random.integers(0, 60, num), pa.uint32()),
            "timestamp": pa.array(np.arange(num) * 5, pa.uint32()),
            "is_organic": pa.array(random.integers(0, 2, num), pa.uint8()),
            "played_ratio_pct": pa.array(random.integers(0, 150, num), pa.uint16()),
            "track_length_seconds": pa.array(random.integers(60, 300, num), pa.uint32()),
            **columns,
        }
    )


def test_yambda_with_and_without_its_optional_columns(tmp_path):
    table = yambda_table()
    kinds = pa.array(["listen", "like", "listen", "unlike"] * 125).dictionary_encode()
    artists = pa.array((table["item_id"].to_numpy() % 7).astype(np.uint32))
    pq.write_table(table, tmp_path / "flat.parquet")
    pq.write_table(
        table.append_column("event_type", kinds).append_column("artist_id", artists), tmp_path / "all.parquet"
    )
    flat = make_shards(
        MakeShardsConfig(input=str(tmp_path / "flat.parquet"), output=str(tmp_path / "a"), schema="yambda")
    )
    assert list(flat.fields) == ["item", "is_organic", "played_ratio_pct", "listened"]
    assert flat.counts["events"] == 500 and flat.item_side() == {}
    every = make_shards(
        MakeShardsConfig(input=str(tmp_path / "all.parquet"), output=str(tmp_path / "b"), schema="yambda")
    )
    assert every.counts["events"] == 250 and every.counts["rows_filtered"] == 250 and every.counts["rows_rejected"] == 0
    artist = [None, *pq.read_table(every.path / "vocab/artist_id.parquet")["raw"].to_pylist()]
    side = every.item_side()["artist_id"]
    assert [artist[i] for i in side[1:]] == [raw % 7 for raw in every.item_raw()[1:]]
    for user in read_users(every, "train").values():
        assert "artist_id" not in user["columns"]
        bins, listened = np.array(user["columns"]["played_ratio_pct"]), np.array(user["columns"]["listened"])
        assert np.array_equal(listened == 2, bins >= 5)  # 50 is the fourth of the edges 1, 10, 25, 50
    assert open_dataset(every.path).fields == every.fields


def test_lists_of_item_side_values_and_conflicts(tmp_path):
    rows = [
        {"user": n % 4, "item": n % 3, "time": n, "genres": [["rock", "pop"], [], ["jazz"]][n % 3]} for n in range(24)
    ]
    rows.append({"user": 0, "item": 2, "time": 99, "genres": ["folk"]})
    (tmp_path / "log.jsonl").write_bytes(as_jsonl(rows))
    field = {"column": "genres", "role": "item_side", "kind": "categorical", "max_values": 2}
    schema = {"name": "g", "user": "user", "item": "item", "timestamp": "time", "fields": {"genres": field}}
    made = make(tmp_path, tmp_path / "log.jsonl", schema=schema)
    names = [None, *pq.read_table(made.path / "vocab/genres.parquet")["raw"].to_pylist()]
    by_item = {raw: ids.tolist() for raw, ids in zip(made.item_raw(), made.item_side()["genres"], strict=True)}
    assert [names[i] for i in by_item[0]] == ["rock", "pop"]
    assert by_item[1] == [-1, -1] and by_item[None] == [-1, -1]
    assert names[by_item[2][0]] == "jazz" and by_item[2][1] == -1
    assert made.counts["item_side_conflicts"] == 1
    text = [{**row, "genres": "|".join(row["genres"])} for row in rows]
    (tmp_path / "log.csv").write_bytes(as_csv(text))
    schema["fields"]["genres"] = {**field, "separator": "|"}
    assert contents(make(tmp_path, tmp_path / "log.csv", schema=schema, name="b")) == contents(made)


def test_duplicates_rare_items_and_compression(tmp_path):
    rows = plain_rows(200)
    (tmp_path / "log.csv").write_bytes(as_csv(rows + rows[:50]))
    kept = make(tmp_path, tmp_path / "log.csv", name="a")
    dropped = make(tmp_path, tmp_path / "log.csv", name="b", duplicates="drop", compression="zstd")
    assert kept.counts["duplicates"] == dropped.counts["duplicates"] == 50
    assert (kept.counts["events"], dropped.counts["events"]) == (250, 200)
    (tmp_path / "once.csv").write_bytes(as_csv(rows))
    once = make(tmp_path, tmp_path / "once.csv", name="c")
    assert read_users(once, "train") == read_users(dropped, "train")
    counts = {i: sum(row["item"] == i for row in rows) for i in range(30)}
    rare = make(tmp_path, tmp_path / "once.csv", name="d", min_item_count=7)
    assert set(rare.item_raw()[1:]) == {i for i, count in counts.items() if count >= 7}


def test_webdataset_reads_the_shards(tmp_path):
    (tmp_path / "log.csv").write_bytes(as_csv(plain_rows()))
    made = make(tmp_path, tmp_path / "log.csv", users_per_block=4, blocks_per_shard=2)
    paths = [str(made.shard_path(shard)) for shard in made.shards_of("train")]
    assert len(paths) > 1
    read = webdataset.WebDataset(paths, shardshuffle=False, handler=webdataset.reraise_exception)
    blocks = [decode_block(sample["mp"], where=sample["__key__"]) for sample in read]
    assert np.concatenate([block.user for block in blocks]).tolist() == list(range(made.counts["train_users"]))
    assert sum(len(block.columns["item"]) for block in blocks) == made.counts["train_events"]


def test_a_changed_shard_does_not_verify(tmp_path):
    (tmp_path / "log.csv").write_bytes(as_csv(plain_rows()))
    made = open_dataset(make(tmp_path, tmp_path / "log.csv").path)
    made.verify()
    path = made.shard_path(made.shards[0])
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-000000\.tar"):
        made.verify()
    text = (made.path / "dataset.json").read_text()
    (made.path / "dataset.json").write_text(text.replace("train/shard-000000.tar", "train/../../shard-000000.tar"))
    with pytest.raises(UserError, match="no shard"):
        open_dataset(made.path)


def test_inferred_schema_needs_approval(tmp_path, capsys):
    rows = [{**row, "liked": bool(row["time"] % 2)} for row in plain_rows()]
    renamed = [{"userId": r["user"], "movieId": r["item"], "timestamp": r["time"], **r} for r in rows]
    for row in renamed:
        for name in ("user", "item", "time"):
            del row[name]
    (tmp_path / "log.jsonl").write_bytes(as_jsonl(renamed))
    config = {"input": str(tmp_path / "log.jsonl"), "output": str(tmp_path / "d"), "schema": "infer"}
    with pytest.raises(UserError, match="approve=true"):
        make_shards(MakeShardsConfig(**config))
    assert not (tmp_path / "d").exists()
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    schema = load_schema(tmp_path / "printed.yaml")
    assert "null" not in printed and "[]" not in printed  # only what was found
    assert (schema.user, schema.item, schema.timestamp) == ("userId", "movieId", "timestamp")
    roles = {name: (field.role, field.kind) for name, field in schema.fields.items()}
    assert roles == {
        "place": ("context", "categorical"),
        "score": ("feedback", "categorical"),
        "liked": ("feedback", "flag"),
    }
    made = make_shards(MakeShardsConfig(**config, approve=True))
    assert made.counts["events"] == 300 and made.schema == schema


def test_infer_sees_lists_in_text():
    titles = [f"part {number} | the end" for number in range(150)]
    sample = {"user": ["a"] * 150, "item": ["b"] * 150, "tags": ["drama|war", "", "war"] * 50, "title": titles}
    schema = infer_schema(sample, where="log.csv")
    assert list(schema.fields) == ["tags"]
    assert (schema.fields["tags"].separator, schema.fields["tags"].max_values) == ("|", 8)
    assert parse_schema(schema_text(schema), where="log.csv") == schema


@pytest.mark.parametrize("name", ready_schemas())
def test_the_text_of_a_schema_reads_back(name):
    assert parse_schema(schema_text(load_schema(name)), where=name) == load_schema(name)


def test_infer_says_what_it_did_not_find():
    with pytest.raises(UserError, match="no column looks like the item"):
        infer_schema({"user_id": [1], "thing": [2]}, where="log.csv")


def test_ready_schemas_load_and_help_is_quick():
    assert {"yambda", "movielens"} <= set(ready_schemas())
    for name in ready_schemas():
        assert name in (load_schema(name).name, *load_schema(name).aliases)
    code = (
        "import sys; sys.argv = ['x', '--help']\n"
        "from megarec_tools.make_shards.command import main\n"
        "try: main()\n"
        "finally: assert not {'polars', 'pyarrow', 'torch', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "users_per_block" in done.stdout and "split.rule" in done.stdout
    shown = " ".join(done.stdout.split())
    assert all(f"{name}," in shown or f"{name}." in shown for name in ready_schemas())


def test_a_held_out_user_is_never_trained_on(tmp_path):
    (tmp_path / "log.csv").write_bytes(as_csv(plain_rows(600)))
    split = SplitConfig(rule="user_holdout", fraction=0.3)
    made = make(tmp_path, tmp_path / "log.csv", split=split)
    train, held = set(read_users(made, "train")), set(read_users(made, "eval"))
    assert train and held and not train & held
    assert sorted(train | held) == list(range(made.counts["users"]))
    other = make(tmp_path, tmp_path / "log.csv", split=split, seed=1, name="b")
    assert [s.sha256 for s in other.shards] != [s.sha256 for s in made.shards]
