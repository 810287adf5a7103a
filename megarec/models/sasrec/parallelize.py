"""Fills SASRec with parts."""

from megarec.base.errors import UserError
from megarec.models.sasrec.config import SasrecConfig
from megarec.models.sasrec.model import Sasrec
from megarec.models.shape import InputShape
from megarec.parallel.parts import Parts


def build(config: SasrecConfig, shape: InputShape, parts: Parts) -> Sasrec:
    """The model on this rank.

    Raises:
        UserError: the heads do not divide over the tensor-parallel ranks, or dropout would give other numbers on a
            shard of the heads than on all of them.
    """
    if config.block.num_heads % parts.tp_size:
        raise UserError(f"{config.block.num_heads} heads do not divide over {parts.tp_size} tensor-parallel ranks")
    if parts.tp_size > 1 and config.dropout:
        raise UserError(
            "SASRec drops probabilities and hidden channels, of all heads together",
            where="model.dropout",
            fix="Set it to 0",
        )
    return Sasrec(config, shape, parts)
