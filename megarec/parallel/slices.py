"""The tokens of a pack in slices, one for each rank that works on it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Slices:
    """`count` equal slices along the first dimension, of which this rank has number `index`.

    Attributes:
        index: of this rank.
        count: of the ranks that share a pack.
        gather: the slices of all ranks end to end, on each of them; the gradient of a slice is the sum over ranks.
        sum: of a tensor over the ranks, on each of them; has no gradient.
        max: likewise, the largest.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[Tensor], Tensor] = lambda x: x
    sum: Callable[[Tensor], Tensor] = lambda x: x
    max: Callable[[Tensor], Tensor] = lambda x: x

    def own(self, x: Tensor) -> Tensor:
        """This rank's part of `x` `[n, *]`; `count` divides n."""
        return x if self.count == 1 else x[self.rows_of(len(x))]

    def rows_of(self, num_rows: int) -> slice:
        """The rows that `own` gives."""
        size, rest = divmod(num_rows, self.count)
        if rest:
            raise AssertionError(f"{num_rows} rows do not divide over {self.count} ranks")
        return slice(self.index * size, (self.index + 1) * size)

    def next_row(self, x: Tensor) -> Tensor:
        """Row t of `x`, which is this rank's slice, becomes row t + 1 of all slices; behind the last one stands 0."""
        if self.count == 1 or not len(x):
            return torch.cat([x[1:], torch.zeros_like(x[:1])])
        following = (self.index + 1) % self.count  # the last rank takes part in the sum of gradients too
        first = self.gather(x[:1])[following : following + 1] * float(following != 0)
        return torch.cat([x[1:], first])
