"""The settings of HSTU. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from megarec.layers.config import HstuBlockConfig
from megarec.models.config import SequenceConfig


@dataclass(frozen=True, kw_only=True)
class HstuConfig(SequenceConfig):
    """HSTU: blocks of gated pointwise attention over events.

    Attributes:
        name: tells the models apart.
        block: the settings of every block.
        scale_input: multiplies the sum of an event's rows by sqrt(width) (research variant).
    """

    name: Literal["hstu"] = "hstu"
    block: HstuBlockConfig = field(default_factory=HstuBlockConfig)
    scale_input: bool = True
