"""Small files in the layouts of the publishers, read by the ready schemas: ids, fields, times, catalogs, rejects."""

import gzip
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_shards.twin import read_users
from megarec_tools.make_shards.config import MakeShardsConfig
from megarec_tools.make_shards.log import pieces
from megarec_tools.make_shards.log.files import find_files
from megarec_tools.make_shards.pipeline import make_shards

from megarec.base.errors import UserError
from megarec.data.dataset import Dataset, open_dataset
from megarec.data.schema import load_schema, ready_schemas

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


GENRES = ["Action", "Comedy|Drama", "Children's|Sci-Fi|War", "Film-Noir"]


def test_movielens_1m(tmp_path):
    rows = ratings()
    (tmp_path / "ratings.dat").write_text("".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in rows))
    movies = {n: (f"Amélie, {n}: The Film (1999)", GENRES[n % 4]) for n in range(20, 0, -1)}
    text = "".join(f"{n}::{title}::{genres}\n" for n, (title, genres) in movies.items())
    (tmp_path / "movies.dat").write_bytes(text.encode("latin-1"))
    people = some_people({u for u, _, _, _ in rows})
    text_of_users = "".join(f"{u}::{'::'.join(values.values())}\n" for u, values in people.items())
    (tmp_path / "users.dat").write_text(text_of_users)
    made = make(tmp_path, "movielens_1m", "ratings.dat", items="movies.dat", users="users.dat")
    check_ratings(made, rows)
    check_people(made, people)
    assert set(made.item_raw()[1:]) == set(movies)
    assert made.counts["items_added"] == 20 - len({i for _, i, _, _ in rows})
    assert made.item_raw()[-1] == 20 and made.item_counts()[-1] == 0
    assert side_of(made, "genres") == {n: genres.split("|") for n, (_, genres) in movies.items()}
    (tmp_path / "movies.dat").write_text(text)
    with pytest.raises(UserError, match="the text is UTF-8"):
        make(tmp_path, "movielens_1m", "ratings.dat", items="movies.dat", name="b")


def test_movielens_100k(tmp_path):
    rows = ratings()
    (tmp_path / "u.data").write_text("".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in rows))
    names = load_schema("movielens_100k").items.column_names[5:]
    lines = []
    for n in range(1, 16):
        flags = [int(k in (n % 19, (n * 5) % 19)) for k in range(19)]
        date = "" if n == 7 else f"0{n % 9 + 1}-Jan-1995"
        url = f"http://us.imdb.com/M/title-exact?Misérables%20({n})"
        lines.append(f'{n}|Misérables "Les", {n} (1995)|{date}||{url}|' + "|".join(map(str, flags)) + "\n")
    (tmp_path / "u.item").write_bytes("".join(lines).encode("latin-1"))
    people = some_people({u for u, _, _, _ in rows})
    lines = [f"{u}|{p['age']}|{p['gender']}|{p['occupation']}|{p['zip_code']}\n" for u, p in people.items()]
    (tmp_path / "u.user").write_text("".join(lines))
    made = make(tmp_path, "movielens_100k", "u.data", items="u.item", users="u.user")
    check_ratings(made, rows)
    groups = {u: 1 + sum(edge <= int(p["age"]) for edge in (18, 25, 35, 45, 50, 56)) for u, p in people.items()}
    check_people(made, {u: {**p, "age": groups[u]} for u, p in people.items()})
    assert set(made.item_raw()[1:]) == set(range(1, 16)) and made.counts["item_rows_rejected"] == 0
    side = made.item_side()
    for number, n in enumerate(made.item_raw()[1:], start=1):
        for k, name in enumerate(names):
            if name != "unknown":
                assert side[name][number] == 1 + int(k in (n % 19, (n * 5) % 19))
    assert side_of(made, "release_date")[7] == []
    alone = make(tmp_path, "movielens_100k", "u.data", name="alone")
    assert (alone.counts["absent_fields"], alone.counts["absent_user_fields"]) == (19, 4)
    assert len(alone.item_raw()) == 1 + len({i for _, i, _, _ in rows})


@pytest.mark.parametrize("name", ["movielens_20m", "movielens_25m", "movielens_32m", "movielens_latest"])
def test_movielens_csv(tmp_path, name):
    rows = [(u, i, r - 0.5, t) for u, i, r, t in ratings()]
    text = "userId,movieId,rating,timestamp\r\n" + "".join(f"{u},{i},{r},{t}\r\n" for u, i, r, t in rows)
    (tmp_path / "ratings.csv").write_bytes(text.encode())
    movies = {n: (f'"Misérables, Les ""{n}"" (1995)"', GENRES[n % 4]) for n in range(1, 31)}
    text = "movieId,title,genres\r\n" + "".join(f"{n},{t},{g}\r\n" for n, (t, g) in movies.items())
    (tmp_path / "movies.csv").write_bytes(text.encode())
    made = make(tmp_path, name, "ratings.csv", items="movies.csv")
    check_ratings(made, rows)
    assert side_of(made, "genres") == {n: genres.split("|") for n, (_, genres) in movies.items()}


def test_recbole(tmp_path):
    rows = ratings()
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f'1m_{u}\tFilm {i} "x"\t{r}\t{t}' for u, i, r, t in rows]
    (tmp_path / "ml.inter").write_bytes("\r\n".join(lines).encode())
    items = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tgenre:token_seq"]
    items += [f'Film {n} "x"\tFilm\t19{60 + n}\t{GENRES[n % 4].replace("|", " ")}' for n in range(1, 20)]
    (tmp_path / "ml.item").write_bytes("\r\n".join(items).encode())
    people = some_people({f"1m_{u}" for u, _, _, _ in rows})
    lines = ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"]
    lines += [f"{u}\t{p['age']}\t{p['gender']}\t{p['occupation']}\t{p['zip_code']}" for u, p in people.items()]
    (tmp_path / "ml.user").write_bytes("\r\n".join(lines).encode())
    made = make(tmp_path, "recbole", "ml.inter", items="ml.item", users="ml.user")
    check_people(made, people, num_absent=2)
    text = (
        (tmp_path / "ml.user")
        .read_text()
        .replace("age:token", "age:float")
        .replace("occupation:token", "occupation:float")
    )
    (tmp_path / "ml.user").write_text(text)
    cdr = make(tmp_path, "recbole", "ml.inter", users="ml.user", name="cdr")
    groups = {u: 1 + sum(edge <= int(p["age"]) for edge in (18, 25, 35, 45, 50, 56)) for u, p in people.items()}
    of_cdr = {u: {"age_group": groups[u], "occupation_code": p["occupation"]} for u, p in people.items()}
    check_people(cdr, of_cdr, num_absent=2)
    check_ratings(made, rows, user=lambda u: f"1m_{u}", item=lambda i: f'Film {i} "x"')
    assert side_of(made, "genre") == {f'Film {n} "x"': GENRES[n % 4].split("|") for n in range(1, 20)}
    assert side_of(made, "release_year")['Film 9 "x"'] == ["1969"]
    assert "class" not in made.fields and made.counts["absent_fields"] == 1
    (tmp_path / "ml.item").write_text((tmp_path / "ml.item").read_text().replace("genre:", "class:"))
    made = make(tmp_path, "movielens", "ml.inter", items="ml.item", name="b")
    assert side_of(made, "class")['Film 2 "x"'] == ["Children's", "Sci-Fi", "War"]


def asin(item):
    return f"{item:010d}"  # books have ids of digits, some with leading zeros


@pytest.mark.parametrize("name", ["amazon_2014", "amazon_2018"])
@pytest.mark.parametrize("kind", ["ratings", "reviews"])
def test_amazon_of_reviewers(tmp_path, name, kind):
    rows = ratings()
    if kind == "ratings":
        order = (lambda u, i: f"A{u},{asin(i)}") if name == "amazon_2014" else (lambda u, i: f"{asin(i)},A{u}")
        (tmp_path / "ratings_Books.csv").write_text("".join(f"{order(u, i)},{r}.0,{t}\n" for u, i, r, t in rows))
        log = "ratings_Books.csv"
    else:
        lines = [
            {"reviewerID": f"A{u}", "asin": asin(i), "reviewerName": "Zoë", "overall": float(r), "unixReviewTime": t,
             "reviewTime": "01 1, 2001", "style": {"Format:": " Paperback"}, "verified": bool(r % 2)}
            for u, i, r, t in rows
        ]  # fmt: skip
        log = "reviews_Books_5.json.gz"
        (tmp_path / log).write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    made = make(tmp_path, name, log)
    check_ratings(made, rows, user=lambda u: f"A{u}", item=asin, text=lambda r: f"{r}.0")
    if name == "amazon_2018":
        assert ("verified" in made.fields) == (kind == "reviews") and made.counts["absent_fields"] == 2
        meta = [{"asin": asin(n), "category": ["Books", f"C{n % 3}"], "brand": f"B{n // 2}"} for n in range(40)]
        path = tmp_path / "meta_Books.json.gz"
        path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in meta).encode()))
        made = make(tmp_path, name, log, items=path.name, name="with_meta")
        assert set(made.item_raw()[1:]) == {asin(i) for _, i, _, _ in rows}
        assert side_of(made, "category")[asin(5)] == ["Books", "C2"] and side_of(made, "brand")[asin(5)] == ["B2"]


@pytest.mark.parametrize("kind", ["reviews", "benchmark"])
def test_amazon_2023(tmp_path, kind):
    rows = ratings(scale=1000)
    if kind == "benchmark":
        log = "Books.csv.gz"
        lines = "".join(f"U{u},{asin(i)},{r}.0,{t + 7}\n" for u, i, r, t in rows)
        (tmp_path / log).write_bytes(gzip.compress(f"user_id,parent_asin,rating,timestamp\n{lines}".encode()))
    else:
        log = "Books.jsonl.gz"
        reviews = [
            {"rating": float(r), "title": "t", "text": "line\nbreak", "images": [{"a": 1}], "asin": "other",
             "parent_asin": asin(i), "user_id": f"U{u}", "timestamp": t + 7, "verified_purchase": True}
            for u, i, r, t in rows
        ]  # fmt: skip
        (tmp_path / log).write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in reviews).encode()))
    meta = [
        {"parent_asin": asin(n), "main_category": "Books", "store": f"S{n % 4}", "categories": ["Books", "X"][: n % 3]}
        for n in range(30)
    ]
    (tmp_path / "meta_Books.jsonl").write_text("".join(json.dumps(line) + "\n" for line in meta))
    made = make(tmp_path, "amazon_2023", log, items="meta_Books.jsonl")
    check_ratings(made, rows, user=lambda u: f"U{u}", item=asin, text=lambda r: f"{r}.0", time=lambda t: t // 1000)
    assert ("verified_purchase" in made.fields) == (kind == "reviews")
    assert side_of(made, "store")[asin(6)] == ["S2"] and side_of(made, "categories")[asin(6)] == []


def kuairand_person(user):
    person = {
        "user_active_degree": ["full_active", "high_active", "UNKNOWN"][user % 3],
        "is_lowactive_period": "0",
        "is_live_streamer": ["0", "1", "-124"][user % 3],
        "is_video_author": str(user % 2),
    }
    for name, ranges in (("follow_user", "(0,10]"), ("fans_user", "[1,10)"), ("friend_user", "0")):
        person |= {f"{name}_num": str(user), f"{name}_num_range": ranges}
    person |= {"register_days": str(user * 50), "register_days_range": "61-90"}
    return person | {
        f"onehot_feat{n}": f"{user * n % 5}.0" if n == 4 and user % 2 else "" if n == 4 else str(n) for n in range(18)
    }


@pytest.mark.parametrize("size", ["pure", "1k", "27k"])
def test_kuairand(tmp_path, size):
    header = (
        "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
        "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
    )
    rows = ratings(scale=1000)
    parts = ["_part1", "_part2"] if size == "27k" else [""]
    logs = [f"log_standard_4_08_to_4_21_{size}{p}.csv" for p in parts] + [f"log_random_4_22_to_5_08_{size}.csv"]
    texts = dict.fromkeys(logs, header)
    for n, (u, i, r, t) in enumerate(rows):
        name = logs[n % len(logs)]
        texts[name] += (
            f"{u},{i},20220409,{r}00,{t + 289},{r % 2},0,0,0,0,0,{int(r > 4)},{r * 3000},70100,0,0,0,"
            f"{int('random' in name)},{r % 3}\n"
        )
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    videos = "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,"
    videos += "server_height,music_id,music_type,tag\n"
    videos += "".join(
        f'{n},{n // 2},{"AD" if n % 3 else "NORMAL"},2022-04-01,Web,0.0,87433.0,720.0,1280.0,{9155697141 + n},9.0,'
        + ('"12,65"' if n % 2 else "") + "\n"
        for n in range(30)
    )  # fmt: skip
    (tmp_path / f"video_features_basic_{size}.csv").write_text(videos)
    people = {u: kuairand_person(u) for u in sorted({u for u, _, _, _ in rows})[1:]}
    names = list(next(iter(people.values())))
    lines = [",".join(["user_id", *names])]
    lines += [",".join([str(u), *(f'"{v}"' if "," in v else v for v in p.values())]) for u, p in people.items()]
    (tmp_path / f"user_features_{size}.csv").write_text("\n".join(lines) + "\n")
    made = make(
        tmp_path,
        f"kuairand_{size}",
        "log_*.csv",
        items=f"video_features_basic_{size}.csv",
        users="user_features_*.csv",
    )
    numbers = {"follow_user_num", "fans_user_num", "friend_user_num", "register_days"}
    of_users = {name for name in names if name not in numbers}
    check_people(made, {u: {name: p[name] or None for name in of_users} for u, p in people.items()})
    assert set(load_schema("kuairand").users.fields) == of_users
    assert made.counts["events"] == len(rows) and made.counts["rows_rejected"] == 0
    assert {name: info.role for name, info in made.fields.items() if name in ("tab", "is_click", "music_id")} == {
        "tab": "context",
        "is_click": "feedback",
        "music_id": "item_side",
    }
    wanted = expected(rows, time=lambda t: t // 1000)
    for user, found in histories(made).items():
        assert found["item"] == [i for i, _, _ in wanted[user]]
        assert found["timestamp"] == [t for _, _, t in wanted[user]]
        assert found["tab"] == [str(r % 3) for _, r, _ in wanted[user]]
        assert found["is_click"] == [1 + r % 2 for _, r, _ in wanted[user]]
        edges = made.fields["play_time"].edges
        assert found["play_time"] == [1 + sum(e <= r * 3000 for e in edges) for _, r, _ in wanted[user]]
        assert set(found["is_like"]) == {1} and set(found["is_rand"]) <= {1, 2}
    assert side_of(made, "author_id")[9] == [4] and side_of(made, "music_id")[9] == [9155697150]
    assert side_of(made, "tag")[9] == ["12", "65"] and side_of(made, "tag")[8] == []


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


def test_every_publication_has_a_name():
    assert set(ready_schemas()) >= {
        *(f"movielens_{size}" for size in ("100k", "1m", "20m", "25m", "32m")),
        *(f"amazon_{year}" for year in (2014, 2018, 2023)),
        *(f"kuairand_{size}" for size in ("pure", "1k", "27k")),
        *(f"yambda_{size}" for size in ("50m", "500m", "5b")),
        *("recbole", "movielens", "sequences", "yambda"),
    }
    assert load_schema("movielens_32m") == load_schema("movielens_20m")
    with pytest.raises(UserError, match=r"'movielens_1m'.*Ready schemas: .*amazon_2014.*movielens_25m.*yambda_5b"):
        load_schema("movielens_1mm")
    document = (Path(__file__).parents[2] / "docs/data_format.md").read_text()
    assert [name for name in ready_schemas() if f"`{name}`" not in document] == []
