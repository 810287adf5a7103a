"""Fills ARGUS with parts."""

from megarec.base.errors import UserError
from megarec.models.argus.config import ArgusConfig
from megarec.models.argus.model import Argus
from megarec.models.shape import InputShape
from megarec.parallel.parts import Parts


def build(config: ArgusConfig, shape: InputShape, parts: Parts) -> Argus:
    """The model on this rank.

    Raises:
        UserError: the heads do not divide over the tensor-parallel ranks.
    """
    if config.block.num_heads % parts.tp_size:
        raise UserError(f"{config.block.num_heads} heads do not divide over {parts.tp_size} tensor-parallel ranks")
    return Argus(config, shape, parts)
