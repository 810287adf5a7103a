"""Several models in one table: one dataset, one protocol, names of their own."""

from dataclasses import replace
from pathlib import Path

import pytest

from megarec.base.errors import UserError
from megarec.cli.evaluate import EvaluateConfig, Trained, dataset_of, named, protocol_of
from megarec.metrics.protocol import PROTOCOLS, Protocol
from tests.inference.synthetic import CONFIGS, write_world

TRAINED = Trained(
    model=CONFIGS["hstu"], dense={}, tables={}, step=1, max_history_events=12, is_checkpoint=True, data="some"
)


def test_rows_have_names_of_their_own() -> None:
    assert named(["runs/a", "runs/b"]) == {"a": "runs/a", "b": "runs/b"}
    assert named(["x/run", "y/run", "y/b"]) == {"x/run": "x/run", "y/run": "y/run", "b": "y/b"}
    with pytest.raises(UserError, match=r"^model: a model is named twice"):
        EvaluateConfig(model=["runs/a", "runs/../runs/a"])


def test_one_table_has_one_window() -> None:
    other = replace(TRAINED, max_history_events=50)
    assert protocol_of([TRAINED, TRAINED], Protocol()).max_history_events == 12
    assert protocol_of([TRAINED, other], PROTOCOLS["hstu_public"]) == PROTOCOLS["hstu_public"]
    assert protocol_of([], Protocol()).max_history_events is None
    with pytest.raises(UserError, match=r"the models read 12 and 50 events .* Give protocol.max_history_events"):
        protocol_of([TRAINED, other], Protocol())


def test_a_window_longer_than_any_in_training_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    protocol_of([TRAINED, replace(TRAINED, max_history_events=200)], PROTOCOLS["hstu_public"])
    assert "histories of up to 200 events for a model trained on at most 12" in "".join(capsys.readouterr())
    protocol_of([replace(TRAINED, max_history_events=200)], PROTOCOLS["hstu_public"])
    assert not any(capsys.readouterr())


def test_one_table_has_one_dataset(tmp_path: Path) -> None:
    data = str(write_world(tmp_path / "data", num_users=4).path)
    here = replace(TRAINED, data=data)
    assert dataset_of([here, here], None).path == Path(data)
    assert dataset_of([here, TRAINED], data).path == Path(data)
    with pytest.raises(UserError, match="trained on 2 datasets"):
        dataset_of([here, TRAINED], None)
    with pytest.raises(UserError, match="does not say which dataset"):
        dataset_of([here, replace(TRAINED, data=None)], None)
