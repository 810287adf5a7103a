"""Linear maps split over tensor-parallel ranks whose product is in FP8, in plain torch on any device.

Ranks that hold pieces of a tensor take the largest amax of all pieces, so a pack is rounded in every layout as one
process rounds it.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megarec.parallel.fp8.scaled import scaled_product
from megarec.parallel.groups import Group, ParallelGroups
from megarec.parallel.mcore import (
    TransformerConfig,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megarec.parallel.megatron_parts import ColumnLinear, RowLinear, megatron_parts
from megarec.parallel.parts import Parts


def reference_parts(groups: ParallelGroups, config: TransformerConfig) -> Parts:
    """As `megatron_parts`, with the split maps in FP8; the sizes of their products are multiples of 16."""
    return replace(
        megatron_parts(groups, config),
        column_linear=partial(ScaledColumnLinear, groups=groups, config=config),
        row_linear=partial(ScaledRowLinear, groups=groups, config=config),
    )


class ScaledColumnLinear(ColumnLinear):
    """As `ColumnLinear`, with operands in FP8."""

    def __init__(self, in_width: int, out_width: int, *, groups: ParallelGroups, **settings: Any) -> None:
        super().__init__(in_width, out_width, groups=groups, **settings)
        self.product = _product(groups)
        self.group = groups.tensor.process_group

    def forward(self, x: Tensor) -> Tensor:
        """`[*, in_width]` to `[*, local_out_width]`."""
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.group)
        else:
            x = copy_to_tensor_model_parallel_region(x, group=self.group)
        y = self.product(x, self.weight)
        return y if self.bias is None else y + self.bias


class ScaledRowLinear(RowLinear):
    """As `RowLinear`, with operands in FP8; the parts of the sum over ranks are in the dtype of `x`."""

    def __init__(self, in_width: int, out_width: int, *, groups: ParallelGroups, **settings: Any) -> None:
        super().__init__(in_width, out_width, groups=groups, **settings)
        self.product = _product(groups)
        self.group = groups.tensor.process_group

    def forward(self, x: Tensor) -> Tensor:
        """`[*, local_in_width]` to `[*, out_width]`."""
        y = self.product(x, self.weight)
        if self.sequence_parallel:
            y = reduce_scatter_to_sequence_parallel_region(y, group=self.group)
        else:
            y = reduce_from_tensor_model_parallel_region(y, group=self.group)
        return y if self.bias is None else y + self.bias


def _product(groups: ParallelGroups) -> Any:
    """The product whose tokens lie on all ranks that share a pack, its weights on the tensor-parallel ones.

    Where such ranks hold the same whole instead of pieces, the largest of equal numbers changes nothing.
    """
    return partial(
        scaled_product, reduce_tokens=partial(_largest, groups.slices), reduce_weight=partial(_largest, groups.tensor)
    )


def _largest(group: Group, amax: Tensor) -> Tensor:
    if group.size > 1:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group.process_group)
    return amax
