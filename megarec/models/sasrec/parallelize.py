"""Fills SASRec with parts."""

from megarec.base.errors import UserError
from megarec.models.sasrec.config import SasrecConfig
from megarec.models.sasrec.model import Sasrec
from megarec.models.shape import InputShape
from megarec.parallel.parts import Parts


def build(config: SasrecConfig, shape: InputShape, parts: Parts) -> Sasrec:
    """The model on this rank.

    Raises:
        UserError: the heads or the hidden channels do not divide over the tensor-parallel ranks.
    """
    for what, count in {"heads": config.block.num_heads, "hidden channels": config.block.feed_forward_width}.items():
        if count % parts.tp_size:
            raise UserError(f"{count} {what} do not divide over {parts.tp_size} tensor-parallel ranks")
    return Sasrec(config, shape, parts)
