"""Real data sets, which are never committed: tests that use them skip when they are absent."""

import os
from pathlib import Path

import pytest

NEIGHBOUR = Path(__file__).resolve().parents[2] / "shared" / "data"


def data_file(name: str) -> Path:
    """The file `name` in the directory $MEGAREC_DATA, or else in `../shared/data` beside the repository."""
    path = Path(os.environ.get("MEGAREC_DATA") or NEIGHBOUR) / name
    if not path.is_file():
        pytest.skip(f"{name} is not at hand: put it into $MEGAREC_DATA")
    return path
