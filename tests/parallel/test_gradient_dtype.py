"""Gradients of bf16 weights are added up in fp32: over the packs of a step, and over ranks."""

import pytest
import torch

from megarec.parallel.engine import transformer_config, wrap_ddp
from megarec.parallel.groups import ProcessInfo, start
from megarec.parallel.layout import LayoutConfig
from megarec.parallel.megatron_parts import megatron_parts
from tests.parallel.tiny_model import HEADS, WIDTH, TinyModel
from tests.ranks import run_ranks


def dtypes_of(process: ProcessInfo, dtype: torch.dtype) -> tuple[set[torch.dtype], set[torch.dtype]]:
    groups = start(LayoutConfig(), process)
    config = transformer_config(groups.layout, width=WIDTH, num_heads=HEADS, dtype=dtype)
    model = wrap_ddp(groups, [TinyModel(megatron_parts(groups, config))], config)[0]
    return {p.dtype for p in model.parameters()}, {p.main_grad.dtype for p in model.parameters()}


@pytest.mark.parametrize(
    ("dtype", "sums"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_gradients_are_added_up_in_fp32_or_better(dtype: torch.dtype, sums: torch.dtype) -> None:
    assert run_ranks(dtypes_of, 1, dtype) == [({dtype}, {sums})]
