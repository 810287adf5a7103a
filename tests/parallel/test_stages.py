"""The stack of layers, cut into chunks that cost about the same."""

from itertools import product

import pytest

from megarec.parallel.layout import LayoutConfig
from megarec.parallel.stages import balance_layers, cut_into_stages


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    return [c for c in product(range(1, total + 1), repeat=parts) if sum(c) == total]


@pytest.mark.parametrize(("first", "last"), [(0.0, 0.0), (0.1, 2.5), (0.4, 0.6), (3.0, 0.0), (0.0, 20.0)])
@pytest.mark.parametrize(("num_layers", "num_chunks"), [(4, 1), (4, 4), (7, 3), (8, 4), (9, 2)])
def test_no_other_cut_has_a_cheaper_costliest_chunk(
    num_layers: int, num_chunks: int, first: float, last: float
) -> None:
    def costliest(layers: tuple[int, ...]) -> float:
        costs = [float(count) for count in layers]
        costs[0] += first
        costs[-1] += last
        return max(costs)

    found = tuple(balance_layers(num_layers, num_chunks, first=first, last=last))
    assert sum(found) == num_layers
    assert costliest(found) == min(costliest(other) for other in compositions(num_layers, num_chunks))


def test_later_chunks_get_the_rest() -> None:
    assert balance_layers(6, 4, first=0.0, last=0.0) == [1, 1, 2, 2]
    assert balance_layers(6, 4, first=0.0, last=1.0) == [1, 2, 2, 1]


def test_chunks_go_round_the_stages() -> None:
    layout = LayoutConfig(pipeline=2, virtual=2)
    stages = [cut_into_stages(layout, [1, 2, 3, 4], rank) for rank in range(2)]
    assert [[stage.layers for stage in chunks] for chunks in stages] == [
        [range(1), range(3, 6)],
        [range(1, 3), range(6, 10)],
    ]
    assert [[(stage.first, stage.last) for stage in chunks] for chunks in stages] == [
        [(True, False), (False, False)],
        [(False, False), (False, True)],
    ]


def test_one_stage_is_the_whole() -> None:
    (stage,) = cut_into_stages(LayoutConfig(), [5], 0)
    assert stage.first
    assert stage.last
    assert stage.layers == range(5)
