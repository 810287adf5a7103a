"""The parts a model is made of, in every filling: plain torch here, Megatron-Core's in `megatron_parts.py`.

A model file names parts and never asks which filling it got. `T` packed tokens, `N` heads; a part that is split
over tensor-parallel ranks says so in its name, and its local sizes are the global ones divided by `tp_size`.

Before and behind the blocks every rank that shares a pack has its slice of the tokens: it asks the tables for the rows
of these alone, and no gradient is computed twice. Between the split maps of a block it has the same slice with sequence
parallelism; without, the slices of all tensor-parallel ranks of its context-parallel rank. Inside them it has the
latter always. Attention sees all tokens, whoever holds them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megarec_kernels.hstu_attention import hstu_attention
from megarec_kernels.softmax_attention import softmax_attention
from megarec_kernels.tiles import AttentionPlan, plan_tiles
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from megarec.parallel.placement import Init, Placement, place
from megarec.parallel.slices import Slices


class MakeLinear(Protocol):
    """Makes a linear map `[*, in_width]` to `[*, out_width]`; weight normal(0, `std`), bias uniform(±`bias_bound`)."""

    def __call__(self, in_width: int, out_width: int, *, bias: bool, std: float, bias_bound: float = 0.0) -> nn.Module:
        """The map as a module: `module(x)`."""
        ...


RowsOf = Callable[[Tensor, Any], Tensor]
"""From rows of some tokens to rows of others; the second argument is the plan of the attention."""


def keep_rows(x: Tensor, _: Any) -> Tensor:
    """On one rank all tokens are everywhere."""
    return x


Run = Callable[..., Any]
"""Calls its first argument with the others."""


def run_once(function: Callable[..., Any], *args: Any) -> Any:
    """Keeps what the backward pass needs."""
    return function(*args)


def run_again(function: Callable[..., Any], *args: Any) -> Any:
    """Keeps the arguments alone; the backward pass runs `function` once more. Nothing in it may depend on a state."""

    def run(*args: Any) -> Any:  # a result that is a view would keep what it is a view of
        return tree_map(Tensor.contiguous, function(*args))

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention of the blocks. A plan is made once per pack and handed to every layer.

    Attributes:
        plan: from `cu_seqlens`, `num_tokens` and `visibility` to what the others, and `bucket_times`, take as `plan`.
        hstu: as `hstu_attention`, but for q, k and v, which hold this context-parallel rank's tokens.
        softmax: likewise `softmax_attention`.
    """

    plan: Callable[..., AttentionPlan]
    hstu: Callable[..., Tensor] = hstu_attention
    softmax: Callable[..., Tensor] = softmax_attention


def plan_all_tokens(cu_seqlens: Tensor, **_: Any) -> AttentionPlan:
    """The plan of attention over all tokens on one rank."""
    return plan_tiles(cu_seqlens)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a model is filled with.

    Attributes:
        linear: a linear map that every rank holds whole.
        column_linear: one whose output features are split over tensor-parallel ranks: every token, local features.
        row_linear: one whose input features are split; its output is summed over tensor-parallel ranks.
        attention: between the tokens of all ranks.
        slices: which tokens this rank has before and behind the blocks.
        inner_rows: of a value per token, those of the tokens that this rank has inside the split maps of a block.
        outer_rows: those of the tokens that it has between them.
        enter_blocks: from this rank's slice of the tokens, `[T / ranks, D]`, to what blocks take.
        leave_blocks: the way back.
        run_attention: how a block runs the half of it that ends with attention: at once, or in the backward pass again.
        run_block: likewise the whole block.
        gather_over_heads: `[T, *]` of all tensor-parallel ranks, `[tp_size, T, *]`; gradients are summed over ranks.
        around_blocks: makes the context in which the blocks of a pack run.
        sequence_parallel: whether blocks take and give slices of the tokens.
        tp_size: the number of tensor-parallel ranks.
        tp_rank: which of them this one is.
        heads_size: the number of context-parallel ranks over which attention spreads the heads of this rank.
        heads_rank: which of them this one is.
    """

    linear: MakeLinear
    column_linear: MakeLinear
    row_linear: MakeLinear
    attention: Attention = field(default_factory=lambda: Attention(plan=plan_all_tokens))
    slices: Slices = field(default_factory=Slices)
    inner_rows: RowsOf = keep_rows
    outer_rows: RowsOf = keep_rows
    enter_blocks: RowsOf = keep_rows
    leave_blocks: RowsOf = keep_rows
    run_attention: Run = run_once
    run_block: Run = run_once
    gather_over_heads: Callable[[Tensor], Tensor] = lambda x: x.unsqueeze(0)
    around_blocks: Callable[[], AbstractContextManager[Any]] = nullcontext
    sequence_parallel: bool = False
    tp_size: int = 1
    tp_rank: int = 0
    heads_size: int = 1
    heads_rank: int = 0

    def attention_heads(self, num_heads: int) -> range:
        """The heads, of `num_heads`, whose scores this rank computes."""
        own = range(num_heads)[self.own_part(num_heads)]
        count = len(own) // self.heads_size
        return own[self.heads_rank * count : (self.heads_rank + 1) * count]

    def own_part(self, size: int) -> slice:
        """This rank's part of `size` heads, or of channels laid out head by head."""
        local = size // self.tp_size
        return slice(self.tp_rank * local, (self.tp_rank + 1) * local)

    @property
    def between_maps(self) -> tuple[str, ...]:
        """Over whom to sum the gradient of a whole parameter that meets the tokens between a block's split maps."""
        return ("tp",) if self.sequence_parallel else ()


class Linear(nn.Module):
    """`y = x W^T + b` with weight `[out_width, in_width]`."""

    def __init__(self, in_width: int, out_width: int, *, bias: bool, std: float, bias_bound: float = 0.0) -> None:
        super().__init__()
        self.weight = whole_parameter((out_width, in_width), Init(kind="normal", std=std))
        self.bias = whole_parameter((out_width,), Init(kind="uniform", bound=bias_bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`[*, in_width]` to `[*, out_width]`."""
        return F.linear(x, self.weight, self.bias)


def whole_parameter(shape: tuple[int, ...], init: Init, *, sum_over: tuple[str, ...] = ()) -> nn.Parameter:
    """A parameter that every rank holds whole, whose gradient is summed over the ranks of the kinds `sum_over`."""
    placement = Placement(global_shape=shape, replicated_over=("tp", "dp"), grad_sum_over=sum_over, init=init)
    return place(nn.Parameter(torch.zeros(shape)), placement)


def local_parts() -> Parts:
    """Plain torch on one device: for inference and as the twin that every other filling is held against."""
    return Parts(linear=Linear, column_linear=Linear, row_linear=Linear)
