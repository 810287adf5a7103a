"""Dropout behind a map and before a residual add, its mask a function of (key, token, channel)."""

from collections.abc import Iterator

import torch
from megarec_kernels.dropout import DropoutMask, dropout
from megarec_kernels.dropout.reference import dropout_reference
from torch import Tensor

from kernels.bench.cases import Case, Draw, Inputs, Work
from kernels.bench.compiled import compiled


def cases() -> Iterator[Case]:
    """A layer of width 1024 and 32 histories of 4,096."""
    yield _case("t50 width24", {"small"}, num_tokens=50, width=24)
    yield _case("t131072 width1024", {"h200"}, num_tokens=1 << 17, width=1024)


def mask_of(num_tokens: int, num_channels: int, device: torch.device) -> DropoutMask:
    """Of the tokens of one pack."""
    token = torch.arange(num_tokens, device=device)
    return DropoutMask(key=(1 << 63) + 12345, token=token, probability=0.25, num_channels=num_channels)


def _case(name: str, sets: set[str], *, num_tokens: int, width: int) -> Case:
    def make_inputs(draw: Draw) -> Inputs:
        inputs: Inputs = {"x": draw.normal(num_tokens, width), "residual": draw.normal(num_tokens, width)}
        return inputs | {"mask": mask_of(num_tokens, width, draw.device)}

    def plain(inputs: Inputs) -> Tensor:
        return dropout_reference(inputs["x"], inputs["mask"], add_to=inputs["residual"])

    def work(inputs: Inputs) -> tuple[Work, Work]:
        size = inputs["x"].nbytes
        return Work(flops=0.0, bytes=3.0 * size), Work(flops=0.0, bytes=2.0 * size)

    return Case(
        name=name,
        sets=frozenset(sets),
        make_inputs=make_inputs,
        truth=plain,
        ours={"ours": lambda x: dropout(x["x"], x["mask"], add_to=x["residual"])},
        baselines={"eager": plain, "torch.compile": compiled(plain)},
        gradients=("x", "residual"),
        work=work,
    )
