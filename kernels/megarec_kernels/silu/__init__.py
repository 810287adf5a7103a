"""The first map of an HSTU block: what stands between its input norm and the attention."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megarec_kernels.devices import has_kernel
from megarec_kernels.silu.reference import linear_silu_reference, split_silu_reference

SiluOn = Literal["uvqk", "u", "none"]


@dataclass(frozen=True, kw_only=True)
class UvqkLayout:
    """A row of `uvqk` is laid out [head, (U, V, Q, K), channel].

    Attributes:
        num_heads: `N`.
        v_head_width: channels of a gate and of a value, `Hv`.
        qk_head_width: channels of a query and of a key, `Hqk`.
    """

    num_heads: int
    v_head_width: int
    qk_head_width: int

    @property
    def widths(self) -> list[int]:
        """Channels of U, V, Q and K per head."""
        return [self.v_head_width, self.v_head_width, self.qk_head_width, self.qk_head_width]

    @property
    def row_width(self) -> int:
        """Channels of a row, `N (2 Hv + 2 Hqk)`."""
        return self.num_heads * sum(self.widths)


def split_silu(uvqk: Tensor, layout: UvqkLayout, *, silu_on: SiluOn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, V `[T, N, Hv]` and Q, K `[T, N, Hqk]` with `SiLU(x) = x sigmoid(x)` on all of them, on U or on none.

    They are views of one activated copy, or, where nothing is activated, of `uvqk`: nothing is copied twice. On CUDA
    the backward pass is one pass too: four gradients in, the packed one out.

    Args:
        uvqk: `[T, N (2 Hv + 2 Hqk)]`.
        layout: how a row is laid out.
        silu_on: what is activated.

    Raises:
        ValueError: the width of `uvqk` is not that of the layout.
    """
    if uvqk.dim() != 2 or uvqk.shape[1] != layout.row_width:
        raise ValueError(f"uvqk must be [T, {layout.row_width}], got {list(uvqk.shape)}")
    if has_kernel(uvqk):
        from megarec_kernels.silu.gpu import run_split_silu

        return run_split_silu(uvqk, layout, silu_on=silu_on)
    return split_silu_reference(uvqk, layout, silu_on=silu_on)


def linear_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`SiLU(x weight^T + bias)`; on CUDA the product writes both what SiLU is taken of and what comes of it.

    No block uses it yet: see the README for what decides that.

    Args:
        x: `[T, D]`.
        weight: `[O, D]`.
        bias: `[O]` or None.

    Returns:
        `[T, O]`.

    Raises:
        ValueError: a shape is wrong; names the argument.
    """
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"x must be [T, D] and weight [O, D], got {list(x.shape)} and {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], got {list(bias.shape)}")
    if has_kernel(x, weight, bias):
        from megarec_kernels.silu.gpu import run_linear_silu

        return run_linear_silu(x, weight, bias)
    return linear_silu_reference(x, weight, bias)
