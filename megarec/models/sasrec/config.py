"""The settings of SASRec. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from megarec.layers.config import SasrecBlockConfig
from megarec.models.config import SequenceConfig, require_whole_heads


@dataclass(frozen=True, kw_only=True)
class SasrecConfig(SequenceConfig):
    """SASRec: softmax attention over events, the baseline of the public HSTU tables.

    Attributes:
        name: tells the models apart.
        block: the settings of every block.
    """

    name: Literal["sasrec"] = "sasrec"
    block: SasrecBlockConfig = field(default_factory=SasrecBlockConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole_heads(self.width, self.block.num_heads)
