"""One thread per process and no compilation: set before anything imports torch."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@pytest.fixture(scope="session")
def parity_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset that all rows of the parity table train on."""
    from tests.inference.synthetic import write_world

    path = tmp_path_factory.mktemp("parity") / "data"
    write_world(path, num_users=90)
    return path
