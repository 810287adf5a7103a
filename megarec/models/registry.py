"""The models by their settings."""

from megarec.models.argus.config import ArgusConfig
from megarec.models.argus.parallelize import build as build_argus
from megarec.models.choice import ModelConfig
from megarec.models.hstu.parallelize import build as build_hstu
from megarec.models.model import RecModel
from megarec.models.shape import InputShape
from megarec.parallel.parts import Parts
from megarec.parallel.placement import name_parameters


def build_model(config: ModelConfig, shape: InputShape, parts: Parts) -> RecModel:
    """The model that `config` describes, its parameters named and placed; `placement.initialize` fills them."""
    if isinstance(config, ArgusConfig):
        model: RecModel = build_argus(config, shape, parts)
    else:
        model = build_hstu(config, shape, parts)
    name_parameters(model)
    return model
