"""The dense optimizer on Megatron-Core against `torch.optim.AdamW`."""

import pytest
import torch
from torch import Tensor

from megarec.optim.config import OptimizerSettings
from megarec.optim.dense import DenseOptimizer
from megarec.parallel.broadcast import broadcast_object
from megarec.parallel.engine import finalize, run_schedule, transformer_config, wrap_ddp
from megarec.parallel.groups import ProcessInfo, start
from megarec.parallel.layout import LayoutConfig
from megarec.parallel.megatron_parts import megatron_parts
from megarec.parallel.parts import local_parts
from megarec.parallel.placement import name_parameters
from tests.parallel.tiny_model import HEADS, WIDTH, TinyModel, loss_of, packs_of
from tests.ranks import run_ranks

SETTINGS = OptimizerSettings(lr=0.05, beta2=0.95, weight_decay=0.3, clip_norm=0.5)
STEPS = 5


def build(groups, dtype: torch.dtype):
    config = transformer_config(groups.layout, width=WIDTH, num_heads=HEADS, dtype=dtype)
    wrapped = wrap_ddp(groups, [TinyModel(megatron_parts(groups, config))], config)
    return wrapped, DenseOptimizer(groups, wrapped, SETTINGS)


def rate(step: int) -> float:
    return 0.05 / (step + 1)


def update(groups, wrapped, optimizer: DenseOptimizer, step: int) -> float:
    packs = [{name: x.to(groups.device) for name, x in pack.items()} for pack in packs_of(step)]
    total = sum(int(pack["valid"].sum()) for pack in packs)
    mine = packs[groups.data.rank :: groups.data.size]
    model = wrapped[0].module.module
    optimizer.zero()
    run_schedule(
        wrapped,
        lambda pack, *_: (loss_of(model, pack, total), {}),
        mine,
        tokens_per_pack=5,
    )
    finalize(wrapped, groups)
    optimizer.prepare_grads()
    norm = optimizer.square_norm().sqrt()
    optimizer.scale_grads(torch.clamp(SETTINGS.clip_norm / norm, max=1.0))
    optimizer.step(rate(step))
    return norm.item()


def train(process: ProcessInfo, layout: LayoutConfig, dtype: torch.dtype):
    groups = start(layout, process)
    wrapped, optimizer = build(groups, dtype)
    norms = [update(groups, wrapped, optimizer, step) for step in range(STEPS)]
    weights = {name: p.detach().clone() for name, p in wrapped[0].module.module.named_parameters()}
    assert optimizer.num_updates == STEPS
    return weights, norms, {name: piece.clone() for name, piece in optimizer.state_pieces().items()}


def twin(dtype: torch.dtype) -> tuple[dict[str, Tensor], list[float], dict[str, dict[str, Tensor]]]:
    model = TinyModel(local_parts()).to(dtype)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95), eps=1e-8)
    norms = []
    for step in range(STEPS):
        packs = packs_of(step)
        total = sum(int(pack["valid"].sum()) for pack in packs)
        adam.zero_grad()
        for pack in packs:
            loss_of(model, pack, total).backward()
        norm = torch.sqrt(sum(p.grad.double().square().sum() for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad.mul_(torch.clamp(0.5 / norm, max=1.0))
        norms.append(norm.item())
        for group in adam.param_groups:
            group["lr"] = rate(step)
        adam.step()
    named = dict(model.named_parameters())
    return {n: p.detach() for n, p in named.items()}, norms, {n: adam.state[p] for n, p in named.items()}


@pytest.mark.parametrize(
    ("world", "dtype", "tolerance", "zero1"),
    [
        (1, torch.float64, 1e-12, False),
        (2, torch.float64, 1e-12, False),
        (1, torch.float32, 2e-5, False),
        (2, torch.float32, 2e-5, False),
        (1, torch.float32, 2e-5, True),
        (4, torch.float32, 2e-5, True),
    ],
)
def test_equals_torch_adamw(world: int, dtype: torch.dtype, tolerance: float, zero1: bool) -> None:
    want, want_norms, want_state = twin(dtype)
    ranks = run_ranks(train, world, LayoutConfig(zero1=zero1), dtype)
    assert not (zero1 and any(pieces for _, _, pieces in ranks[1:]))  # the first rank has them all
    for weights, norms, pieces in ranks:
        assert norms == pytest.approx(want_norms, rel=max(tolerance, 1e-12))
        assert min(want_norms) > 0.5  # clipping was at work
        for name, weight in want.items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=tolerance, msg=name)
            for moment in ("exp_avg", "exp_avg_sq") if pieces else ():
                got = pieces[f"{name}/{moment}"]
                torch.testing.assert_close(got, want_state[name][moment], rtol=0, atol=tolerance, msg=name)


def test_a_rank_with_no_share_of_a_tiny_model_goes_along() -> None:
    def update_once(process: ProcessInfo) -> Tensor:
        groups = start(LayoutConfig(zero1=True, overlap=False), process)
        config = transformer_config(groups.layout, width=WIDTH, num_heads=HEADS, dtype=torch.float32)
        model = megatron_parts(groups, config).linear(2, 2, bias=False, std=1.0)
        name_parameters(model)
        wrapped = wrap_ddp(groups, [model], config)
        optimizer = DenseOptimizer(groups, wrapped, SETTINGS)
        optimizer.zero()
        model.weight.main_grad.fill_(1.0)
        finalize(wrapped, groups)
        optimizer.prepare_grads()
        assert optimizer.square_norm().item() == pytest.approx(4 * 2.0**2)
        optimizer.scale_grads(0.5)
        optimizer.step(0.05)
        return model.weight.detach().clone()

    for weight in run_ranks(update_once, 2):
        torch.testing.assert_close(weight, torch.full((2, 2), -0.05))  # AdamW's first step is the sign of the gradient


def test_tensor_parallel_norm_counts_every_weight_once() -> None:
    _, want_norms, _ = twin(torch.float64)
    for _, norms, _ in run_ranks(train, 2, LayoutConfig(tensor=2), torch.float64):
        assert norms == pytest.approx(want_norms, rel=1e-12)


def test_bf16_weights_are_the_rounded_fp32_copies() -> None:
    want, _, _ = twin(torch.float32)
    for weights, _, pieces in run_ranks(train, 2, LayoutConfig(), torch.bfloat16):
        for name, weight in weights.items():
            main = pieces[f"{name}/main"]
            assert main.dtype == torch.float32
            assert torch.equal(weight, main.bfloat16()), name
            assert (main - want[name]).abs().mean() < 0.01, name


@pytest.mark.parametrize("zero1", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_state_continues_bit_for_bit(dtype: torch.dtype, zero1: bool) -> None:
    def resume(process: ProcessInfo) -> None:
        groups = start(LayoutConfig(zero1=zero1), process)
        wrapped, optimizer = build(groups, dtype)
        for step in range(2):
            update(groups, wrapped, optimizer, step)
        pieces = {name: piece.clone() for name, piece in optimizer.state_pieces().items()}
        pieces = broadcast_object(pieces, groups.copies)
        weights = {name: weight.clone() for name, weight in wrapped[0].state_dict().items() if weight is not None}
        update(groups, wrapped, optimizer, 2)

        resumed, other = build(groups, dtype)
        resumed[0].load_state_dict(weights)
        other.load_state_pieces(pieces, optimizer.num_updates - 1)
        update(groups, resumed, other, 2)
        for (name, a), b in zip(wrapped[0].named_parameters(), resumed[0].parameters(), strict=True):
            assert torch.equal(a, b), name
        others = other.state_pieces()
        for name, piece in optimizer.state_pieces().items():
            assert torch.equal(piece, others[name]), name

    run_ranks(resume, 2 if zero1 else 1)


def test_a_missing_piece_is_refused() -> None:
    def lose_one(process: ProcessInfo) -> None:
        _, optimizer = build(start(LayoutConfig(), process), torch.float32)
        pieces = optimizer.state_pieces()
        pieces.pop("scale/exp_avg")
        with pytest.raises(KeyError, match="scale/exp_avg"):
            optimizer.load_state_pieces(pieces, 1)

    run_ranks(lose_one, 1)
