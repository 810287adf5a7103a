"""The committed signatures are those of Transformer Engine's sources, at both ends of the versions that are taken."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.fp8.fake_engine import DECLARED
from tests.parallel.fp8.read_engine_signatures import read


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.9.0", DECLARED["version"]])
def test_they_are_those_of_the_sources(tmp_path: Path, version: str) -> None:
    """Downloads 0.7 MB and installs nothing."""
    wanted = ["--no-deps", "--only-binary=:all:", "--dest", str(tmp_path), f"transformer-engine=={version}"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=0", "--timeout=15", *wanted]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = tmp_path.glob("*.whl")
    found = read(wheel)
    assert found["calls"] == DECLARED["calls"]
    assert (found == DECLARED) is (version == DECLARED["version"])
