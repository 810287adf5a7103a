"""Fills HSTU with parts."""

from megarec.base.errors import UserError
from megarec.models.hstu.config import HstuConfig
from megarec.models.hstu.model import Hstu
from megarec.models.shape import InputShape
from megarec.parallel.parts import Parts


def build(config: HstuConfig, shape: InputShape, parts: Parts) -> Hstu:
    """The model on this rank.

    Raises:
        UserError: the heads do not divide over the tensor-parallel ranks.
    """
    if config.block.num_heads % parts.tp_size:
        raise UserError(f"{config.block.num_heads} heads do not divide over {parts.tp_size} tensor-parallel ranks")
    return Hstu(config, shape, parts)
