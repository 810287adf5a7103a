"""HSTU: Hierarchical Sequential Transduction Units (Zhai et al., arXiv 2402.17152)."""

from dataclasses import replace

from megarec_kernels.hstu_attention import bucket_times

from megarec.layers.hstu_block import HstuBlock
from megarec.layers.tokens import Tokens
from megarec.models.hstu.config import HstuConfig
from megarec.models.inputs import Events
from megarec.models.model import RecModel
from megarec.models.shape import InputShape
from megarec.parallel.parts import Parts
from megarec.parallel.stages import Stage


class Hstu(RecModel):
    """A stack of HSTU blocks with no norm behind it; input as in the public research code.

    The input is the item's row times sqrt(width) plus a learned position, which starts as Xavier normal, with variance
    2 / (max_positions + width). (The public code first fills the positions with std 1 / sqrt(width), and then once more
    in `HSTU.reset_params`.)
    """

    def __init__(self, config: HstuConfig, shape: InputShape, parts: Parts, stage: Stage) -> None:
        blocks = {
            layer: HstuBlock(
                config.block,
                width=config.width,
                layer=layer,
                max_tokens=config.max_tokens,
                dropout=config.dropout,
                parts=parts,
            )
            for layer in stage.layers
        }
        scale = config.width**0.5 if config.scale_input else 1.0
        std = (2.0 / (config.max_positions + config.width)) ** 0.5
        super().__init__(
            config, shape, parts, stage, blocks=blocks, final_norm=None, input_scale=scale, position_std=std
        )
        self.num_time_buckets = config.block.num_time_buckets

    @property
    def reads_query_time(self) -> bool:
        """With a time bias, which counts from the time of the question."""
        return self.num_time_buckets > 0

    def _tokens(self, events: Events) -> Tokens:
        tokens = super()._tokens(events)
        if not self.num_time_buckets:
            return tokens
        buckets = bucket_times(tokens.plan, tokens.timestamp, tokens.query_timestamp, num_buckets=self.num_time_buckets)
        return replace(tokens, time_buckets=buckets)
