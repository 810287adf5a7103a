"""What a user of `megarec-make-log` sees."""

import subprocess
import sys
from pathlib import Path

import pytest
from megarec_tools.make_log.config import MakeLogConfig

from megarec.base.errors import UserError


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megarec_tools.make_log.command", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_names_every_setting() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in MakeLogConfig.__dataclass_fields__)


def test_writes_a_log_then_refuses_to_write_over_it(tmp_path: Path) -> None:
    arguments = (f"output={tmp_path / 'log'}", "num_users=50", "num_items=60", "num_events=2000")
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "50 users" in done.stdout
    assert sorted(p.name for p in (tmp_path / "log").iterdir()) == [
        "events-00000.parquet",
        "log.json",
        "oracle.parquet",
    ]
    done = run(*arguments)
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_typo_is_refused_with_the_nearest_key() -> None:
    done = run("output=x", "num_user=3")
    assert done.returncode == 2
    assert "num_users" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_users", 0),
        ("num_items", 5),
        ("num_items", 2**31),
        ("num_events", 3_999),
        ("num_days", 0),
        ("num_genres", 0),
        ("num_genres", 257),
        ("popularity_exponent", -0.1),
        ("length_sigma", 2.1),
        ("length_sigma", float("nan")),
        ("taste_strength", -1.0),
        ("taste_drift", -1.0),
        ("session_events", 0.5),
        ("events_per_file", 10),
        ("chunk_events", 0),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=name):
        MakeLogConfig(**{"output": "x", name: value})  # type: ignore[arg-type]
