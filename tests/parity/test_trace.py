"""The page on parallelism says what the code sends; formulas, pictures and tables come from the same traces."""

from pathlib import Path

import pytest
import torch.distributed as dist
from torch import Tensor

from megarec.layers.hstu_block import HstuBlock
from tests.parity.pictures.page import BLOCKS, Traces, insert, table_of_layers, tables, trace_all
from tests.parity.pictures.stages import schedule_times
from tests.parity.trace import trace_run
from tests.parity.traffic import calls_in_a_layer, numbers_per_token

PAGE = Path(__file__).parents[2] / "docs" / "parallelism.md"
WIDTH = 32


def expected_numbers(kind: str, model: str, ranks: int) -> float:
    """What the page says a rank sends in a layer, both passes, in vectors of `WIDTH` per token of the pack."""
    n, halves = ranks, 1 if model == "hstu" else 2
    norm = 4 * (n - 1) / WIDTH if model == "hstu" else 0.0
    return {
        "tensor": 4 * halves * (n - 1) / n + norm,
        "sequence": 5 * halves * (n - 1) / n + norm,
        "context by heads": 8 * (n - 1) / n**2,
        "context in a ring": (6 * n - 4) / n,
    }[kind]


@pytest.fixture(scope="module")
def traces(parity_data: Path) -> Traces:
    return trace_all(parity_data)


def test_the_tables_of_the_page_are_what_the_code_does(traces: Traces) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert insert(page, tables(traces)) == page, "write them again: python -m tests.parity.draw docs/pictures"


@pytest.mark.parametrize("model", BLOCKS)
@pytest.mark.parametrize("kind", ["tensor", "sequence", "context by heads", "context in a ring"])
def test_costs_are_those_of_the_formulas(traces: Traces, kind: str, model: str) -> None:
    sums = numbers_per_token(calls_in_a_layer(traces[kind, model]), WIDTH)
    assert sum(sums.values()) == pytest.approx(expected_numbers(kind, model, 2), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("model", BLOCKS)
@pytest.mark.parametrize(
    ("kind", "layout"),
    [("tensor", "tp4"), ("sequence", "tp4 sp"), ("context by heads", "cp4"), ("context in a ring", "ring4")],
)
def test_costs_on_four_ranks(parity_data: Path, kind: str, layout: str, model: str) -> None:
    sums = numbers_per_token(calls_in_a_layer(trace_run(parity_data, layout, model)), WIDTH)
    assert sum(sums.values()) == pytest.approx(expected_numbers(kind, model, 4), rel=1e-9)


def test_virtual_stages_halve_the_idle_time(traces: Traces) -> None:
    for kind, busy in (("pipeline", 4 / 5), ("virtual stages", 8 / 9)):
        times = schedule_times(traces[kind, "argus"])
        end = max(stop for _, stop in times.values())
        assert sum(stop - begin for begin, stop in times.values()) / (2 * end) == pytest.approx(busy)


def plant_a_sum() -> None:
    forward = HstuBlock.forward

    def and_a_sum(self: HstuBlock, *args: Tensor) -> Tensor:
        out = forward(self, *args)
        dist.all_reduce(out.detach().clone())
        return out

    HstuBlock.forward = and_a_sum  # type: ignore[method-assign]


def test_a_sum_too_many_is_seen(traces: Traces, parity_data: Path) -> None:
    faulty = {**traces, ("tensor", "hstu"): trace_run(parity_data, "tp2", "hstu", plant=plant_a_sum)}
    assert "all-reduce | `world`" in table_of_layers(faulty, "tensor")
    assert tables(faulty)["tensor"] != tables(traces)["tensor"]
