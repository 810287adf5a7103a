"""Megatron-Core's DDP and schedule against plain torch, on one rank and on several."""

import pytest
import torch
from torch import Tensor

from megarec.parallel.engine import finalize, run_schedule, transformer_config, wrap_ddp
from megarec.parallel.groups import ParallelGroups, ProcessInfo, start
from megarec.parallel.layout import LayoutConfig
from megarec.parallel.megatron_parts import megatron_parts
from megarec.parallel.parts import local_parts
from megarec.parallel.placement import placements
from tests.parallel.tiny_model import HEADS, WIDTH, TinyModel, loss_of, packs_of
from tests.ranks import run_ranks

STEPS = 3
LR = 0.1


def make(groups: ParallelGroups, dtype: torch.dtype):
    config = transformer_config(groups.layout, width=WIDTH, num_heads=HEADS, dtype=dtype)
    model = TinyModel(megatron_parts(groups, config))
    return model, wrap_ddp(groups, [model], config)


def train(process: ProcessInfo, layout: LayoutConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Plain SGD by hand on Megatron-Core's gradients; whole weights, put together from the tensor-parallel pieces."""
    groups = start(layout, process)
    model, wrapped = make(groups, dtype)
    losses = []
    for step in range(STEPS):
        packs = packs_of(step)
        total = sum(int(pack["valid"].sum()) for pack in packs)
        mine = packs[groups.data.rank :: groups.data.size]

        def forward_step(pack, *_, total=total):
            loss = loss_of(model, pack, total)
            return loss, {"loss": loss.item()}

        wrapped[0].zero_grad_buffer()
        reports = run_schedule(wrapped, forward_step, mine, tokens_per_pack=5)
        finalize(wrapped, groups)
        losses.append(sum(report["loss"] for report in reports))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LR * parameter.main_grad
    pieces = {}
    for parameter, placement in placements(model):
        pieces[placement.global_name] = (placement.split_dim, placement.offset, parameter.detach().clone())
    return {"pieces": pieces, "losses": losses, "tensor_rank": groups.tensor.rank, "data_rank": groups.data.rank}


def twin() -> tuple[dict[str, Tensor], list[float]]:
    """The same steps in plain torch."""
    model = TinyModel(local_parts()).double()
    losses = []
    for step in range(STEPS):
        packs = packs_of(step)
        total = sum(int(pack["valid"].sum()) for pack in packs)
        model.zero_grad()
        loss = sum(loss_of(model, pack, total) for pack in packs)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LR * parameter.grad
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, losses


def assert_equal_weights(results, want: dict[str, Tensor], tolerance: float) -> None:
    for result in results:
        assert result["pieces"].keys() == want.keys()
        for name, (split_dim, offset, piece) in result["pieces"].items():
            whole = want[name]
            if split_dim is not None:
                whole = whole.narrow(split_dim, offset, piece.shape[split_dim])
            torch.testing.assert_close(piece.double(), whole, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, LayoutConfig()),
        (2, LayoutConfig()),
        (4, LayoutConfig()),
        (2, LayoutConfig(tensor=2)),
        (4, LayoutConfig(tensor=2)),
    ],
    ids=["dp1", "dp2", "dp4", "tp2", "tp2-dp2"],
)
def test_every_layout_equals_plain_torch(world: int, layout: LayoutConfig) -> None:
    want, losses = twin()
    results = run_ranks(train, world, layout, torch.float64)
    assert_equal_weights(results, want, 1e-12)
    for step in range(STEPS):
        total = sum(result["losses"][step] for result in results if result["tensor_rank"] == 0)
        assert total == pytest.approx(losses[step], abs=1e-12)


def test_bf16_weights_have_fp32_gradients() -> None:
    want, _ = twin()
    results = run_ranks(train, 2, LayoutConfig(), torch.bfloat16)
    assert_equal_weights(results, want, 0.05)


def same_output_and_gradients(process: ProcessInfo) -> None:
    groups = start(LayoutConfig(), process)
    config = transformer_config(groups.layout, width=WIDTH, num_heads=HEADS, dtype=torch.float64)
    filled = TinyModel(megatron_parts(groups, config)).double()
    plain = TinyModel(local_parts()).double()
    filled.load_state_dict(plain.state_dict())
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    (one := filled(x)).square().sum().backward()
    (other := plain(x)).square().sum().backward()
    torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    for (name, a), (_, b) in zip(filled.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14, msg=name)


def test_both_fillings_agree() -> None:
    run_ranks(same_output_and_gradients, 1)
