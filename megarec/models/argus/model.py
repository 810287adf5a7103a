"""ARGUS: AutoRegressive Generative User Sequential modelling (Khrylchenko et al., arXiv 2507.15994)."""

from megarec.layers.norm import LayerNorm
from megarec.layers.transformer_block import TransformerBlock
from megarec.models.argus.config import ArgusConfig
from megarec.models.model import RecModel
from megarec.models.shape import InputShape
from megarec.parallel.parts import Parts
from megarec.parallel.stages import Stage


class Argus(RecModel):
    """A pre-norm causal transformer with a norm behind the last block.

    The paper does not state the position encoding, the number of heads or the start of the weights; ours are learned
    positions counted from the start of the window, and normal(0, 0.02) as in GPT-2.
    """

    def __init__(self, config: ArgusConfig, shape: InputShape, parts: Parts, stage: Stage) -> None:
        blocks = {
            layer: TransformerBlock(
                config.block,
                width=config.width,
                layer=layer,
                num_layers=config.num_layers,
                dropout=config.dropout,
                parts=parts,
            )
            for layer in stage.layers
        }
        norm = LayerNorm(config.width) if stage.last else None
        super().__init__(
            config, shape, parts, stage, blocks=blocks, final_norm=norm, input_scale=1.0, position_std=0.02
        )
