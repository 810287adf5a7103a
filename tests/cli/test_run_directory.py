"""A run that cannot begin leaves no run directory behind."""

from pathlib import Path

import pytest

from megarec.parallel.groups import ProcessInfo
from tests.cli.test_commands import call
from tests.inference.synthetic import write_world
from tests.ranks import run_ranks

SMALL = ("num_steps=3", "stream.lanes=2", "stream.tokens_per_pack=512", "stream.max_history_events=64")


def train(_: ProcessInfo, *arguments: str) -> int:
    return call("megarec-train", *SMALL, *arguments)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stream.lanes=1000", "fewer than stream.lanes=1000"),
        ("seed=-1", "seed is -1"),
        ("model.input_fields=[nothing]", "'nothing' is not a field"),
        ("optimizer.lr=inf", "optimizer.lr: expected a finite number"),
        ("objective.feedback_weight=-1", "a weight is not negative"),
    ],
)
def test_nothing_is_left(tmp_path: Path, setting: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    write_world(tmp_path / "data", num_users=40)
    where = [f"data={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}"]
    assert run_ranks(train, 1, *where, setting) == [2]
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
