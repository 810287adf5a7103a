"""Streams of ids as popular as those of real logs."""

import torch
from torch import Tensor

from kernels.bench.cases import Draw


def draw_ids(draw: Draw, *, num_tables: int, num_rows: int, num_lookups: int, exponent: float = 1.05) -> Tensor:
    """Rows of tables numbered through, equally many for each, `P(row r of a table) ~ (r + 1)^-exponent`: `[n, 1]`."""
    weights = torch.arange(1, num_rows + 1, dtype=torch.float64, device=draw.device) ** -exponent
    bounds = weights.cumsum(0) / weights.sum()
    uniform = torch.rand(
        num_tables, num_lookups // num_tables, generator=draw.generator, device=draw.device, dtype=torch.float64
    )
    rows = torch.searchsorted(bounds, uniform).clamp(max=num_rows - 1)
    first = torch.arange(num_tables, device=draw.device)[:, None] * num_rows
    return (first + rows).reshape(-1, 1)
