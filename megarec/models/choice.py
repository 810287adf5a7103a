"""The settings of any model: a field `model: ModelConfig` is chosen by its `name`. Imports no torch."""

from megarec.models.argus.config import ArgusConfig
from megarec.models.hstu.config import HstuConfig
from megarec.models.sasrec.config import SasrecConfig

ModelConfig = ArgusConfig | HstuConfig | SasrecConfig
