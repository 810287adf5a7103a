from pathlib import Path

import pytest

from tests.inference.synthetic import write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "data"
    write_world(path, num_users=90)
    return path
