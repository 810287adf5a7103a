"""The loss curve of a layout is that of one process: fp32 with Adam over 20 steps, and bf16 as close as bf16 is."""

from pathlib import Path

import pytest

from megarec.base.config import build, plain
from megarec.train.config import TrainConfig
from tests.parity.layout_runs import make_run, train_losses, with_layout
from tests.parity.table import CURVES, LAYOUTS, Row
from tests.ranks import run_ranks

SETTINGS = {"num_steps": 20, "tables": {}, "optimizer": {}}
ROWS = [pytest.param(row, marks=[pytest.mark.slow] if row.slow else [], id=row.layout) for row in CURVES]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("switches", ["argus", "hstu"])
def test_fp32_losses_with_adam(parity_data: Path, switches: str, row: Row) -> None:
    config = make_run(parity_data, row.layout, switches, **SETTINGS)
    (one,) = run_ranks(train_losses, 1, with_layout(config, {}))
    ranks = run_ranks(train_losses, LAYOUTS[row.layout].world, config)
    assert len(one) == 60
    for a, b in zip(one, ranks[0], strict=True):
        assert abs(a - b) <= 1e-6 * max(1.0, abs(a)), row.isolates


@pytest.mark.parametrize("row", ROWS)
def test_bf16_stays_close_to_fp32(parity_data: Path, row: Row) -> None:
    fp32 = make_run(parity_data, row.layout, "argus", **SETTINGS)
    bf16 = build(TrainConfig, {**plain(fp32), "precision": "bf16"})
    (exact,) = run_ranks(train_losses, 1, with_layout(fp32, {}))
    (one,) = run_ranks(train_losses, 1, with_layout(bf16, {}))
    ranks = run_ranks(train_losses, LAYOUTS[row.layout].world, bf16)
    error_one = max(abs(a - b) for a, b in zip(exact, one, strict=True))
    error = max(abs(a - b) for a, b in zip(exact, ranks[0], strict=True))
    assert 0 < error_one < 0.2
    assert error <= 2 * error_one, row.isolates
