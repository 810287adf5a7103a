"""The files of a log: bytes, schema, marginals, order."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megarec_tools.make_log.config import MakeLogConfig

from megarec.base.files import sha256_of
from tests.make_log.logs import by_user, read_events, write_log


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log") / "listens")


@pytest.fixture(scope="module")
def marked_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log") / "marked", listens_only=False)


def sums(path: Path) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in sorted(path.iterdir())}


@pytest.mark.parametrize("chunk_events", [1, 12_000])
def test_same_settings_give_the_same_bytes_whatever_the_chunks(log: Path, tmp_path: Path, chunk_events: int) -> None:
    assert sums(write_log(tmp_path / "again", chunk_events=chunk_events)) == sums(log)


@pytest.mark.parametrize("other", [{"seed": 1}, {"taste_strength": 1.4}])
def test_other_settings_give_other_bytes(log: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    here, there = sums(log), sums(write_log(tmp_path / "other", **other))
    assert here.keys() == there.keys()
    assert all(here[name] != there[name] for name in here)


def test_log_json_tells_the_truth(log: Path) -> None:
    summary = json.loads((log / "log.json").read_text())
    assert {name: entry["sha256"] for name, entry in summary["files"].items()} == {
        name: sha for name, sha in sums(log).items() if name != "log.json"
    }
    assert summary["counts"]["listen"] == len(read_events(log))
    assert summary["settings"]["num_items"] == 400
    assert "output" not in summary["settings"]


def test_schema_is_flat_yambda_with_artist_and_album(log: Path) -> None:
    assert pq.read_schema(log / "events-00000.parquet").remove_metadata() == pa.schema(
        {
            "uid": pa.uint32(),
            "item_id": pa.uint32(),
            "timestamp": pa.uint32(),
            "is_organic": pa.uint8(),
            "played_ratio_pct": pa.uint16(),
            "track_length_seconds": pa.uint32(),
            "event_type": pa.string(),
            "artist_id": pa.uint32(),
            "album_id": pa.uint32(),
        }
    )
    assert pl.read_parquet(log / "events-*.parquet")["event_type"].unique().to_list() == ["listen"]


def test_marginals_are_those_of_yambda(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log", num_users=2_000, num_items=2_000, num_events=200_000)
    events = read_events(path)
    ratio, organic = events["played_ratio_pct"].to_numpy(), events["is_organic"].to_numpy()
    assert 0.60 <= (ratio >= 50).mean() <= 0.67
    assert 0.06 <= (ratio == 0).mean() <= 0.09
    assert ratio.max() <= 159
    assert 0.48 <= organic.mean() <= 0.54
    users = by_user(events)
    neighbours = [a["timestamp"] == b["timestamp"] for rows in users.values() for a, b in pairwise(rows)]
    assert 0.10 <= np.mean(neighbours) <= 0.14
    assert len(users) == 2_000
    assert abs(len(events) - 200_000) < 12_000
    lengths = np.array([len(rows) for rows in users.values()])
    assert abs(np.log(lengths).std() - 0.9) < 0.05
    assert events["item_id"].to_numpy().max() > 1_000_000, "raw ids are sparse"


def test_files_follow_each_other_in_time(log: Path) -> None:
    paths = sorted(log.glob("events-*.parquet"))
    assert len(paths) == 4
    timestamp = read_events(log)["timestamp"].to_numpy().astype(np.int64)
    assert (np.diff(timestamp) >= 0).all()
    assert (timestamp % 5 == 0).all()
    assert timestamp.max() < 61 * 86_400


def test_an_item_has_one_artist_album_and_length(log: Path) -> None:
    events = pl.from_arrow(read_events(log))
    assert isinstance(events, pl.DataFrame)
    sides = events.select("item_id", "artist_id", "album_id", "track_length_seconds").unique()
    assert sides["item_id"].is_unique().all()
    assert sides.select("artist_id", "album_id").unique()["album_id"].is_unique().all()


def test_marks_follow_their_listen_and_leave_the_listens_as_they_are(log: Path, marked_log: Path) -> None:
    events = read_events(marked_log)
    kind = np.array(events["event_type"].to_pylist())
    assert events.filter(pa.array(kind == "listen")).equals(read_events(log))
    marks = events.filter(pa.array(kind != "listen"))
    assert marks["played_ratio_pct"].null_count == marks["track_length_seconds"].null_count == len(marks)
    assert sums(marked_log)["oracle.parquet"] == sums(log)["oracle.parquet"]
    for rows in by_user(events).values():
        marked: dict[str, set[int]] = {"like": set(), "dislike": set()}
        assert rows[0]["event_type"] == "listen"
        for before, row in pairwise(rows):
            kind_of_row, item = row["event_type"], row["item_id"]
            if kind_of_row == "listen":
                continue
            assert (before["item_id"], before["timestamp"]) == (item, row["timestamp"])
            if kind_of_row in marked:
                marked[kind_of_row].add(item)
            else:
                marked[kind_of_row.removeprefix("un")].remove(item)  # only what was marked can be taken back
    shares = {name: np.mean(kind == name) for name in ("like", "unlike", "dislike", "undislike")}
    assert 0.014 <= shares["like"] <= 0.026
    assert 0.002 <= shares["unlike"] <= 0.01
    assert 0.0008 <= shares["dislike"] <= 0.004
    assert 0 < shares["undislike"] < shares["dislike"]


def test_oracle_is_about_the_last_listen_of_each_user(log: Path) -> None:
    users = by_user(read_events(log))
    oracle = pq.read_table(log / "oracle.parquet").to_pylist()
    assert sorted(row["uid"] for row in oracle) == sorted(users)
    for row in oracle:
        last = users[row["uid"]][-1]
        assert (row["item_id"], row["timestamp"]) == (last["item_id"], last["timestamp"])
        assert row["listened"] == (last["played_ratio_pct"] >= 50)
        assert len(set(row["item_ids"])) == len(row["probabilities"]) == 200
        assert row["probabilities"] == sorted(row["probabilities"], reverse=True)
        assert 0.2 < sum(row["probabilities"]) < 1.0001


@pytest.mark.parametrize(
    "settings",
    [
        {"num_users": 1, "num_events": 1},
        {"num_users": 300, "num_events": 300, "length_sigma": 0.0},
        {"num_items": 16, "popularity_exponent": 0.0},
        {"num_genres": 1, "taste_strength": 0.0, "session_events": 1.0},
    ],
)
def test_extreme_settings(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = write_log(tmp_path / "log", **settings)
    config = MakeLogConfig(output=str(path), **settings)
    oracle = pq.read_table(path / "oracle.parquet").to_pylist()
    assert len({row["uid"] for row in oracle}) == settings.get("num_users", 900)
    if config.num_items == 16:
        assert all(abs(sum(row["probabilities"]) - 1) < 1e-5 for row in oracle)
