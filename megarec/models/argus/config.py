"""The settings of ARGUS. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from megarec.layers.config import TransformerBlockConfig
from megarec.models.config import SequenceConfig, require_whole_heads


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
        require_whole_heads(self.width, self.block.num_heads)
