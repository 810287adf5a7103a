"""Floating-point operations of SASRec."""

from megarec.models.flops import attention_flops, linear_flops
from megarec.models.sasrec.config import SasrecConfig


def block_flops(config: SasrecConfig, *, num_tokens: int, num_pairs: int) -> int:
    """Training one block on T tokens, of which so many pairs see each other: `6 T (4 D^2 + 2 D W) + 6 pairs 2 D`.

    `W` is `feed_forward_width`.
    """
    width = config.width
    linear = linear_flops(num_tokens, width, 4 * width + 2 * config.block.feed_forward_width)
    return linear + attention_flops(num_pairs, 2 * width)
