"""One thread per process and no compilation: set before anything imports torch."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
if not Path("/dev/nvidiactl").exists():  # Triton asks when a kernel is defined; `import torch` would be too early
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def parity_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset that all rows of the parity table train on."""
    from tests.inference.synthetic import write_world

    path = tmp_path_factory.mktemp("parity") / "data"
    write_world(path, num_users=90)
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the proof of the layouts costs stands below every run that holds it."""
    reports = [r for r in terminalreporter.stats.get("passed", []) if r.nodeid.startswith("tests/parity/")]
    rows = [r for r in reports if "test_layouts_agree" in r.nodeid and r.when == "call"]
    if rows:
        seconds = sum(r.duration for r in reports)
        terminalreporter.write_line(f"parity: {len(rows)} rows of the table agree; tests/parity took {seconds:.0f} s")
