"""Which layers of the model each pipeline stage holds.

The stack is cut into chunks of neighbouring layers, `virtual` of them on every stage: chunk c is on stage
c % pipeline, so that a pack passes all stages once per virtual stage. The first chunk holds what lies before the
blocks too, the last one what lies behind them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megarec.parallel.layout import LayoutConfig


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One chunk of the model.

    Attributes:
        layers: the numbers of its layers in the whole stack.
        first: whether it holds what lies before the blocks.
        last: whether it holds what lies behind them.
    """

    layers: range
    first: bool = True
    last: bool = True


def cut_into_stages(layout: LayoutConfig, layers_per_chunk: Sequence[int], rank: int) -> list[Stage]:
    """The chunks of pipeline rank `rank`, in the order in which a pack passes them."""
    bounds = list(pairwise(accumulate(layers_per_chunk, initial=0)))
    return [
        Stage(layers=range(*bounds[chunk]), first=chunk == 0, last=chunk == len(bounds) - 1)
        for chunk in range(rank, len(bounds), layout.pipeline)
    ]


def balance_layers(num_layers: int, num_chunks: int, *, first: float, last: float) -> list[int]:
    """Layers per chunk, at least one each, such that the costliest chunk costs as little as possible.

    Where it makes no difference later chunks get more, because earlier ones hold more packs in flight.

    Args:
        num_layers: of the whole model, at least `num_chunks`.
        num_chunks: chunks over all stages.
        first: what lies before the blocks, in layers.
        last: what lies behind them, in layers.
    """
    layers = [1] * num_chunks
    extra = [0.0] * num_chunks
    extra[0] += first
    extra[-1] += last
    for _ in range(num_layers - num_chunks):
        cheapest = min(range(num_chunks), key=lambda chunk: (layers[chunk] + extra[chunk], -chunk))
        layers[cheapest] += 1
    return layers
