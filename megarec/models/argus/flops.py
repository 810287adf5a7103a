"""Floating-point operations of ARGUS."""

from megarec.models.argus.config import ArgusConfig
from megarec.models.flops import attention_flops, linear_flops


def block_flops(config: ArgusConfig, *, num_tokens: int, num_pairs: int) -> int:
    """Training one block on T tokens, of which so many pairs see each other: `6 T (4 + 2 m) D^2 + 6 pairs 2 D`.

    `m` is `feed_forward_multiple`; with m = 4 this is 72 T D^2, six times the 12 D^2 weights of a block.
    """
    width = config.width
    hidden = config.block.feed_forward_multiple * width
    linear = linear_flops(num_tokens, width, 4 * width) + linear_flops(num_tokens, width, 2 * hidden)
    return linear + attention_flops(num_pairs, 2 * width)
