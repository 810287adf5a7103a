"""The whole road with the public commands: log, shards, training, evaluation, bundle, recommendations, report."""

import json
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from tests.cli.test_commands import COMMANDS

# One process for a row of commands: each would pay seconds of imports alone.
DRIVER = """
import importlib, json, sys
for module, arguments in json.loads(sys.argv[1]):
    sys.argv = arguments
    try:
        importlib.import_module(module).main()
    except SystemExit as ended:
        if ended.code:
            sys.exit(ended.code)
"""


def run_commands(*commands: list[str]) -> str:
    """Runs commands one after the other; returns what they printed on standard output."""
    row = json.dumps([[COMMANDS[command[0]], command] for command in commands])
    process = subprocess.run([sys.executable, "-c", DRIVER, row], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "Traceback" not in process.stderr
    return process.stdout


@pytest.mark.parametrize("model", ["argus/tiny", "hstu/tiny"])
def test_log_to_recommendations(tmp_path: Path, model: str) -> None:
    log, data, run, bundle = (str(tmp_path / name) for name in ("log", "data", "run", "bundle"))
    settings = ["num_steps=8", "stream.tokens_per_pack=512", "stream.lanes=2", "stream.max_history_events=128"]
    settings += ["log_every_steps=4", "evaluate_every_steps=4", "model.time_gap_buckets=8", f"model={model}"]
    table = run_commands(
        ["megarec-make-log", f"output={log}", "num_users=300", "num_items=200", "num_events=9000"],
        [
            "megarec-make-shards",
            f"input={log}/events-*.parquet",
            f"output={data}",
            "schema=yambda",
            "users_per_block=50",
        ],
        ["megarec-train", f"data={data}", f"run_dir={run}", *settings],
        ["megarec-evaluate", f"model={run}", f"data={data}", f"oracle={log}/oracle.parquet", f"output={run}"],
        ["megarec-convert", f"checkpoint={run}", f"data={data}", f"output={bundle}"],
        ["megarec-report", f"runs=[{run}]", f"output={tmp_path}/report.html"],
    )
    for row in ("MostPop", "DecayPop", "ItemKNN", "Markov", "oracle", "item rate", "user rate"):
        assert row in table
    assert re.search(
        r"\nread [\d,]+ events of [\d,]+ histories; left out: 0 events by stochastic length, [\d,]+ events older", table
    )
    assert (tmp_path / "run" / "tensorboard").is_dir()
    last = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()][-1]
    assert last["step"] == 8
    assert str(last["metrics"]["ndcg@10"]) in (tmp_path / "run" / "evaluation.json").read_text()  # one evaluation
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")

    events = pl.read_parquet(tmp_path / "log" / "events-*.parquet")
    user = pl.read_parquet(tmp_path / "data" / "vocab" / "user.parquet")["raw"][7]
    rows = events.filter(pl.col("uid") == user).to_dicts()
    request = {
        "user": user,
        "events": [{"item": row.pop("item_id"), "timestamp": row.pop("timestamp"), **row} for row in rows],
        "at": int(events["timestamp"].max()) + 60,
    }
    (tmp_path / "requests.jsonl").write_text(json.dumps(request) + "\n")
    answers = run_commands(
        ["megarec-recommend", f"bundle={bundle}", f"data={data}", f"user={user}", "k=5"],
        ["megarec-recommend", f"bundle={bundle}", f"history={tmp_path}/requests.jsonl", "k=5"],
    ).splitlines()
    assert len(answers) == 2
    for line in answers:
        recommended = [entry["item"] for entry in json.loads(line)["items"]]
        assert len(set(recommended)) == 5
        assert set(recommended) <= set(events["item_id"].to_list())
