"""Blocks on two pretended tensor-parallel ranks, one thread each, equal the whole block: slices of dim 0 are heads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarec.layers.config import HstuBlockConfig, TransformerBlockConfig
from megarec.layers.hstu_block import HstuBlock
from megarec.layers.tokens import split_events
from megarec.layers.transformer_block import TransformerBlock
from megarec.parallel.parts import Linear, Parts, local_parts, whole_parameter
from megarec.parallel.placement import Init, placement_of

RANKS = 2
TOKENS = split_events(
    torch.tensor([0, 5, 6, 13]), torch.arange(15) * 70, torch.arange(15) * 70 + 70, randomness=None, per_event=1
)


class Sum:
    """An all-reduce between threads."""

    def __init__(self) -> None:
        self.barrier, self.values = threading.Barrier(RANKS), [torch.empty(0)] * RANKS

    def __call__(self, rank: int, value: Tensor) -> Tensor:
        self.values[rank] = value
        self.barrier.wait()
        total = sum(self.values, torch.zeros(()))
        self.barrier.wait()
        return total


class Column(nn.Module):
    def __init__(self, in_width: int, out_width: int, *, bias: bool, std: float, bias_bound: float = 0.0) -> None:
        super().__init__()
        self.inner = Linear(in_width, out_width // RANKS, bias=bias, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def fake_parts(rank: int, all_reduce: Sum) -> Parts:
    class Row(nn.Module):
        def __init__(self, in_width: int, out_width: int, *, bias: bool, std: float, bias_bound: float = 0.0) -> None:
            super().__init__()
            self.weight = whole_parameter((out_width, in_width // RANKS), Init())
            self.bias = whole_parameter((out_width,), Init()) if bias else None

        def forward(self, x: Tensor) -> Tensor:
            y = all_reduce(rank, F.linear(x, self.weight))
            return y if self.bias is None else y + self.bias

    return Parts(linear=Linear, column_linear=Column, row_linear=Row, tp_size=RANKS, tp_rank=rank)


def check(make: Callable[[Parts], nn.Module], split: dict[str, int]) -> None:
    """`split`: the parameters that are cut, and along which dimension."""
    torch.manual_seed(0)
    whole = make(local_parts()).double()
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(15, 12, dtype=torch.float64)
    all_reduce = Sum()

    def run(rank: int) -> Tensor:
        shard = make(fake_parts(rank, all_reduce)).double()
        for name, parameter in shard.named_parameters():
            source = whole.get_parameter(name.replace(".inner", ""))
            dim = split.get(name.replace(".inner", ""))
            piece = source if dim is None else source.chunk(RANKS, dim)[rank]
            parameter.data.copy_(piece)
        with torch.no_grad():
            return shard(x, TOKENS)

    with ThreadPoolExecutor(RANKS) as pool:
        outputs = list(pool.map(run, range(RANKS)))
    with torch.no_grad():
        expected = whole(x, TOKENS)
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_transformer_block() -> None:
    split = {"qkv.weight": 0, "qkv.bias": 0, "attention_out.weight": 1, "up.weight": 0, "up.bias": 0, "down.weight": 1}
    check(
        lambda parts: TransformerBlock(
            TransformerBlockConfig(num_heads=4), width=12, layer=0, num_layers=1, dropout=0.0, parts=parts
        ),
        split,
    )


@pytest.mark.parametrize("concat", ["none", "u_and_norm", "u_and_attention"])
def test_hstu_block(concat: str) -> None:
    config = HstuBlockConfig(
        num_heads=4,
        qk_head_width=3,
        v_head_width=5,
        output_norm="per_head",
        input_norm_affine=True,
        output_norm_affine=True,
        uvqk_bias=True,
        concat=concat,  # type: ignore[arg-type]
    )
    check(
        lambda parts: HstuBlock(config, width=12, layer=0, max_tokens=20, dropout=0.0, parts=parts),
        {"uvqk.weight": 0, "uvqk.bias": 0, "out.weight": 1},
    )


def test_what_heads_share_is_summed_over_ranks() -> None:
    config = HstuBlockConfig(
        num_heads=2, v_head_width=5, num_time_buckets=7, output_norm="per_head", output_norm_affine=True
    )
    block = HstuBlock(config, width=12, layer=0, max_tokens=20, dropout=0.0, parts=local_parts())
    summed = {name for name, parameter in block.named_parameters() if "tp" in placement_of(parameter).grad_sum_over}
    assert summed == {"position_bias", "time_bias", "output_norm.scale", "output_norm.shift"}
