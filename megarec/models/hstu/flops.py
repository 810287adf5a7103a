"""Floating-point operations of HSTU."""

import numpy as np
import numpy.typing as npt

from megarec.models.flops import attention_flops, linear_flops
from megarec.models.hstu.config import HstuConfig


def block_flops(config: HstuConfig, lengths: npt.NDArray[np.integer]) -> int:
    """Training one block on histories of `lengths` tokens, T in all.

    `6 T D N (2 Hqk + 2 Hv) + 6 T g N Hv D + 6 pairs N (Hqk + Hv)` with g = 3 where `concat` adds two gates, else 1.
    """
    block, num_tokens = config.block, int(lengths.sum())
    qk, value = block.num_heads * block.qk_head_width, block.num_heads * block.v_head_width
    gates = 1 if block.concat == "none" else 3
    linear = linear_flops(num_tokens, config.width, 2 * qk + 2 * value)
    linear += linear_flops(num_tokens, gates * value, config.width)
    return linear + attention_flops(lengths, qk + value)
