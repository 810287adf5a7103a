"""Dropout whose mask is a function of what it falls on, recomputed in the backward pass and never stored."""

from dataclasses import dataclass

from torch import Tensor

from megarec_kernels.devices import has_kernel
from megarec_kernels.dropout.reference import dropout_reference
from megarec_kernels.hashing import keep_mask_torch

WORD = 4  # channels that share one hash


@dataclass(frozen=True, kw_only=True)
class DropoutMask:
    """Which channels of which tokens are kept: a pure function of (key, token number, channel).

    Attributes:
        key: 64 bits, one for each pack, layer and site.
        token: `[T]` int64, the number of each token in its pack.
        probability: of a channel to be dropped, a multiple of 2^-16 below 1.
        num_channels: of the whole mask.
        first_channel: where in it the channels at hand begin.
    """

    key: int
    token: Tensor
    probability: float
    num_channels: int
    first_channel: int = 0

    def keep(self, width: int) -> Tensor:
        """`[T, width]` bool, true where a channel is kept."""
        keep = keep_mask_torch(self.key, self.token, self.num_channels, self.probability)
        return keep[:, self.first_channel : self.first_channel + width]

    @property
    def starts_a_word(self) -> bool:
        """Whether the channels at hand begin where a hash does, which the GPU kernels rely on."""
        return self.first_channel % WORD == 0


def dropout(x: Tensor, mask: DropoutMask | None, *, add_to: Tensor | None = None) -> Tensor:
    """`x keep / (1 - probability)`, added to `add_to` if given; without a mask `x` itself.

    On CUDA one pass forward and one backward; see the README.

    Args:
        x: `[T, C]`.
        mask: what is dropped.
        add_to: `[T, C]`, a residual stream.

    Returns:
        `[T, C]`.

    Raises:
        ValueError: the mask is of other tokens or fewer channels; names the argument.
    """
    if mask is None:
        return x if add_to is None else add_to + x
    check_mask(mask, *x.shape)
    if has_kernel(x, add_to) and mask.starts_a_word:
        from megarec_kernels.dropout.gpu import run_dropout

        return run_dropout(x, mask, add_to)
    return dropout_reference(x, mask, add_to=add_to)


def check_mask(mask: DropoutMask, num_tokens: int, width: int) -> None:
    """Refuses a mask that is not of `num_tokens` tokens with at least `width` channels from its first one on."""
    if mask.token.shape != (num_tokens,):
        raise ValueError(f"mask.token must be [{num_tokens}], one number per row, got {list(mask.token.shape)}")
    if mask.first_channel + width > mask.num_channels:
        needed = f"{mask.first_channel} to {mask.first_channel + width}"
        raise ValueError(f"mask has {mask.num_channels} channels, the input needs {needed}")
