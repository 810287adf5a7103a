"""Layer norm, alone and behind an add with dropout, in Triton: on a GPU, or by its interpreter."""

from functools import partial

import pytest
import torch
from earned import DEVICE, assert_earned, draw
from megarec_kernels.dropout import DropoutMask, dropout
from megarec_kernels.dropout.reference import dropout_reference
from megarec_kernels.layer_norm import add_layer_norm, layer_norm
from megarec_kernels.layer_norm.reference import add_layer_norm_reference, layer_norm_reference
from torch import Tensor

pytest.importorskip("triton")

from megarec_kernels.dropout.gpu import run_dropout
from megarec_kernels.layer_norm.gpu import run_add_layer_norm, run_layer_norm

SHAPES = [(5, 70), (1, 1), (0, 8), (63, 36), (100, 16), (2, 1030)]
FLOATS = [torch.float32, torch.float16]


def mask_of(rows: int, width: int, *, first: int = 0, key: int = (1 << 64) - 59) -> DropoutMask:
    token = torch.arange(rows, device=DEVICE) * 1_000_003 + (1 << 40)
    return DropoutMask(key=key, token=token, probability=0.25, num_channels=first + width, first_channel=first)


def alone(norm, x: dict[str, Tensor]) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    return (norm(x["x"], x.get("scale"), x.get("shift"), eps=1e-5),)


def added(norm, mask: DropoutMask | None, x: dict[str, Tensor]) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    return norm(x["x"], x.get("y"), x.get("scale"), x.get("shift"), eps=1e-5, mask=mask)


def leaves(rows: int, width: int, *names: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return draw({name: (rows, width) if name in "xyr" else (width,) for name in names}, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weights", [(), ("scale", "shift")], ids=["plain", "affine"])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_layer_norm(rows: int, width: int, weights: tuple[str, ...], dtype: torch.dtype) -> None:
    inputs = leaves(rows, width, "x", *weights, dtype=dtype)
    assert_earned(partial(alone, run_layer_norm), partial(alone, layer_norm_reference), inputs)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("weights", [(), ("scale", "shift")], ids=["plain", "affine"])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_add_layer_norm(rows: int, width: int, weights: tuple[str, ...], dropped: bool) -> None:
    inputs = leaves(rows, width, "x", "y", *weights)
    mask = mask_of(rows, width) if dropped else None
    assert_earned(partial(added, run_add_layer_norm, mask), partial(added, add_layer_norm_reference, mask), inputs)


@pytest.mark.parametrize("part", [0, 1])
def test_one_of_both_outputs_alone_gets_a_gradient(part: int) -> None:
    inputs = leaves(7, 20, "x", "y", "scale", "shift")
    found, plain = (
        added(norm, mask_of(7, 20), inputs)[part] for norm in (run_add_layer_norm, add_layer_norm_reference)
    )
    gradients = (
        torch.autograd.grad((out * out.detach().sin()).sum(), [inputs["x"], inputs["y"]]) for out in (found, plain)
    )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_scale_and_shift_may_be_strided() -> None:
    x, (scale, shift) = torch.randn(6, 16, device=DEVICE), torch.randn(16, 2, device=DEVICE).unbind(1)
    want = run_layer_norm(x, scale.contiguous(), shift.contiguous(), eps=1e-6)
    assert torch.equal(run_layer_norm(x, scale, shift, eps=1e-6), want)


def test_a_stream_that_nothing_is_added_to_is_its_input() -> None:
    inputs = leaves(7, 20, "x", "scale", "shift")
    assert_earned(partial(added, run_add_layer_norm, None), partial(added, add_layer_norm_reference, None), inputs)
    stream, _ = added(run_add_layer_norm, None, inputs)
    assert stream.data_ptr() == inputs["x"].data_ptr()


@pytest.mark.parametrize("first", [0, 8])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("rows", "width"), [*SHAPES, (2, 2100)])
def test_dropout(rows: int, width: int, with_residual: bool, first: int) -> None:
    mask = mask_of(rows, width, first=first)
    inputs = leaves(rows, width, "x", *("r" if with_residual else ""))
    assert_earned(
        lambda x: (run_dropout(x["x"], mask, x.get("r")),),
        lambda x: (dropout_reference(x["x"], mask, add_to=x.get("r")),),
        inputs,
    )


@pytest.mark.parametrize("key", [0, 1, 16, 1 << 63, (1 << 64) - 1, 0x0123456789ABCDEF])
def test_every_key_gives_the_bits_of_the_twin(key: int) -> None:
    mask = mask_of(9, 40, first=4, key=key)
    found = run_dropout(torch.ones(9, 40, device=DEVICE), mask, None)
    assert torch.equal(found > 0, mask.keep(40))


def test_many_rows_are_shared_out_and_their_sums_added_in_order() -> None:
    """More tiles than programs: each takes several, the last ones none."""
    inputs = leaves(2500, 4, "x", "scale", "shift")
    import megarec_kernels.layer_norm.gpu as module

    whole, module.MAX_PROGRAMS = module.MAX_PROGRAMS, 3
    try:
        assert_earned(partial(alone, run_layer_norm), partial(alone, layer_norm_reference), inputs)
    finally:
        module.MAX_PROGRAMS = whole


@pytest.mark.parametrize("fault", ["eps", "mask", "sum"])
def test_a_planted_fault_is_caught(fault: str) -> None:
    inputs = leaves(7, 20, "x", "y", "scale", "shift")
    mask = mask_of(7, 20)

    def wrong(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        other = mask_of(7, 20, first=4) if fault == "mask" else mask
        eps = 1e-4 if fault == "eps" else 1e-5
        total, normed = run_add_layer_norm(x["x"], x["y"], x["scale"], x["shift"], eps=eps, mask=other)
        return (total.detach() + x["x"] - x["x"].detach() if fault == "sum" else total), normed

    with pytest.raises(AssertionError):
        assert_earned(wrong, partial(added, add_layer_norm_reference, mask), inputs)


def test_a_wrong_argument_is_named() -> None:
    x = torch.ones(3, 8)
    with pytest.raises(ValueError, match=r"scale must be \[8\]"):
        layer_norm(x, x[0, :7], x[0, :7], eps=1e-5)
    with pytest.raises(ValueError, match="together"):
        layer_norm(x, x[0], None, eps=1e-5)
    with pytest.raises(ValueError, match="x and y"):
        add_layer_norm(x, x[:2], None, None, eps=1e-5)
    with pytest.raises(ValueError, match="mask is of y"):
        add_layer_norm(x, None, None, None, eps=1e-5, mask=mask_of(3, 8))
    with pytest.raises(ValueError, match=r"mask.token must be \[3\]"):
        dropout(x, mask_of(2, 8))
    with pytest.raises(ValueError, match="mask has 4 channels"):
        dropout(x, mask_of(3, 4))


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    x = torch.zeros((1 << 21) + 3, 1024, dtype=torch.bfloat16, device=DEVICE)
    x[-5:] = torch.randn(5, 1024, device=DEVICE)
    x.requires_grad_()
    found, wanted = layer_norm(x, None, None, eps=1e-5)[-5:], layer_norm_reference(x[-5:].float(), None, None, eps=1e-5)
    assert (found - wanted).abs().max() <= torch.finfo(torch.bfloat16).eps * wanted.abs().max()
    (gradient,) = torch.autograd.grad((found.float() ** 3).sum(), x)
    (truth,) = torch.autograd.grad((wanted**3).sum(), x)
    assert (gradient[-5:] - truth[-5:]).abs().max() <= 0.1 * truth.abs().max()  # the cube of a rounded norm


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "width"), [*SHAPES, (300, 1024), (40, 8192), (40, 8200)])
def test_on_a_gpu(rows: int, width: int, dtype: torch.dtype) -> None:
    for weights in ((), ("scale", "shift")):
        inputs = leaves(rows, width, "x", *weights, dtype=dtype)
        assert_earned(partial(alone, layer_norm), partial(alone, layer_norm_reference), inputs)
        inputs = leaves(rows, width, "x", "y", *weights, dtype=dtype)
        for mask in (None, mask_of(rows, width)):
            assert_earned(partial(added, add_layer_norm, mask), partial(added, add_layer_norm_reference, mask), inputs)
    assert_earned(
        lambda x: (dropout(x["x"], mask_of(rows, width), add_to=x["r"]),),
        lambda x: (dropout_reference(x["x"], mask_of(rows, width), add_to=x["r"]),),
        leaves(rows, width, "x", "r", dtype=dtype),
    )
