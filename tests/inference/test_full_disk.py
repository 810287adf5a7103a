"""A disk that fills up while a bundle is written is said as such and leaves nothing."""

import errno
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from megarec.inference import bundle as bundle_module
from megarec.inference.bundle import BundleConfig, write_bundle
from tests.inference.synthetic import CONFIGS, FIELDS, MAX_EVENTS, SCHEMA, random_weights, write_world


def no_space(*_: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_leaves_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_world(tmp_path / "data")
    model = CONFIGS["argus"]
    weights = random_weights(model)
    config = BundleConfig(
        model=model, schema=SCHEMA, fields=FIELDS, has_timestamps=True, max_history_events=MAX_EVENTS, split={}
    )
    monkeypatch.setattr(bundle_module, "save_file", no_space)
    with pytest.raises(OSError, match="No space left") as raised:
        write_bundle(tmp_path / "bundle", config, dense=weights.dense, tables=weights.tables, dataset=dataset)
    assert raised.value.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
