"""The passes over memory of plain torch that the READMEs of the kernels compare with, from the operators it runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megarec_kernels.dropout import DropoutMask
from megarec_kernels.gated_norm.reference import gated_norm_reference
from megarec_kernels.silu import UvqkLayout
from megarec_kernels.silu.reference import split_silu_reference
from megarec_kernels.softmax_cross_entropy import Correction
from megarec_kernels.softmax_cross_entropy.reference import exponentials_reference, shared_losses_reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T, N, H = 16, 4, 256
PASS = T * N * H * 2  # bytes


class Bytes(TorchDispatchMode):
    """Bytes of the tensors that operators read and write; views move none."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((out, args, kwargs)) if isinstance(value, Tensor)]
        if not func.is_view and "empty" not in str(func):
            self.count += sum(value.numel() * value.element_size() for value in tensors)
        return out


def passes(function: Callable[[], Any], size: int = PASS) -> tuple[Any, float]:
    with Bytes() as moved:
        out = function()
    return out, moved.count / size


@pytest.mark.parametrize(("dropped", "wanted"), [(False, 53.0), (True, 137.5)])
def test_the_plain_layer(dropped: bool, wanted: float) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(T, *shape, dtype=torch.bfloat16).requires_grad_()

    x, out, uvqk, attention = draw(N * H), draw(N * H), draw(4 * N * H), draw(N, H)
    mask = DropoutMask(key=5, token=torch.arange(T), probability=0.25, num_channels=N * H) if dropped else None
    layout = UvqkLayout(num_heads=N, v_head_width=H, qk_head_width=H)

    def forward() -> list[Tensor]:
        u, *vqk = split_silu_reference(uvqk, layout, silu_on="uvqk")
        gated = gated_norm_reference(u, attention, None, None, over="all_heads", eps=1e-6, concat="none", mask=mask)
        return [F.layer_norm(x, (N * H,)), x + out, gated, *vqk]

    outputs, there = passes(forward)
    outer = [torch.ones_like(value) for value in outputs]
    _, back = passes(lambda: torch.autograd.grad(outputs, [x, out, uvqk, attention], outer))
    assert there + back == pytest.approx(wanted, abs=0.5)  # statistics and token numbers are the rest


@pytest.mark.parametrize(("correction", "wanted"), [("none", 12.6), ("standard", 14.6), ("negatives_only", 25.1)])
def test_losses(correction: Correction, wanted: float) -> None:
    """The sum of exponentials counts as one read, whatever torch does inside."""
    rows, columns = 64, 2048
    products, log_q = torch.randn(rows, columns), torch.randn(columns).log_softmax(0)
    _, found = passes(
        lambda: shared_losses_reference(
            products,
            target=torch.arange(rows),
            candidate_id=torch.arange(columns),
            log_q=None if correction == "none" else log_q,
            correction=correction,
            inverse_temperature=torch.tensor(2.0),
        ),
        rows * columns * 4,
    )
    assert found == pytest.approx(wanted, abs=0.1)
    assert passes(lambda: exponentials_reference(products, torch.zeros(rows)), rows * columns * 4)[1] == pytest.approx(
        4, abs=0.1
    )
