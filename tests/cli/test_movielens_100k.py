"""MovieLens-100K as it is published: shards, two seeds of an HSTU with all its biases, one table for both."""

import json
from pathlib import Path

from tests.cli.test_road import run_commands
from tests.real_data import data_file


def test_two_seeds_stand_beside_the_baselines_in_one_table(tmp_path: Path) -> None:
    log, data, runs = data_file("ml-100k.inter"), tmp_path / "data", [tmp_path / "one", tmp_path / "two"]
    settings = [
        f"data={data}",
        "model=hstu/tiny",
        "model.feedback_heads=[]",
        "num_steps=4",
        "stream.tokens_per_pack=2048",
        "stream.lanes=2",
        "stream.max_history_events=200",
        "protocol=hstu_public",
        "evaluate_every_steps=2",
        "evaluate_users=200",
        "checkpoint.keep_best=hr@50",
        "tensorboard=false",
    ]
    table = run_commands(
        ["megarec-make-shards", f"input={log}", f"output={data}", "schema=recbole"],
        *(["megarec-train", *settings, f"run_dir={run}", f"seed={seed}"] for seed, run in enumerate(runs)),
        [
            "megarec-evaluate",
            f"model=[{runs[0]},{runs[1]}]",
            "protocol=hstu_public",
            "protocol.filter_seen=full",
            f"output={tmp_path / 'out'}",
        ],
    )
    assert "943 users, 943 targets; protocol hstu_public, filter_seen=full: leave_last_out, newest 200 events" in table
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["protocol"]["mrr_depth"] == 2500 and written["changed"] == ["filter_seen"]
    rows = {row["name"]: row for row in written["rows"]}
    assert list(rows)[:2] == ["one", "two"] and {"MostPop", "DecayPop", "Markov", "ItemKNN"} < set(rows)
    for seed, run in enumerate(runs):
        assert (rows[run.name]["run"], rows[run.name]["seed"], rows[run.name]["step"]) == (str(run), seed, 4)
        logged = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
        assert [record["step"] for record in logged] == [2, 4]
        assert [*logged[0]["metrics"]][:7] == written["protocol"]["metrics"]
        assert logged[0]["protocol"] == "hstu_public" and 0 < logged[0]["standard_errors"]["hr@200"] < 0.05
        assert (run / "checkpoints" / "best").exists()
    assert rows["one"]["flat"]["ndcg@200"] != rows["two"]["flat"]["ndcg@200"]
    assert 0.02 < rows["MostPop"]["flat"]["hr@10"] < 0.2
