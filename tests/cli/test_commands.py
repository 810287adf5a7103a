"""What a user types, and what comes back: exit codes, one clear line, no traceback."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from megarec.base.files import sha256_of
from megarec.cli.evaluation_report import draw_bars
from megarec.cli.recommend import notes_on
from megarec.data.dataset import open_dataset
from megarec.inference.evaluate import Result
from megarec.inference.requests import RawReader, Request
from megarec.metrics.estimate import Estimate
from megarec.metrics.protocol import Protocol
from megarec.parallel.groups import ProcessInfo
from tests.inference.synthetic import write_world
from tests.ranks import run_ranks

COMMANDS = {
    "megarec-make-log": "megarec_tools.make_log.command",
    "megarec-make-shards": "megarec_tools.make_shards.command",
    "megarec-train": "megarec.cli.train",
    "megarec-evaluate": "megarec.cli.evaluate",
    "megarec-convert": "megarec_tools.convert.command",
    "megarec-recommend": "megarec.cli.recommend",
    "megarec-report": "megarec_tools.report.command",
}
HEAVY = ("torch", "matplotlib", "webdataset", "polars", "pyarrow")


def call(command: str, *arguments: str) -> int:
    """Runs a command in this process; returns its exit code."""
    sys.argv = [command, *arguments]
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(COMMANDS[command]).main()
    return int(ended.value.code or 0)


@pytest.fixture(autouse=True)
def _same_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_nothing_heavy(command: str) -> None:
    program = (
        f"import sys; sys.argv = [{command!r}, '--help']\n"
        f"import {COMMANDS[command]} as module\n"
        "try:\n    module.main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert command in run.stdout
    assert run.stdout.rstrip().endswith("[]"), run.stdout.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_typo_names_the_nearest_key(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    right = {"megarec-train": "num_steps", "megarec-report": "output", "megarec-recommend": "bundle"}
    key = right.get(command, "output")
    assert call(command, f"{key[:-1]}x=3") == 2
    error = capsys.readouterr().err
    assert "unknown key" in error
    assert f"Did you mean '{key}'?" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+model.depth=3"], "adds or removes a key"),
        (["modle=argus/tiny"], "unknown key 'modle'. Did you mean 'model'?"),
        (["model=argus_huge"], "model: 'argus_huge' is not there. Did you mean 'argus/large'?"),
        (["model=hstu"], "model: 'hstu' is not there. Did you mean 'hstu/tiny'?"),
        (["experiment=_parts/ml1m"], "experiment: '_parts/ml1m' is not there. Allowed: hstu_books"),
        (["experiment=quick"], "experiment: 'quick' is not there"),
        (["num_steps"], "not of the form key=value"),
        (["num_steps=many"], "num_steps: expected int, got 'many'"),
        (["precision=fp4"], "precision: 'fp4' is not allowed"),
        (["model.block.num_heads=5"], "width 64 is not a multiple of num_heads 5"),
        (["stream.tokens_per_pack=1000"], "stream.tokens_per_pack: 1000 is not a multiple of 16"),
        (["stream.seed=5"], "stream.seed: 5 would not count, seed decides. Set seed alone"),
        (["stream.tokens_per_event=2"], "stream.tokens_per_event: 2 would not count, model.token_layout decides"),
        (["stream.keep_last_event=true"], "stream.keep_last_event: True would not count, model.token_layout decides"),
        (["stream.prefix_tokens=3"], "stream.prefix_tokens: 3 would not count, model.prefix_fields decides"),
        (["layout.tensor=2"], "one replica takes 2 ranks (tensor x pipeline x context), which does not divide 1"),
        (["layout.context=2"], "which does not divide 1. Nearest layouts that work on 1 rank: tensor=1"),
        (["stream.max_history_events=4096"], "windows of 4096 events do not fit 512 positions"),
        (["checkpoint.keep_best=ndcg@10"], "nothing measures 'ndcg@10'. Set evaluate_every_steps"),
        (["protocol=hstu"], "protocol: 'hstu' is not there. Allowed: default, full_filter"),
        (["protocol.metrics=[ndgc@10]"], "protocol.metrics: no metric 'ndgc@10'"),
        (["data=nowhere"], "nowhere"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_train_refuses(tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = [] if any(a.startswith("data=") for a in arguments) else [f"data={tmp_path / 'data'}"]
    assert call("megarec-train", *data, f"run_dir={tmp_path / 'run'}", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint.keep_best=ndgc@10"], "checkpoint.keep_best: no metric 'ndgc@10'. Did you mean 'ndcg@10'?"),
        (["checkpoint.keep_best=hr@50"], "checkpoint.keep_best: no metric 'hr@50'"),
        (["checkpoint.keep_best=listend/auc"], "Did you mean 'listened/auc'?"),
        (["protocol=yambda"], "the protocol 'yambda' wants split.rule=global_time, the dataset has leave_last_out"),
        (["protocol.split=valid"], "the dataset has no valid split"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_impossible_evaluation_is_refused_before_training(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_world(tmp_path / "data", num_users=4)
    asked = [f"data={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}", "evaluate_every_steps=1", *arguments]
    assert call("megarec-train", *asked) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["num_steps=3"], []], ids=["one", "none"])
def test_train_without_data_says_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("megarec-train", *arguments) == 2
    assert "data not set. Give data=..." in capsys.readouterr().err


def test_help_shows_the_keys_of_the_model_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("megarec-train", "--help") == 0
    shown = capsys.readouterr().out
    assert "model=argus/large | argus/medium | argus/mini | argus/small | argus/tiny | hstu/books |" in shown
    assert "experiment=hstu_books | " in shown and "_parts" not in shown
    assert "feed_forward_multiple" in shown
    assert call("megarec-train", "model=hstu/tiny", "--help") == 0
    assert "model.block.num_time_buckets" in capsys.readouterr().out


def train_on_a_damaged_shard(_: ProcessInfo, data: Path, run_dir: Path, verify: bool) -> int:
    settings = [
        f"verify_shards={verify}",
        "num_steps=3",
        "stream.lanes=2",
        "stream.tokens_per_pack=512",
        "stream.max_history_events=64",
    ]
    return call("megarec-train", f"data={data}", f"run_dir={run_dir}", *settings)


@pytest.mark.parametrize(
    ("damage", "verify"), [("flipped", True), ("flipped", False), ("cut", False), ("another checksum", True)]
)
def test_train_refuses_a_damaged_shard(
    tmp_path: Path, damage: str, verify: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    write_world(tmp_path / "data", num_users=40)
    dataset = open_dataset(tmp_path / "data")
    shard = dataset.shard_path(dataset.shards_of("train")[0])
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[700] ^= 1
    elif damage == "cut":
        del content[-2048:]
    else:
        listed = tmp_path / "data" / "dataset.json"
        listed.write_text(listed.read_text().replace(sha256_of(shard), "0" * 64))
    shard.write_bytes(content)
    assert run_ranks(train_on_a_damaged_shard, 1, tmp_path / "data", tmp_path / "run", verify) == [2]
    error = capfd.readouterr().err
    assert "shard-000000.tar" in error
    assert "Traceback" not in error


def test_a_row_may_be_called_as_mathematics_is(tmp_path: Path) -> None:
    scores = {"mrr": Estimate(value=0.5, standard_error=0.1, count=4)}
    draw_bars(
        tmp_path / "bars.png",
        [Result(name="r$A^$", protocol=Protocol(), split={}, counts={}, ranking=scores)],
        metric="mrr",
    )
    assert (tmp_path / "bars.png").is_file()


def test_the_settings_can_be_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("megarec-train", "data=somewhere", "experiment=quickstart", "model.dropout=0.3", "--show-config") == 0
    shown = capsys.readouterr().out
    assert "dropout: 0.3" in shown
    assert "data: somewhere" in shown


def test_what_a_request_brings_in_vain_is_said(tmp_path: Path) -> None:
    dataset = write_world(tmp_path / "data", num_users=4)
    reader = RawReader(dataset)
    reader.read([Request(events=[{"item": "nothing", "timestamp": 1_700_000_000, "devise": "phone"}])])
    assert notes_on(reader, columns=dataset.schema.columns()) == [
        "1 values of 'item' are not in the vocabulary",
        "'devise' is no column of the log (1 times). Did you mean 'device'?",
    ]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("megarec-train", ["data=nowhere"]),
        ("megarec-evaluate", ["data=nowhere", "model=nowhere"]),
        ("megarec-recommend", ["bundle=nowhere"]),
    ],
)
def test_a_gpu_that_is_not_there(
    command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert call(command, *arguments, "device=cuda") == 2
    assert "device: torch sees no GPU on this machine. Set device=cpu" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_every_key_means(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    lines = capsys.readouterr().out.split("what they mean:", 1)[1].splitlines()
    keys = [number for number, line in enumerate(lines) if line.startswith("  ") and line[2] != " "]
    assert keys
    for number in keys:
        assert lines[number + 1].startswith(" " * 6), f"{lines[number]} is not explained"
