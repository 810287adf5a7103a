"""The dense optimizer where Megatron-Core finds a FusedAdam: it counts steps in its groups, not with each weight."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megarec.parallel.broadcast import broadcast_object
from megarec.parallel.groups import ProcessInfo, start
from megarec.parallel.layout import LayoutConfig
from tests.optim.test_dense import build, train, twin, update
from tests.parallel.fp8 import fake_engine
from tests.ranks import run_ranks


class FusedAdam(torch.optim.Optimizer):
    """AdamW in plain torch, called and keeping its count as Transformer Engine's (and Apex's) does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = fake_engine.bind("FusedAdam", args, kwargs)
        assert given["adam_w_mode"]
        names = ("lr", "betas", "eps", "weight_decay")
        super().__init__(given["params"], {name: given[name] for name in names})

    @torch.no_grad()
    def step(self, *args: Any, **kwargs: Any) -> None:
        fake_engine.bind("FusedAdam.step", args, kwargs)
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = step = group.get("step", 0) + 1
            (beta1, beta2), rate = group["betas"], group["lr"]
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                if p.grad is None:
                    continue
                first, second = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                first.lerp_(p.grad, 1 - beta1)
                second.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                size = (second / (1 - beta2**step)).sqrt() + group["eps"]
                p -= rate * (first / (1 - beta1**step) / size + group["weight_decay"] * p)


@pytest.fixture(autouse=True)
def megatron_core_finds_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr("megatron.core.optimizer.Adam", FusedAdam)
    monkeypatch.setattr("megatron.core.optimizer.distrib_optimizer.Adam", FusedAdam)
    yield


def test_it_is_what_updates() -> None:
    def job(process: ProcessInfo) -> str:
        _, optimizer = build(start(LayoutConfig(), process), torch.float32)
        return type(optimizer._adam).__name__

    assert run_ranks(job, 1) == ["FusedAdam"]


@pytest.mark.parametrize(("world", "zero1"), [(1, False), (2, False), (1, True), (4, True)])
def test_equals_torch_adamw(world: int, zero1: bool) -> None:
    """`train` sees that the updates are counted; the tolerance is that of torch's AdamW in fp32."""
    want, want_norms, _ = twin(torch.float32)
    for weights, norms, _ in run_ranks(train, world, LayoutConfig(zero1=zero1), torch.float32):
        assert norms == pytest.approx(want_norms, rel=2e-5)
        for name, weight in want.items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-5, msg=name)


def resume(process: ProcessInfo, dtype: torch.dtype, zero1: bool, lost: int) -> list[bool]:
    """Which weights are the same after a third update, with and without a restart that forgets `lost` updates."""
    groups = start(LayoutConfig(zero1=zero1), process)
    wrapped, optimizer = build(groups, dtype)
    for step in range(2):
        update(groups, wrapped, optimizer, step)
    pieces = {name: piece.clone() for name, piece in optimizer.state_pieces().items()}
    pieces = broadcast_object(pieces, groups.copies)
    weights = {name: weight.clone() for name, weight in wrapped[0].state_dict().items() if weight is not None}
    num_updates = optimizer.num_updates
    update(groups, wrapped, optimizer, 2)

    resumed, other = build(groups, dtype)
    resumed[0].load_state_dict(weights)
    other.load_state_pieces(pieces, num_updates - lost)
    update(groups, resumed, other, 2)
    return [torch.equal(a, b) for a, b in zip(wrapped[0].parameters(), resumed[0].parameters(), strict=True)]


@pytest.mark.parametrize("zero1", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_state_continues_bit_for_bit(dtype: torch.dtype, zero1: bool) -> None:
    for same in run_ranks(resume, 2 if zero1 else 1, dtype, zero1, 0):
        assert all(same)


def test_a_lost_count_is_seen() -> None:
    (same,) = run_ranks(resume, 1, torch.float32, False, 2)
    assert not any(same)


def test_another_optimizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unknown(FusedAdam):
        pass

    monkeypatch.setattr("megatron.core.optimizer.Adam", Unknown)

    def job(process: ProcessInfo) -> None:
        with pytest.raises(AssertionError, match="not known here"):
            build(start(LayoutConfig(), process), torch.float32)

    run_ranks(job, 1)
