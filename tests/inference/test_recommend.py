"""Raw values in, raw values out: the same ids as the shards, the same scores as the model, clear refusals."""

import json
import sys
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from megarec_tools.make_shards.log.cleaning import keep_rows

from megarec.base.errors import UserError
from megarec.cli.recommend import RecommendConfig, recommend
from megarec.data.dataset import Dataset
from megarec.inference.bundle import BundleConfig, open_bundle, write_bundle
from megarec.inference.recommend import Recommender
from megarec.inference.requests import RawReader, Request, find_id, parse_request, read_seconds
from megarec.inference.users import find_user
from tests.inference.synthetic import (
    CONFIGS,
    FIELDS,
    MAX_EVENTS,
    SCHEMA,
    make_model,
    random_weights,
    raw_item,
    write_world,
)

TIME = 1_500_000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_world(tmp_path_factory.mktemp("world") / "data")


@pytest.fixture(scope="module")
def bundle(world: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, weights = tmp_path_factory.mktemp("bundle") / "bundle", random_weights(CONFIGS["argus"])
    config = BundleConfig(
        model=CONFIGS["argus"], schema=SCHEMA, fields=FIELDS, has_timestamps=True, max_history_events=MAX_EVENTS
    )
    write_bundle(path, config, dense=weights.dense, tables=weights.tables, dataset=world)
    return path


def event(item: int, seconds: int, **columns: Any) -> dict[str, Any]:
    return {"item": raw_item(item), "timestamp": TIME + seconds, **columns}


REQUEST: dict[str, Any] = {
    "user": "anna",
    "events": [
        event(3, 60, device="desktop", played=89.9),
        event(7, 0, device="phone", played=10),
        {"track": str(raw_item(2)), "time": str(TIME + 60), "played": 9.9, "artist": "ignored, it belongs to the item"},
        event(99, 90, device="fridge"),
    ],
    "at": TIME + 100,
    "context": {"device": "speaker"},
}


def read(world: Dataset, **changes: Any) -> tuple[Any, RawReader]:
    reader = RawReader(world)
    return reader.read([parse_request(json.dumps({**REQUEST, **changes}), where="line 1")]), reader


def test_raw_values_become_the_ids_of_the_shards(world: Dataset) -> None:
    histories, reader = read(world)
    assert histories.fields["item"].tolist() == [7, 3, 2, 0]  # time order, ties in the order given
    assert histories.timestamp.tolist() == [TIME, TIME + 60, TIME + 60, TIME + 90]
    assert histories.fields["device"].tolist() == [1, 2, 0, 0]
    assert histories.fields["ratio"].tolist() == [2, 3, 1, 0]  # edges 10, 50, 90: a value at an edge lies above it
    assert histories.fields["listened"].tolist() == [1, 2, 1, 0]
    assert histories.query_time.tolist() == [TIME + 100]
    assert histories.query_fields["device"].tolist() == [3]
    assert dict(reader.unknown) == {"item": 1, "device": 1}
    assert not reader.ignored


def test_what_a_question_leaves_out_is_as_in_the_newest_event(world: Dataset) -> None:
    histories, _ = read(
        world, at=None, context=None, events=[event(1, 5, device="phone"), event(2, 9, device="desktop")]
    )
    assert histories.query_time.tolist() == [TIME + 9]
    assert histories.query_fields["device"].tolist() == [2]
    nothing, _ = read(world, events=[], at=None, context=None)
    assert nothing.query_fields["device"].tolist() == [0]
    assert nothing.cu_seqlens.tolist() == [0, 0]


def test_a_key_that_is_no_column_is_counted(world: Dataset) -> None:
    _, reader = read(world, events=[event(1, 5, devise="phone")])
    assert dict(reader.ignored) == {"devise": 1}


BAD_LINES = {
    "{": "line 1: not valid JSON",
    "[1]": "a request is a JSON object",
    '{"evnts": []}': "Did you mean 'events'",
    '{"events": 3}': "'events' is a list",
    '{"events": [3]}': "'events' is a list of objects",
    '{"context": 3}': "'context' is an object",
    '{"items": []}': "'items' is a list",
    '{"events": [{"timestamp": 5}]}': "line 1, event 1: no item under 'track'",
    '{"events": [{"item": [1], "timestamp": 5}]}': "no item",
    '{"events": [{"item": 1}]}': "line 1, event 1: no timestamp",
    '{"events": [{"item": 1, "timestamp": "yesterday"}]}': "'yesterday' is not a time",
    '{"events": [{"item": 1, "timestamp": -5}]}': "is not a time",
    '{"events": [{"item": 1, "timestamp": 1e30}]}': "beyond the year 9999",
    '{"events": [{"item": 1, "timestamp": NaN}]}': "is not a time",
    '{"events": [{"item": 1, "timestamp": 5, "played": "loud"}]}': "'played': 'loud' is not a finite number",
    '{"events": [{"item": 1, "timestamp": 5}], "at": 4}': "before the newest event",
    "[" * 100_000: "not valid JSON",
    "9" * 5000: "not valid JSON",
    '{"events": [{"item": 1, "timestamp": 1' + "0" * 400 + "}]}": "is not a time",
    '{"events": [{"item": 1, "timestamp": 5, "played": 1' + "0" * 400 + "}]}": "is not a finite number",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:40])
def test_bad_requests_are_refused(world: Dataset, line: str) -> None:
    with pytest.raises(UserError, match=BAD_LINES[line].replace("[", r"\[")):
        RawReader(world).read([parse_request(line, where="line 1")])


@pytest.mark.parametrize("value", [4, 4.0, "4", "listen", True, "true"])
@pytest.mark.parametrize("kept", [True, False])
def test_the_filter_of_rows_is_the_shards(world: Dataset, value: Any, kept: bool) -> None:
    wanted = {"kind": [4, "listen", True] if kept else [5, "Listen", "4.0.", False]}
    reader = RawReader(replace(world, schema=replace(SCHEMA, keep=wanted)))
    (request,) = [parse_request(json.dumps({"events": [event(3, 60, kind=value)]}), where="line 1")]
    assert len(reader.read([request]).timestamp) == (1 if kept else 0)
    assert reader.dropped_events == (0 if kept else 1)
    frame = keep_rows(pl.DataFrame({"kind": [value]}), wanted)
    assert len(frame) == (1 if kept else 0)


@pytest.mark.parametrize(
    ("value", "unit", "seconds"),
    [
        (1_700_000_000, "auto", 1_700_000_000),
        (1_700_000_000_999, "auto", 1_700_000_000),
        (1_700_000_000_000_000, "auto", 1_700_000_000),
        (1_700_000_000_000, "s", None),
        (7_500, "ms", 7),
        ("12.9", "s", 12),
        ("2023-11-14T22:13:20Z", "iso", 1_700_000_000),
        ("2023-11-14T22:13:20", "auto", 1_700_000_000),
        ("2023-11-15T00:13:20+02:00", "s", 1_700_000_000),
        (True, "s", None),
    ],
)
def test_times(value: Any, unit: str, seconds: int | None) -> None:
    if seconds is None:
        with pytest.raises(UserError):
            read_seconds(value, unit, where="x")
    else:
        assert read_seconds(value, unit, where="x") == seconds


@pytest.mark.parametrize(
    ("raw", "value", "number"),
    [
        (5, "5", 1), (5, 5.0, 1), ("5", 5, 1), ("5.0", 5, 1), ("5", 5.0, 1), ("4.5", 4.5, 1), ("true", True, 1),
        (-7, "-7", 1), (1, True, 0), (5, "x", 0), (5, 6, 0), (5, float("nan"), 0), (5, float("inf"), 0),
        (5, "9" * 5000, 0), (5, 10**400, 0), (5, [5], 0),
    ],
)  # fmt: skip
def test_text_and_numbers_that_look_the_same_are_the_same(raw: Any, value: Any, number: int) -> None:
    assert find_id({raw: 1}, value) == number


def test_answers_are_the_models(bundle: Path, world: Dataset) -> None:
    recommender, model = Recommender(open_bundle(bundle)), make_model(CONFIGS["argus"], world)
    request = parse_request(json.dumps(REQUEST), where="")
    histories = RawReader(world).read([request])
    scores = model.scores(histories)[0]
    scores[0] = -torch.inf
    order = scores.argsort(descending=True)[:5].tolist()
    (answer,) = recommender.answer([request], k=5, feedback=True)
    assert answer.items == [raw_item(i) for i in order]
    assert answer.scores == pytest.approx(scores[order].tolist(), abs=1e-9)
    assert answer.source == "model" and answer.user == "anna"
    assert len(answer.feedback["listened"]) == 5 and all(0 < p < 1 for p in answer.feedback["listened"])
    assert [list(p) for p in answer.feedback["ratio"]] == [["below 10", "10 to 50", "50 to 90", "90 and up"]] * 5
    assert [sum(p.values()) for p in answer.feedback["ratio"]] == pytest.approx([1.0] * 5)
    (unseen,) = recommender.answer([request], k=30, filter_seen=True)
    assert set(unseen.items) == {raw_item(i) for i in range(1, 31)} - {raw_item(i) for i in (7, 3, 2)}


def test_candidates_cold_users_and_mixed_batches(bundle: Path, world: Dataset) -> None:
    recommender = Recommender(open_bundle(bundle))
    warm = parse_request(json.dumps(REQUEST), where="")
    cold = Request(user=1)
    chosen = Request(
        events=REQUEST["events"], at=REQUEST["at"], context=REQUEST["context"], items=[raw_item(4), 5, raw_item(9)]
    )
    answers = recommender.answer([cold, warm, chosen], k=2, feedback=True)
    counts = world.item_counts()
    popular = sorted(range(1, 31), key=lambda i: (-counts[i], i))[:2]
    assert answers[0].items == [raw_item(i) for i in popular] and answers[0].source == "popularity"
    assert answers[0].feedback == {}
    (alone,) = recommender.answer([warm], k=30)
    assert answers[1].items == alone.items[:2]
    assert answers[2].items == [i for i in alone.items if i in (raw_item(4), raw_item(9))]
    assert recommender.answer([cold], k=2, feedback=True)[0] == answers[0]


def test_the_command_reads_and_writes_lines(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\ufeff" + json.dumps(REQUEST) + "\n\n" + json.dumps({"user": 2, "events": []}) + "\n")
    recommend(RecommendConfig(bundle=str(bundle), history=str(source), k=3, output=str(target), feedback=True))
    first, second = (json.loads(line) for line in target.read_text().splitlines())
    assert first["user"] == "anna" and len(first["items"]) == 3 and "listened" in first["items"][0]["feedback"]
    assert second["source"] == "popularity"
    assert "1 values of 'device' are not in the vocabulary" in capsys.readouterr().err
    recommend(RecommendConfig(bundle=str(bundle), history=str(source), k=3, format="table", feedback=True))
    assert "P(listened)" in capsys.readouterr().out
    source.write_text(json.dumps(REQUEST) + "\n{\n")
    with pytest.raises(UserError, match="line 2"):
        recommend(RecommendConfig(bundle=str(bundle), history=str(source), output=str(tmp_path / "none")))
    source.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        recommend(RecommendConfig(bundle=str(bundle), history=str(source), output=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="no such file"):
        recommend(RecommendConfig(bundle=str(bundle), history=str(tmp_path / "nothing")))
    with pytest.raises(UserError, match="come together"):
        RecommendConfig(bundle="b", user=3)


def test_standard_input(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(json.dumps(REQUEST).encode())))
    recommend(RecommendConfig(bundle=str(bundle), k=1))
    assert len(json.loads(capsys.readouterr().out)["items"]) == 1


def test_one_user_of_a_dataset(bundle: Path, world: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    recommend(RecommendConfig(bundle=str(bundle), user="u5", data=str(world.path), k=4))
    answer = json.loads(capsys.readouterr().out)
    histories = find_user(world, "u5")
    scores = make_model(CONFIGS["argus"], world).scores(histories.newest(MAX_EVENTS))[0]
    scores[0] = -np.inf
    assert [entry["item"] for entry in answer["items"]] == [
        raw_item(i) for i in scores.argsort(descending=True)[:4].tolist()
    ]
    recommend(RecommendConfig(bundle=str(bundle), user="u1", data=str(world.path)))
    assert json.loads(capsys.readouterr().out)["source"] == "popularity"
    with pytest.raises(UserError, match="no user 'nobody'"):
        find_user(world, "nobody")
