"""Floating-point operations of ARGUS."""

import numpy as np
import numpy.typing as npt

from megarec.models.argus.config import ArgusConfig
from megarec.models.flops import attention_flops, linear_flops


def block_flops(config: ArgusConfig, lengths: npt.NDArray[np.integer]) -> int:
    """Training one block on histories of `lengths` tokens, T in all: `6 T (4 + 2 m) D^2 + 6 pairs 2 D`.

    `m` is `feed_forward_multiple`; with m = 4 this is 72 T D^2, six times the 12 D^2 weights of a block.
    """
    num_tokens, width = int(lengths.sum()), config.width
    hidden = config.block.feed_forward_multiple * width
    linear = linear_flops(num_tokens, width, 4 * width) + linear_flops(num_tokens, width, 2 * hidden)
    return linear + attention_flops(lengths, 2 * width)
