"""Floating-point operations of SASRec."""

import numpy as np
import numpy.typing as npt

from megarec.models.flops import attention_flops, linear_flops
from megarec.models.sasrec.config import SasrecConfig


def block_flops(config: SasrecConfig, lengths: npt.NDArray[np.integer]) -> int:
    """Training one block on histories of `lengths` tokens, T in all: `6 T (4 D^2 + 2 D W) + 6 pairs 2 D`.

    `W` is `feed_forward_width`.
    """
    num_tokens, width = int(lengths.sum()), config.width
    linear = linear_flops(num_tokens, width, 4 * width + 2 * config.block.feed_forward_width)
    return linear + attention_flops(lengths, 2 * width)
