"""Fills HSTU with parts."""

from megarec.base.errors import UserError
from megarec.models.hstu.config import HstuConfig
from megarec.models.hstu.model import Hstu
from megarec.models.shape import InputShape
from megarec.parallel.parts import Parts


def build(config: HstuConfig, shape: InputShape, parts: Parts) -> Hstu:
    """The model on this rank.

    Raises:
        UserError: the heads do not divide over the tensor-parallel ranks, or what the settings ask for would give
            other numbers on a shard of the heads than on all of them.
    """
    if config.block.num_heads % parts.tp_size:
        raise UserError(f"{config.block.num_heads} heads do not divide over {parts.tp_size} tensor-parallel ranks")
    if parts.tp_size > 1 and config.block.output_norm == "all_heads":
        raise UserError(
            "output_norm=all_heads needs all heads on one rank",
            where="model.block.output_norm",
            fix="Set it to per_head",
        )
    if parts.tp_size > 1 and config.dropout:
        raise UserError("HSTU drops channels of all heads together", where="model.dropout", fix="Set it to 0")
    return Hstu(config, shape, parts)
