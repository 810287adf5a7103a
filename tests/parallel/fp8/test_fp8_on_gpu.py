"""FP8 on a GPU against the slow twin: the reference's product, Transformer Engine's maps, the fused AdamW.

python -m pytest -m gpu tests/parallel/fp8 -q -rs
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megarec.parallel.engine import transformer_config
from megarec.parallel.fp8.filling import make_parts
from megarec.parallel.fp8.precision import Precision
from megarec.parallel.fp8.requirements import why_no_engine
from megarec.parallel.groups import ProcessInfo, start, stop
from megarec.parallel.layout import LayoutConfig
from tests.optim import test_dense as dense
from tests.parallel.fp8.scaled_twin import E4M3, E5M2, assert_product, rounded

TOKENS, IN, OUT = 256, 128, 384
UNIT = 2.0**-13
"""FP8 units of Hopper keep about 14 bits of a sum (DeepSeek-V3, arXiv 2412.19437, section 3.5.2)."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((TOKENS, IN), 1.0), ((OUT, IN), 0.02), ((TOKENS, OUT), 1e-4)
    x, weight, gradient = (torch.randn(*shape, generator=generator) * size for shape, size in shapes)
    return x.to(device).bfloat16(), weight.to(device).bfloat16(), gradient.to(device).bfloat16()


def run_map(layout: LayoutConfig, precision: Precision, kind: str, repeat: int) -> tuple[Tensor, Tensor, Tensor]:
    """Result and gradients of a map in bf16 with the values of `inputs`, the last time of `repeat`."""
    groups = start(layout, ProcessInfo())
    try:
        config = transformer_config(layout, width=IN, num_heads=4, dtype=torch.bfloat16)
        parts = make_parts(groups, config, precision)
        make: Callable[..., nn.Module] = parts.column_linear if kind == "column" else parts.row_linear
        x, weight, gradient = inputs(str(groups.device))
        linear: Any = make(IN, OUT, bias=False, std=0.1).to(device=groups.device, dtype=torch.bfloat16)
        with torch.no_grad():
            linear.weight.copy_(weight)
        x.requires_grad_()
        for _ in range(repeat):
            x.grad = linear.weight.grad = None
            with parts.around_blocks():
                y = linear(x)
            y.backward(gradient)
        assert x.grad is not None
        return y.detach(), x.grad, linear.weight.grad
    finally:
        stop()


def assert_close(found: tuple[Tensor, Tensor, Tensor], *, fp8: bool, unit: float) -> None:
    x, weight, gradient = inputs("cpu")
    if fp8:
        x8, w8, g8 = rounded(x, E4M3), rounded(weight, E4M3), rounded(gradient, E5M2)
    else:
        x8, w8, g8 = x.double(), weight.double(), gradient.double()
    y, dx, dw = (each.cpu() for each in found)
    assert_product(y, x8, w8.t(), dtype=torch.bfloat16, unit=unit)
    assert_product(dx, g8, w8, dtype=torch.bfloat16, unit=unit)
    assert_product(dw, g8.t(), x8, dtype=torch.bfloat16, unit=unit)


def need_engine(precision: Precision) -> None:
    lacking = why_no_engine(precision)
    if lacking:
        pytest.skip(lacking)


@pytest.mark.parametrize("kind", ["column", "row"])
def test_the_reference_is_its_twin(kind: str) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    assert_close(run_map(LayoutConfig(linears="fp8_reference"), "fp8_current", kind, 1), fp8=True, unit=UNIT)


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize(("precision", "repeat"), [("bf16", 1), ("fp8_current", 1), ("fp8_delayed", 4)])
def test_the_engine_is_the_twin(kind: str, precision: Precision, repeat: int) -> None:
    """Delayed scales of a tensor that stays the same are those of the tensor at hand, from the third time on."""
    need_engine(precision)
    fp8 = precision != "bf16"
    assert_close(run_map(LayoutConfig(linears="te"), precision, kind, repeat), fp8=fp8, unit=UNIT if fp8 else 2.0**-24)


def test_blocks_are_scaled_no_worse_than_eight_bits() -> None:
    """Both operands err by half a gap: 2^-4 in e4m3; a quarter more for the smallest numbers of a block and the sum."""
    need_engine("fp8_blockwise")
    x, weight, gradient = (each.double() for each in inputs("cpu"))
    found = run_map(LayoutConfig(linears="te"), "fp8_blockwise", "column", 1)
    for got, one, other in zip(found, (x, gradient, gradient.t()), (weight.t(), weight, x), strict=True):
        assert ((got.cpu().double() - one @ other).abs() <= 1.25 * 2 * 2.0**-4 * (one.abs() @ other.abs())).all()


def test_the_fused_adamw_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32; the tolerance is that of torch's AdamW on a CPU."""
    packs_of = dense.packs_of

    def on_gpu(step: int) -> list[dict[str, Tensor]]:
        return [{name: value.cuda() for name, value in pack.items()} for pack in packs_of(step)]

    want, want_norms, _ = dense.twin(torch.float32)
    monkeypatch.setattr(dense, "packs_of", on_gpu)
    groups = start(LayoutConfig(), ProcessInfo())
    try:
        wrapped, optimizer = dense.build(groups, torch.float32)
        if type(optimizer._adam).__name__ != "FusedAdam":
            pytest.skip("neither Transformer Engine nor Apex is installed")
        norms = [dense.update(groups, wrapped, optimizer, step) for step in range(dense.STEPS)]
        assert optimizer.num_updates == dense.STEPS
        assert norms == pytest.approx(want_norms, rel=2e-5)
        for name, weight in wrapped[0].module.module.named_parameters():
            torch.testing.assert_close(weight.detach().cpu(), want[name], rtol=0, atol=2e-5, msg=name)
    finally:
        stop()
