"""The settings of ARGUS. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from megarec.base.errors import UserError
from megarec.layers.config import TransformerBlockConfig
from megarec.models.config import SequenceConfig


@dataclass(frozen=True, kw_only=True)
class ArgusConfig(SequenceConfig):
    """ARGUS: a pre-norm transformer over events that predicts the next item and the feedback to it.

    Attributes:
        name: tells the models apart.
        block: the settings of every block.
    """

    name: Literal["argus"] = "argus"
    block: TransformerBlockConfig = field(default_factory=TransformerBlockConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.block.num_heads:
            raise UserError(
                f"width {self.width} is not a multiple of num_heads {self.block.num_heads}",
                where="block.num_heads",
            )
