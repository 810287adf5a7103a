"""MovieLens with its file of users: a model reads what is known of a user before the history, and so do its answers."""

import json
from pathlib import Path

import numpy as np

from tests.cli.test_road import run_commands


def write_movielens(folder: Path) -> tuple[list[tuple[int, int, int, int]], dict[int, dict[str, str]]]:
    """Ratings of 60 users and what is known of all but user 3."""
    random = np.random.default_rng(0)
    rows = [
        (user, int(item), int(random.integers(1, 6)), 978_300_000 + 60 * at)
        for user in range(1, 61)
        for at, item in enumerate(random.integers(1, 40, random.integers(4, 20)))
    ]
    people = {
        user: {"gender": "FM"[user % 2], "age": ["1", "25", "56"][user % 3], "occupation": "7", "zip_code": str(user)}
        for user in range(1, 61)
        if user != 3
    }
    (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in rows))
    (folder / "users.dat").write_text("".join(f"{u}::{'::'.join(p.values())}\n" for u, p in people.items()))
    return rows, people


def test_a_prefix_of_what_is_known_of_the_user(tmp_path: Path) -> None:
    rows, people = write_movielens(tmp_path)
    data, run, bundle = (str(tmp_path / name) for name in ("data", "run", "bundle"))
    settings = ["num_steps=2", "stream.tokens_per_pack=256", "stream.lanes=1", "stream.max_history_events=32"]
    settings += ["model=hstu/tiny", "model.prefix_fields=[gender,age,zip_code]", "tensorboard=false"]
    table = run_commands(
        [
            "megarec-make-shards",
            f"input={tmp_path}/ratings.dat",
            f"users={tmp_path}/users.dat",
            f"output={data}",
            "schema=movielens_1m",
            "users_per_block=20",
        ],
        ["megarec-train", f"data={data}", f"run_dir={run}", *settings],
        ["megarec-convert", f"checkpoint={run}", f"data={data}", f"output={bundle}"],
    )
    assert "users that no user file describes" in table and (tmp_path / "bundle").is_dir()
    requests = []
    for user in (3, 4):
        mine = [row for row in rows if row[0] == user]
        events = [{"item": item, "timestamp": time, "rating": rating} for _, item, rating, time in mine[:-1]]
        requests.append({"user": user, "events": events, "at": mine[-1][3], "context": people.get(user, {})})
    requests.append({**requests[1], "context": {**people[4], "gender": "M", "age": "25"}})
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    answers = run_commands(
        ["megarec-recommend", f"bundle={bundle}", f"data={data}", "user=3", "k=5"],
        ["megarec-recommend", f"bundle={bundle}", f"data={data}", "user=4", "k=5"],
        ["megarec-recommend", f"bundle={bundle}", f"history={tmp_path}/requests.jsonl", "k=5"],
    ).splitlines()
    scores = [[entry["score"] for entry in json.loads(answer)["items"]] for answer in answers]
    np.testing.assert_allclose(scores[:2], scores[2:4], rtol=1e-5)
    assert np.abs(np.array(scores[4]) - scores[3]).max() > 1e-4  # the same events of somebody else
