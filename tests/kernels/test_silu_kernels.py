"""SiLU of packed rows and behind a product, in Triton: on a GPU, or by its interpreter."""

import pytest
import torch
from earned import DEVICE, assert_earned, draw
from megarec_kernels.silu import SiluOn, UvqkLayout, linear_silu, split_silu
from megarec_kernels.silu.reference import linear_silu_reference, split_silu_reference
from torch import Tensor

pytest.importorskip("triton")

from megarec_kernels.silu.gpu import product_tile_of, run_linear_silu, run_split_silu

LAYOUTS = [(5, 2, 7, 5), (1, 1, 16, 32), (0, 2, 4, 4), (63, 4, 8, 8), (3, 1, 600, 100)]  # tokens, heads, Hv, Hqk
PRODUCTS = [(5, 40, 70), (1, 64, 1), (0, 4, 8), (100, 33, 65), (63, 32, 64)]  # tokens, inputs, outputs
SILU_ON: list[SiluOn] = ["uvqk", "u", "none"]


def layout_of(heads: int, v_width: int, qk_width: int) -> UvqkLayout:
    return UvqkLayout(num_heads=heads, v_head_width=v_width, qk_head_width=qk_width)


@pytest.mark.parametrize("silu_on", SILU_ON)
@pytest.mark.parametrize(("tokens", "heads", "v_width", "qk_width"), LAYOUTS)
def test_split_silu(tokens: int, heads: int, v_width: int, qk_width: int, silu_on: SiluOn) -> None:
    layout = layout_of(heads, v_width, qk_width)
    assert_earned(
        lambda x: run_split_silu(x["uvqk"], layout, silu_on=silu_on),
        lambda x: split_silu_reference(x["uvqk"], layout, silu_on=silu_on),
        draw({"uvqk": (tokens, layout.row_width)}),
    )


def test_gradients_may_come_in_any_strides() -> None:
    """A method behind it hands back gradients with heads first, or channels apart."""
    layout = layout_of(2, 6, 5)

    def turn(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        u, v, q, k = parts
        return u.transpose(0, 1), v.transpose(1, 2), q, k.flatten(1)

    assert_earned(
        lambda x: turn(run_split_silu(x["uvqk"], layout, silu_on="uvqk")),
        lambda x: turn(split_silu_reference(x["uvqk"], layout, silu_on="uvqk")),
        draw({"uvqk": (9, layout.row_width)}),
    )


def test_nothing_is_copied_twice() -> None:
    layout = layout_of(2, 6, 5)
    uvqk = draw({"uvqk": (9, layout.row_width)})["uvqk"]
    for silu_on in SILU_ON:
        parts = run_split_silu(uvqk, layout, silu_on=silu_on)
        own = {part.untyped_storage().data_ptr() for part in parts}
        assert len(own) == (2 if silu_on == "u" else 1)
        assert (uvqk.untyped_storage().data_ptr() in own) == (silu_on != "uvqk")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), PRODUCTS)
def test_linear_silu(tokens: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    shapes = {"x": (tokens, inputs), "weight": (outputs, inputs)} | ({"bias": (outputs,)} if bias else {})
    assert_earned(
        lambda x: (run_linear_silu(x["x"], x["weight"], x.get("bias")),),
        lambda x: (linear_silu_reference(x["x"], x["weight"], x.get("bias")),),
        draw(shapes, dtype),
    )


def test_a_bias_may_be_strided() -> None:
    x, weight, biases = (torch.randn(*shape, device=DEVICE) for shape in ((6, 16), (20, 16), (20, 2)))
    bias = biases[:, 0]
    assert torch.equal(run_linear_silu(x, weight, bias), run_linear_silu(x, weight, bias.contiguous()))


def test_tiles_in_groups_cover_the_product() -> None:
    """More rows of tiles than a group has, and a last group that is smaller."""
    rows = product_tile_of(torch.float32, 65, 8)["ROWS"] * 9 + 1
    assert_earned(
        lambda x: (run_linear_silu(x["x"], x["weight"], None),),
        lambda x: (linear_silu_reference(x["x"], x["weight"], None),),
        draw({"x": (rows, 8), "weight": (65, 8)}),
    )


@pytest.mark.parametrize("fault", ["u", "none", "layout"])
def test_a_planted_fault_is_caught(fault: str) -> None:
    layout = layout_of(2, 5, 5)
    wrong = layout_of(1, 10, 10) if fault == "layout" else layout
    on: SiluOn = "none" if fault == "none" else "u" if fault == "u" else "uvqk"

    def shaped(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(part.reshape(9, 2, 5) for part in parts)

    with pytest.raises(AssertionError):
        assert_earned(
            lambda x: shaped(run_split_silu(x["uvqk"], wrong, silu_on=on)),
            lambda x: split_silu_reference(x["uvqk"], layout, silu_on="uvqk"),
            draw({"uvqk": (9, layout.row_width)}),
        )


def test_a_wrong_argument_is_named() -> None:
    with pytest.raises(ValueError, match=r"uvqk must be \[T, 40\]"):
        split_silu(torch.ones(3, 39), layout_of(2, 5, 5), silu_on="u")
    with pytest.raises(ValueError, match="weight"):
        linear_silu(torch.ones(3, 4), torch.ones(2, 5), None)
    with pytest.raises(ValueError, match=r"bias must be \[2\]"):
        linear_silu(torch.ones(3, 4), torch.ones(2, 4), torch.ones(3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    for tokens, heads, v_width, qk_width in [*LAYOUTS, (300, 4, 256, 256), (1000, 2, 25, 25)]:
        layout = layout_of(heads, v_width, qk_width)
        for silu_on in SILU_ON:
            assert_earned(
                lambda x, layout=layout, silu_on=silu_on: split_silu(x["uvqk"], layout, silu_on=silu_on),
                lambda x, layout=layout, silu_on=silu_on: split_silu_reference(x["uvqk"], layout, silu_on=silu_on),
                draw({"uvqk": (tokens, layout.row_width)}, dtype),
            )
    for tokens, inputs, outputs in [*PRODUCTS, (300, 1024, 4096), (1000, 520, 100)]:
        assert_earned(
            lambda x: (linear_silu(x["x"], x["weight"], x["bias"]),),
            lambda x: (linear_silu_reference(x["x"], x["weight"], x["bias"]),),
            draw({"x": (tokens, inputs), "weight": (outputs, inputs), "bias": (outputs,)}, dtype),
        )
