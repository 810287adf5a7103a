"""Floating-point operations of HSTU."""

from megarec.models.flops import attention_flops, linear_flops
from megarec.models.hstu.config import HstuConfig


def block_flops(config: HstuConfig, *, num_tokens: int, num_pairs: int) -> int:
    """Training one block on T tokens, of which so many pairs see each other.

    `6 T D N (2 Hqk + 2 Hv) + 6 T g N Hv D + 6 pairs N (Hqk + Hv)` with g = 3 where `concat` adds two gates, else 1.
    """
    block = config.block
    qk, value = block.num_heads * block.qk_head_width, block.num_heads * block.v_head_width
    gates = 1 if block.concat == "none" else 3
    linear = linear_flops(num_tokens, config.width, 2 * qk + 2 * value)
    linear += linear_flops(num_tokens, gates * value, config.width)
    return linear + attention_flops(num_pairs, qk + value)
