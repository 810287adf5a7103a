"""Each planted fault makes a row of the table fail, by far more than its tolerance."""

from pathlib import Path

import pytest

from tests.parity.faults import FAULTS
from tests.parity.layout_runs import largest_difference, make_run, train_fp64, twin_of
from tests.parity.table import LAYOUTS
from tests.ranks import run_ranks


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(parity_data: Path, name: str) -> None:
    fault = FAULTS[name]
    one = twin_of(parity_data, fault.layout, fault.switches)
    config = make_run(parity_data, fault.layout, fault.switches)
    faulty = run_ranks(train_fp64, LAYOUTS[fault.layout].world, config, name)[0]
    assert largest_difference(one, faulty) > 1e-8
