"""SiLU of a packed row, and behind a linear map, in plain torch: the path of the CPU and of fp64, and the twins."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from megarec_kernels.silu import SiluOn, UvqkLayout


def split_silu_reference(
    uvqk: Tensor, layout: "UvqkLayout", *, silu_on: "SiluOn"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `split_silu`."""
    if silu_on == "uvqk":
        uvqk = F.silu(uvqk)
    u, v, q, k = uvqk.view(len(uvqk), layout.num_heads, sum(layout.widths)).split(layout.widths, dim=2)
    return F.silu(u) if silu_on == "u" else u, v, q, k


def linear_silu_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `linear_silu`."""
    return F.silu(F.linear(x, weight, bias))
