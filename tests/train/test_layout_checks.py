"""Layouts that do not fit are refused before any process group is made."""

from pathlib import Path
from typing import Any

import pytest

from megarec.base.errors import UserError
from megarec.train.checks import check_run
from tests.train.runs import SMALL_SASREC, make_config

REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "world": (3, {"layout": {"tensor": 2}}, "does not divide 3"),
    "heads": (4, {"layout": {"tensor": 2, "context": 2}}, "2 heads do not divide over 4 ranks"),
    "dropout in a ring": (
        2,
        {"layout": {"context": 2, "context_by": "ring"}, "model": SMALL_SASREC},
        "the dropout of attention probabilities is not made in a ring",
    ),
    "channels": (
        2,
        {"layout": {"tensor": 2}, "model": {**SMALL_SASREC, "block": {"num_heads": 2, "feed_forward_width": 7}}},
        "7 channels",
    ),
    "layers": (4, {"layout": {"pipeline": 4}}, "2 layers are not enough for 4 chunks"),
    "layers of chunks": (2, {"layout": {"pipeline": 2, "layers_per_chunk": [1, 2]}}, "3 layers in chunks, 2"),
    "number of chunks": (2, {"layout": {"pipeline": 2, "layers_per_chunk": [2]}}, "must be 2 numbers"),
    "rounds of packs": (
        2,
        {
            "layout": {"pipeline": 2, "virtual": 2},
            "model": {**SMALL_SASREC, "num_layers": 4},
            "stream": {"lanes": 1, "packs_per_lane": 3, "tokens_per_pack": 96, "max_history_events": 12},
        },
        "3 packs per replica",
    ),
    "virtual without stages": (1, {"layout": {"virtual": 2}}, "virtual stages need"),
    "sequence parallel alone": (1, {"layout": {"sequence_parallel": True}}, "there is one"),
    "lanes": (4, {}, "2 lanes cannot be shared by 4"),
}


def test_a_ring_needs_no_heads_for_its_ranks(tmp_path: Path) -> None:
    """Four ranks, two of them a ring: two heads go over the tensor-parallel ranks alone."""
    layout = {"tensor": 2, "context": 2, "context_by": "ring"}
    stream = {"tokens_per_pack": 128, "lanes": 2, "max_history_events": 12}
    check_run(make_config(tmp_path, tmp_path, layout=layout, stream=stream), world=4)
    alone = {"context": 1, "context_by": "ring"}  # is no ring, and drops what it likes
    check_run(make_config(tmp_path, tmp_path, layout=alone, model=SMALL_SASREC), world=1)


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(tmp_path: Path, name: str) -> None:
    world, settings, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        check_run(make_config(tmp_path, tmp_path, **settings), world=world)
