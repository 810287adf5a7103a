"""A layout changes nothing: the rows of `tests/parity/table.py`."""

from pathlib import Path

import pytest

from tests.parity.layout_runs import largest_difference, make_run, train_fp64, twin_of
from tests.parity.table import LAYOUTS, TABLE, Row
from tests.ranks import run_ranks

ROWS = [pytest.param(row, marks=[pytest.mark.slow] if row.slow else [], id=str(row)) for row in TABLE]


@pytest.mark.parametrize("row", ROWS)
def test_weights_are_those_of_one_process(parity_data: Path, row: Row) -> None:
    one = twin_of(parity_data, row.layout, row.switches)
    ranks = run_ranks(train_fp64, LAYOUTS[row.layout].world, make_run(parity_data, row.layout, row.switches))
    assert max(largest_difference(ranks[0], other) for other in ranks) == 0.0
    assert largest_difference(one, ranks[0]) <= 1e-12, row.isolates
