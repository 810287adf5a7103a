"""Where a setting is wrong, as the user typed it."""

from typing import Any

import pytest

from megarec.base.config import build
from megarec.base.errors import UserError
from megarec.data.schema import Schema
from megarec.train.config import TrainConfig

ARGUS = {"data": "x", "model": {"name": "argus"}}


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({**ARGUS, "num_steps": 0}, "num_steps: must be at least 1"),
        ({**ARGUS, "optimizer": {"lr": 0}}, "optimizer.lr: must be above 0"),
        ({**ARGUS, "stream": {"lanes": 0}}, "stream: lanes is 0. Set it to 1 or more"),
        ({**ARGUS, "model": {"name": "hstu", "block": {"num_heads": 0}}}, "model.block.num_heads: 0 is not above 0"),
        ({**ARGUS, "model": {"name": "argus", "heads": {"temperature": 0}}}, "model.heads.temperature: 0.0 is not"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.split(":")[0],
)
def test_a_refused_value_is_named_by_its_whole_path(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        build(TrainConfig, settings)
    assert str(error.value).startswith(line)


def test_a_refused_field_of_a_schema_is_named() -> None:
    field = {"column": "c", "role": "context", "kind": "flag", "edges": [1.0]}
    with pytest.raises(UserError, match=r"^fields\.percent: edges and num_quantiles belong to numeric fields"):
        build(Schema, {"name": "s", "user": "u", "item": "i", "fields": {"percent": field}})
