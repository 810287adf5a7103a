"""A checkpoint of torch's AdamW goes on with a FusedAdam, and the other way round."""

import pytest
import torch
from torch import Tensor

from megarec.optim.dense import DenseOptimizer
from megarec.parallel.broadcast import broadcast_object
from megarec.parallel.groups import ParallelGroups, ProcessInfo, start
from megarec.parallel.layout import LayoutConfig
from tests.optim.test_dense import build, update
from tests.optim.test_fused_adam import FusedAdam
from tests.ranks import run_ranks

TOLERANCE = 16 * torch.finfo(torch.float32).eps
"""One update of numbers below 2, whose 8 operations each round at another place."""


def choose(patch: pytest.MonkeyPatch, *, fused: bool) -> None:
    patch.setattr("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER", not fused)
    for module in ("optimizer", "optimizer.distrib_optimizer"):
        patch.setattr(f"megatron.core.{module}.Adam", FusedAdam if fused else torch.optim.AdamW)


def saved(groups: ParallelGroups, chunk: torch.nn.Module, optimizer: DenseOptimizer) -> tuple[dict[str, Tensor], ...]:
    pieces = {name: piece.clone() for name, piece in optimizer.state_pieces().items()}
    weights = {name: weight.clone() for name, weight in chunk.state_dict().items() if weight is not None}
    return broadcast_object(pieces, groups.copies), weights


def change(process: ProcessInfo, dtype: torch.dtype, zero1: bool, fused_first: bool, lost: int) -> float:
    """The largest difference of a weight or moment after a third update, taken by the one kind and by the other."""
    groups = start(LayoutConfig(zero1=zero1), process)
    with pytest.MonkeyPatch.context() as patch:
        choose(patch, fused=fused_first)
        chunks, optimizer = build(groups, dtype)
        choose(patch, fused=not fused_first)
        other_chunks, other = build(groups, dtype)
    assert [type(x._adam).__name__ == "FusedAdam" for x in (optimizer, other)] == [fused_first, not fused_first]
    for step in range(2):
        update(groups, chunks, optimizer, step)
    pieces, weights = saved(groups, chunks[0], optimizer)
    other_chunks[0].load_state_dict(weights)
    other.load_state_pieces(pieces, optimizer.num_updates - lost)
    for each, of_chunks in ((optimizer, chunks), (other, other_chunks)):
        update(groups, of_chunks, each, 2)
    assert other.num_updates == optimizer.num_updates - lost == 3 - lost
    (pieces, weights), (other_pieces, other_weights) = (
        saved(groups, chunks[0], optimizer),
        saved(groups, other_chunks[0], other),
    )
    if dtype == torch.float32:  # bf16 ones may fall on two sides of a tie; their fp32 copies are compared
        pieces, other_pieces = pieces | weights, other_pieces | other_weights
    return max(float((pieces[name] - other_pieces[name]).abs().max()) for name in pieces)


@pytest.mark.parametrize("zero1", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused_first", [False, True])
def test_the_next_update_is_the_same(dtype: torch.dtype, zero1: bool, fused_first: bool) -> None:
    assert max(run_ranks(change, 2 if zero1 else 1, dtype, zero1, fused_first, 0)) <= TOLERANCE


@pytest.mark.parametrize("fused_first", [False, True])
def test_a_lost_count_is_seen(fused_first: bool) -> None:
    (difference,) = run_ranks(change, 1, torch.float32, False, fused_first, 2)
    assert difference > 100 * TOLERANCE
