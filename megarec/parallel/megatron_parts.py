"""The parts of a model on Megatron-Core: linear maps split over tensor-parallel ranks.

Names and shapes of the parameters are those of the plain parts, so the same weights fill both.
"""

from functools import partial

import torch
from torch import Tensor, nn

from megarec.parallel.context.fill import token_parts
from megarec.parallel.groups import Group, ParallelGroups
from megarec.parallel.mcore import (
    ColumnParallelLinear,
    RowParallelLinear,
    TransformerConfig,
    gather_from_sequence_parallel_region,
)
from megarec.parallel.parts import Linear, Parts, run_again, run_once
from megarec.parallel.placement import Init, Placement, place


def megatron_parts(groups: ParallelGroups, config: TransformerConfig) -> Parts:
    """Parts whose split maps are Megatron-Core's and whose attention sees the tokens of all ranks of a replica."""
    recompute = groups.layout.recompute
    return Parts(
        linear=Linear,
        column_linear=partial(ColumnLinear, groups=groups, config=config),
        row_linear=partial(RowLinear, groups=groups, config=config),
        run_attention=run_again if recompute == "attention" else run_once,
        run_block=run_again if recompute == "block" else run_once,
        gather_over_heads=partial(_gather_over_heads, groups.tensor),
        sequence_parallel=groups.layout.sequence_parallel,
        tp_size=groups.tensor.size,
        tp_rank=groups.tensor.rank,
        **token_parts(groups),
    )


def _gather_over_heads(group: Group, x: Tensor) -> Tensor:
    gathered: Tensor = gather_from_sequence_parallel_region(x, group=group.process_group)
    return gathered.view(group.size, *x.shape)


class ColumnLinear(ColumnParallelLinear):
    """`y = x W^T + b`, the rows of `W` `[out_width, in_width]` split: `[*, in_width]` to `[*, local_out_width]`."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        bias: bool,
        std: float,
        bias_bound: float = 0.0,
        groups: ParallelGroups,
        config: TransformerConfig,
    ) -> None:
        super().__init__(
            in_width,
            out_width,
            config=config,
            init_method=nn.init.zeros_,  # unused: placement.initialize fills every weight
            bias=bias,
            gather_output=False,
        )
        rows = partial(place_piece, split_dim=0, groups=groups)
        rows(self.weight, (out_width, in_width), Init(kind="normal", std=std))
        if bias:
            rows(self.bias, (out_width,), Init(kind="uniform", bound=bias_bound))

    def forward(self, x: Tensor) -> Tensor:
        """`[*, in_width]` to `[*, local_out_width]`."""
        return super().forward(x)[0]


class RowLinear(RowParallelLinear):
    """`y = x W^T + b`, the columns of `W` `[out_width, in_width]` split: `[*, local_in_width]` to `[*, out_width]`."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        bias: bool,
        std: float,
        bias_bound: float = 0.0,
        groups: ParallelGroups,
        config: TransformerConfig,
    ) -> None:
        super().__init__(
            in_width,
            out_width,
            config=config,
            init_method=nn.init.zeros_,  # unused: placement.initialize fills every weight
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
        )
        place_piece(self.weight, (out_width, in_width), Init(kind="normal", std=std), split_dim=1, groups=groups)
        if bias:
            place_row_bias(self.bias, Init(kind="uniform", bound=bias_bound), config)

    def forward(self, x: Tensor) -> Tensor:
        """`[*, local_in_width]` to `[*, out_width]`."""
        return super().forward(x)[0]


def place_piece(
    parameter: nn.Parameter, shape: tuple[int, ...], init: Init, *, split_dim: int, groups: ParallelGroups
) -> None:
    """Says which piece of a parameter of `shape` this rank's one is, and sets it to 0: it comes uninitialised."""
    offset = groups.tensor.rank * parameter.shape[split_dim]
    place(parameter, Placement(global_shape=shape, split_dim=split_dim, offset=offset, init=init))
    with torch.no_grad():
        parameter.zero_()


def place_row_bias(bias: nn.Parameter, init: Init, config: TransformerConfig) -> None:
    """As `place_piece`, for what is added to a sum over ranks: with sequence parallelism, to a slice of its tokens."""
    sums = ("tp",) if config.sequence_parallel else ()
    place(bias, Placement(global_shape=tuple(bias.shape), replicated_over=("tp", "dp"), grad_sum_over=sums, init=init))
    with torch.no_grad():
        bias.zero_()
