"""Linear maps split over tensor-parallel ranks by Transformer Engine, in bf16 or FP8. Needs a GPU; see docs/fp8.md.

Names and shapes of the parameters are those of the plain parts, so the same weights fill both.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
from torch import nn

from megarec.parallel.fp8.precision import Precision, is_fp8
from megarec.parallel.groups import ParallelGroups
from megarec.parallel.mcore import TransformerConfig
from megarec.parallel.megatron_parts import megatron_parts, place_piece, place_row_bias
from megarec.parallel.parts import Parts
from megarec.parallel.placement import Init

RECIPES = {
    "fp8_delayed": "DelayedScaling",
    "fp8_current": "Float8CurrentScaling",
    "fp8_blockwise": "Float8BlockScaling",
}


def te_parts(groups: ParallelGroups, config: TransformerConfig, precision: Precision) -> Parts:
    """As `megatron_parts`, with the split maps Transformer Engine's; in an `fp8_*` precision their products in FP8."""
    return replace(
        megatron_parts(groups, config),
        column_linear=partial(make_engine_linear, "column", groups=groups, config=config),
        row_linear=partial(make_engine_linear, "row", groups=groups, config=config),
        around_blocks=fp8_region(groups, precision) if is_fp8(precision) else nullcontext,
    )


def make_engine_linear(
    mode: Literal["column", "row"],
    in_width: int,
    out_width: int,
    *,
    bias: bool,
    std: float,
    bias_bound: float = 0.0,
    groups: ParallelGroups,
    config: TransformerConfig,
) -> nn.Module:
    """A `transformer_engine.pytorch.Linear`, as `ColumnLinear` or `RowLinear`; its weights are 0 until initialised."""
    linear: Any = import_module("transformer_engine.pytorch").Linear(
        in_width,
        out_width,
        parallel_mode=mode,
        tp_group=groups.tensor.process_group,
        tp_size=groups.tensor.size,
        sequence_parallel=config.sequence_parallel,
        bias=bias,
        return_bias=False,
        params_dtype=torch.float32,  # as every filling: wrap_ddp casts once
        init_method=nn.init.zeros_,  # unused: placement.initialize fills every weight
        device=groups.device,
    )
    split_dim = 0 if mode == "column" else 1
    weight_init, bias_init = Init(kind="normal", std=std), Init(kind="uniform", bound=bias_bound)
    place_piece(linear.weight, (out_width, in_width), weight_init, split_dim=split_dim, groups=groups)
    if bias and mode == "column":
        place_piece(linear.bias, (out_width,), bias_init, split_dim=0, groups=groups)
    elif bias:
        place_row_bias(linear.bias, bias_init, config)
    made: nn.Module = linear
    return made


def fp8_region(groups: ParallelGroups, precision: Precision) -> Callable[[], AbstractContextManager[Any]]:
    """What makes a context in which the products of Transformer Engine are in FP8, by the recipe of `precision`.

    Delayed scaling shares the largest numbers seen over the ranks that share a pack.
    """
    recipe = getattr(import_module("transformer_engine.common.recipe"), RECIPES[precision])()
    return partial(
        import_module("transformer_engine.pytorch").autocast,
        enabled=True,
        recipe=recipe,
        amax_reduction_group=groups.slices.process_group,
    )
