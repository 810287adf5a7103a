"""The blocks with the kernels of a GPU inside, interpreted here, equal the blocks as the CPU runs them."""

from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megarec.base.random import hash_numpy
from megarec.layers.config import HstuBlockConfig, SasrecBlockConfig, TransformerBlockConfig
from megarec.layers.dropout import Dropout, Randomness
from megarec.layers.hstu_block import HstuBlock
from megarec.layers.sasrec_block import SasrecBlock
from megarec.layers.tokens import split_events
from megarec.layers.transformer_block import TransformerBlock
from megarec.parallel.parts import local_parts, run_again

pytest.importorskip("triton")

WIDTH, NUM_TOKENS = 24, 17
OPS = ("dropout", "layer_norm", "silu", "gated_norm")


@pytest.fixture
def use_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """After a call of it the ops run their kernels on what is not on a GPU too, and count how often they were asked."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here: test_on_a_gpu runs them")
    asked = dict.fromkeys(OPS, 0)

    def start() -> dict[str, int]:
        for op in OPS:

            def has_kernel(*_: Any, op: str = op) -> bool:
                asked[op] += 1
                return True

            monkeypatch.setattr(import_module(f"megarec_kernels.{op}"), "has_kernel", has_kernel)
        return asked

    return start


def run(block: nn.Module) -> list[Tensor]:
    """Output and all gradients, with weights that are drawn alike for every block of one kind."""
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    x = torch.randn(NUM_TOKENS, WIDTH, generator=generator).requires_grad_()
    randomness = Randomness(key=(1 << 63) + 5, token=torch.arange(NUM_TOKENS) + 1000)
    time = torch.arange(NUM_TOKENS) * 70
    tokens = split_events(torch.tensor([0, 5, 5, 14]), time, time + 70, randomness=randomness, per_event=1)
    out = block(x, tokens)
    return [out.detach(), *torch.autograd.grad((out * out.detach().sin()).sum(), [x, *block.parameters()])]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        # Sums of at most 17 x 72 products of fp32 in other orders: 1e3 eps of the largest.
        assert (a - b).abs().max() <= 1e3 * torch.finfo(torch.float32).eps * b.abs().max()


HSTU = [
    {"silu_on": on, "output_norm": norm, "concat": concat, "output_norm_affine": affine, "input_norm_affine": affine}
    for (on, norm, concat), affine in zip(
        product(("uvqk", "u", "none"), ("all_heads", "per_head"), ("none", "u_and_norm", "u_and_attention")),
        [True, False] * 9,
        strict=True,
    )
]


@pytest.mark.parametrize("settings", HSTU, ids=lambda settings: "-".join(map(str, settings.values())))
def test_hstu_blocks(settings: dict[str, Any], use_kernels: Any) -> None:
    config = HstuBlockConfig(num_heads=2, qk_head_width=6, v_head_width=8, **settings)
    block = HstuBlock(config, width=WIDTH, layer=1, max_tokens=20, dropout=0.25, parts=local_parts())
    wanted = run(block)
    asked = use_kernels()
    assert_same(run(block), wanted)
    assert asked["layer_norm"] and asked["silu"] and asked["gated_norm"]


def test_other_blocks(use_kernels: Any) -> None:
    sizes: dict[str, Any] = {"width": WIDTH, "layer": 1, "dropout": 0.25, "parts": local_parts()}
    blocks = [
        TransformerBlock(TransformerBlockConfig(num_heads=2), num_layers=2, **sizes),
        SasrecBlock(SasrecBlockConfig(num_heads=2, feed_forward_width=40), max_tokens=20, **sizes),
    ]
    wanted = [run(block) for block in blocks]
    asked = use_kernels()
    for block, truth in zip(blocks, wanted, strict=True):
        assert_same(run(block), truth)
    assert asked["layer_norm"] and asked["dropout"]


def test_computed_again_in_the_backward_pass(use_kernels: Any) -> None:
    config = HstuBlockConfig(num_heads=2, qk_head_width=6, v_head_width=8)
    block = HstuBlock(config, width=WIDTH, layer=1, max_tokens=20, dropout=0.25, parts=local_parts())
    wanted = run(block)
    use_kernels()
    block.run_attention = run_again
    assert_same(run(block), wanted)


@pytest.mark.parametrize("part", [0, 1])
def test_masks_of_kernels_have_the_bits_of_numpy(part: int, use_kernels: Any) -> None:
    width, token = 12, torch.tensor([0, 3, 70_000, 1 << 40])
    layer = Dropout(0.3, layer=2, site="a", part=part, num_parts=2)
    randomness = Randomness(key=11, token=token)
    mask = layer.mask(randomness, width)
    assert mask is not None
    use_kernels()
    found = layer(torch.ones(4, width), randomness) > 0
    words = token.numpy()[:, None] * (2 * width // 4) + torch.arange(2 * width).numpy() // 4
    lane = torch.arange(2 * width).numpy() % 4
    draws = (hash_numpy(mask.key, words) >> (16 * lane).astype("uint64")) & 0xFFFF
    wanted = torch.from_numpy((draws >= round(0.3 * 65536))[:, part * width : (part + 1) * width])
    assert torch.equal(found, wanted)
    assert torch.equal(mask.keep(width), wanted)
