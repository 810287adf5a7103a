"""Two layers of parts: enough to see every kind of parameter that a model has."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarec.parallel.parts import Parts, whole_parameter
from megarec.parallel.placement import Init, initialize, name_parameters

WIDTH, HEADS, INNER = 8, 4, 16


class TinyBlock(nn.Module):
    """A norm, a column-split map, a bias shared by all heads, a row-split map, a residual."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.norm = whole_parameter((WIDTH,), Init(value=1.0))
        self.into = parts.column_linear(WIDTH, INNER, bias=True, std=0.3)
        self.shared = whole_parameter((INNER // HEADS,), Init(kind="normal", std=0.3), sum_over=("tp",))
        self.out = parts.row_linear(INNER, WIDTH, bias=True, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(F.layer_norm(x, (WIDTH,)) * self.norm)
        heads = y.view(*y.shape[:-1], HEADS // self.parts.tp_size, -1) + self.shared
        return x + self.out(torch.tanh(heads).reshape(y.shape))


class TinyModel(nn.Module):
    def __init__(self, parts: Parts, seed: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TinyBlock(parts) for _ in range(2))
        self.head = parts.linear(WIDTH, 1, bias=False, std=0.3)
        self.scale = whole_parameter((), Init(value=1.5))
        name_parameters(self)
        initialize(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(x).squeeze(-1) * self.scale
        return result


def packs_of(step: int, count: int = 4, tokens: int = 5) -> list[dict[str, Any]]:
    """The packs of a step: `x` `[T, WIDTH]`, `y` `[T]`, and a ragged number of targets, once none at all."""
    generator = torch.Generator().manual_seed(step)
    packs = []
    for number in range(count):
        x = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
        y = torch.randn(tokens, generator=generator, dtype=torch.float64)
        packs.append({"x": x, "y": y, "valid": torch.arange(tokens) < (number * 2) % (tokens + 1)})
    return packs


def loss_of(model: nn.Module, pack: dict[str, Any], total: int) -> Tensor:
    """Squared error of the valid targets over the global number of valid targets."""
    output = model(pack["x"].to(next(model.parameters()).dtype))
    return ((output.double() - pack["y"]).square() * pack["valid"]).sum() / total
