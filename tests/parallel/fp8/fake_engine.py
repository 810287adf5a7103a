"""Stands for Transformer Engine: the same signatures, plain torch inside.

The signatures come from `engine_signatures.json`; a call that they do not allow is a TypeError here as there.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megarec.parallel.mcore import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

DECLARED = json.loads(Path(__file__).with_name("engine_signatures.json").read_text())
OPEN: list[dict[str, Any]] = []
"""The arguments of the `autocast` contexts that are open."""
SEEN: list[dict[str, Any] | None] = []
"""For every product, those of the innermost context around it."""


def bind(call: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, as Python would hand them over; absent ones are left out."""
    parameters = [
        Parameter(
            each["name"],
            Parameter.KEYWORD_ONLY if each["keyword"] else Parameter.POSITIONAL_OR_KEYWORD,
            default=Parameter.empty if each["required"] else None,
        )
        for each in DECLARED["calls"][call]
    ]
    return dict(Signature(parameters).bind(*args, **kwargs).arguments)


class Linear(nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = bind("Linear", args, kwargs)
        self.group, self.mode = given["tp_group"], given["parallel_mode"]
        size = dist.get_world_size(self.group)
        self.sequence_parallel = given.get("sequence_parallel", False) and size > 1
        rows = given["out_features"] // (size if self.mode == "column" else 1)
        columns = given["in_features"] // (size if self.mode == "row" else 1)
        place = {"dtype": given.get("params_dtype"), "device": given.get("device", "cuda")}
        self.weight = nn.Parameter(torch.full((rows, columns), torch.nan, **place))
        self.bias = nn.Parameter(torch.full((rows,), torch.nan, **place)) if given.get("bias", True) else torch.Tensor()
        self.return_bias = given.get("return_bias", False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = bind("Linear.forward", args, kwargs)["inp"]
        SEEN.append(OPEN[-1] if OPEN else None)
        bias = self.bias if isinstance(self.bias, nn.Parameter) else None
        if self.mode == "column":
            enter = (
                gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
            )
            y = F.linear(enter(x, group=self.group), self.weight, bias)
        else:
            leave = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            y = leave(F.linear(x, self.weight), group=self.group)
            y = y if bias is None else y + bias
        return (y, bias) if self.return_bias else y


@contextmanager
def autocast(*args: Any, **kwargs: Any) -> Iterator[None]:
    OPEN.append(bind("autocast", args, kwargs))
    yield
    OPEN.pop()


def recipe(name: str) -> type:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bind(name, args, kwargs)

    return type(name, (), {"__init__": __init__})


def install() -> None:
    """From here on this process finds it under the name of the real one."""
    modules = {name: ModuleType(f"transformer_engine{name}") for name in ("", ".pytorch", ".common", ".common.recipe")}
    modules[""].__dict__["__version__"] = DECLARED["version"]
    modules[".pytorch"].__dict__.update(Linear=Linear, autocast=autocast)
    for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling"):
        modules[".common.recipe"].__dict__[name] = recipe(name)
    sys.modules.update({module.__name__: module for module in modules.values()})
