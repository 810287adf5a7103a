"""Small files in the layouts of the publishers, read by the ready schemas: ids, fields, times, catalogs, rejects."""

import gzip
import json
from pathlib import Path

import pytest
from make_shards.publications import (
    check_people,
    check_ratings,
    expected,
    histories,
    make,
    ratings,
    side_of,
    some_people,
)

from megarec.base.errors import UserError
from megarec.data.schema import load_schema, ready_schemas

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
