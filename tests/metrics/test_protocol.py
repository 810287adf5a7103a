"""Ready protocols: what they fix, what they demand, and that a changed field is said."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, get_args

import pytest

from megarec.base.config import build, plain
from megarec.base.errors import UserError
from megarec.data.dataset import Dataset
from megarec.metrics.protocol import PROTOCOLS, Name, Protocol
from tests.inference.synthetic import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_world(tmp_path_factory.mktemp("world") / "data", num_users=4)


def test_every_name_has_its_protocol() -> None:
    assert list(PROTOCOLS) == list(get_args(Name))
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name and protocol.changed == [] and protocol.label == name
        assert build(Protocol, plain(protocol)) == protocol


def test_a_changed_field_is_said() -> None:
    public = PROTOCOLS["hstu_public"]
    assert replace(public, filter_seen="full").label == "hstu_public, filter_seen=full"
    changed = replace(public, metrics=("hr@10", "mrr"), max_history_events=50, mrr_depth=None)
    assert changed.label == "hstu_public, metrics=[hr@10,mrr], max_history_events=50, mrr_depth=None"
    assert replace(PROTOCOLS["default"], max_history_events=50).changed == []  # the model's own window


def test_cut_offs_are_those_of_the_metrics() -> None:
    assert Protocol(metrics=("ndcg@100", "mrr", "hr@5", "recall@100")).cutoffs == [5, 100]
    assert Protocol(metrics=("mrr",)).cutoffs == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ("ndgc@10",)}, "metrics: no metric 'ndgc@10'"),
        ({"metrics": ("hr@0",)}, "metrics: no metric 'hr@0'"),
        ({"metrics": ("mrr@10",)}, "metrics: no metric 'mrr@10'"),
        ({"metrics": ()}, "metrics: must name metrics"),
        ({"metrics": ("mrr", "mrr")}, "metrics: must name metrics, each once"),
        ({"mrr_depth": 0}, "mrr_depth: must be at least 1"),
        ({"max_history_events": 0}, "max_history_events: must be at least 1"),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        Protocol(**fields)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("hstu_public", {"rule": "leave_last_out"}, None),
        ("hstu_public", {"rule": "user_holdout"}, "wants split.rule=leave_last_out, the dataset has user_holdout"),
        ("hstu_public", {"rule": "leave_last_out", "validation_users": 9}, "wants split.validation_users=0"),
        ("full_filter", {"rule": "leave_last_out", "validation_users": 9}, None),
        ("gsasrec", {"rule": "leave_last_out", "validation_users": 512}, None),
        ("gsasrec", {"rule": "leave_last_out"}, "wants split.validation_users=512, the dataset has 0"),
        ("yambda", {"rule": "global_time", "cut": 5e6, "gap": 1800.0}, None),
        ("yambda", {"rule": "global_time", "cut": 5e6, "gap": 0.0}, "wants split.gap=1800.0, the dataset has 0.0"),
        ("yambda", {"rule": "leave_last_out"}, "wants split.rule=global_time"),
        ("default", {"rule": "user_holdout"}, None),
    ],
)
def test_a_dataset_that_cannot_serve_is_refused(
    world: Dataset, name: str, split: dict[str, Any], message: str | None
) -> None:
    dataset = replace(world, split=split)
    with pytest.raises(UserError, match=message) if message else nullcontext():
        PROTOCOLS[name].check(dataset)


def test_a_split_and_a_flag_must_be_there(world: Dataset) -> None:
    with pytest.raises(UserError, match="the dataset has no valid split"):
        Protocol(split="valid").check(world)
    for flag in ("liked", "device", "ratio"):
        with pytest.raises(UserError, match=f"no feedback flag '{flag}'"):
            Protocol(target_flag=flag).check(world)
    Protocol(target_flag="listened").check(world)
