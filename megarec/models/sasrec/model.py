"""SASRec: Self-Attentive Sequential Recommendation (Kang and McAuley, arXiv 1808.09781)."""

from megarec.layers.sasrec_block import SasrecBlock
from megarec.models.model import RecModel
from megarec.models.sasrec.config import SasrecConfig
from megarec.models.shape import InputShape
from megarec.parallel.parts import Parts
from megarec.parallel.stages import Stage


class Sasrec(RecModel):
    """A stack of SASRec blocks with no norm behind it; input as in the public research code of HSTU.

    The input is the item's row times sqrt(width) plus a learned position, which starts as normal(0, 1 / sqrt(width))
    (published: normal cut at two deviations).
    """

    def __init__(self, config: SasrecConfig, shape: InputShape, parts: Parts, stage: Stage) -> None:
        blocks = {
            layer: SasrecBlock(
                config.block,
                width=config.width,
                layer=layer,
                max_tokens=config.max_tokens,
                dropout=config.dropout,
                parts=parts,
            )
            for layer in stage.layers
        }
        scale, std = config.width**0.5, config.width**-0.5
        super().__init__(
            config, shape, parts, stage, blocks=blocks, final_norm=None, input_scale=scale, position_std=std
        )
