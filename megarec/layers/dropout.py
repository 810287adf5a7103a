"""Dropout whose mask is a function of what it falls on, not of a generator's state."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megarec_kernels.dropout import DropoutMask, dropout
from megarec_kernels.hashing import keep_mask_torch
from torch import Tensor, nn

from megarec.base.random import derive_key
from megarec.parallel.slices import Slices

GRAIN = 65536  # the mask draws 16 bits per channel


@dataclass(frozen=True, kw_only=True)
class Randomness:
    """What a forward pass draws its dropout from.

    Attributes:
        key: one per pack, derived from (seed, lane, pack number).
        token: `[T]` int64, the number of each token in its pack, counted before any slicing.
    """

    key: int
    token: Tensor

    def of(self, slices: Slices) -> "Randomness":
        """What this rank's slice of the tokens draws from."""
        return self if slices.count == 1 else Randomness(key=self.key, token=slices.own(self.token))


class Dropout(nn.Module):
    """Sets channels to zero with the given probability and divides the others by what is left.

    The mask depends on (key, layer, site, token number, channel) alone: any slice of the tokens gets its part of
    the same mask, and so does `part` of `num_parts` equal parts of the channels. The probability is rounded to a
    multiple of 2^-16, and so is the divisor.
    """

    def __init__(self, probability: float, *, layer: int, site: str, part: int = 0, num_parts: int = 1) -> None:
        super().__init__()
        self.probability = round(probability * GRAIN) / GRAIN
        self.layer = layer
        self.site = site
        self.part = part
        self.num_parts = num_parts

    def forward(self, x: Tensor, randomness: Randomness | None, *, add_to: Tensor | None = None) -> Tensor:
        """`[T, C]` to `[T, C]`, added to `add_to` if given; without randomness (evaluation) nothing is dropped."""
        return dropout(x, self.mask(randomness, x.shape[1]), add_to=add_to)

    def mask(self, randomness: Randomness | None, width: int) -> DropoutMask | None:
        """What is dropped of this rank's part, `width` channels; None: nothing."""
        if randomness is None or self.probability == 0.0:
            return None
        return DropoutMask(
            key=derive_key(randomness.key, "dropout", self.layer, self.site),
            token=randomness.token,
            probability=self.probability,
            num_channels=width * self.num_parts,
            first_channel=width * self.part,
        )


class AttentionDropout(nn.Module):
    """Sets attention probabilities to zero with the given probability and divides the others by what is left.

    The mask depends on (key, layer, head, token number of the query, place of the key in its history) alone.
    """

    def __init__(self, probability: float, *, layer: int, heads: range, max_tokens: int) -> None:
        super().__init__()
        self.probability = round(probability * GRAIN) / GRAIN
        self.layer = layer
        self.heads = heads
        self.max_tokens = max_tokens

    def forward(self, randomness: Randomness | None) -> Callable[[Tensor, int], Tensor] | None:
        """What `softmax_attention` takes as `weigh`; None when nothing is dropped."""
        if randomness is None or self.probability == 0.0:
            return None
        numbers, keys = randomness.token, [self._key(randomness, head) for head in self.heads]

        def weigh(query: Tensor, num_keys: int) -> Tensor:
            token = numbers[query]
            masks = [
                keep_mask_torch(key, token, self.max_tokens, self.probability, first_channels=num_keys) for key in keys
            ]
            return torch.stack(masks, dim=1) / (1.0 - self.probability)

        return weigh

    def _key(self, randomness: Randomness, head: int) -> int:
        return derive_key(randomness.key, "dropout", self.layer, "probabilities", head)
