"""Every preset composes with hydra, names every setting, and builds."""

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from megarec.base.config import build, plain
from megarec.models.argus.config import ArgusConfig
from megarec.models.choice import ModelConfig
from megarec.models.hstu.config import HstuConfig
from megarec.models.registry import build_model
from megarec.parallel.parts import local_parts
from tests.models.small_log import shape_for

PRESETS = sorted(f.name.removesuffix(".yaml") for f in files("megarec.conf").joinpath("model").iterdir())


@dataclass(kw_only=True)
class Holder:
    model: ArgusConfig | HstuConfig


def load(preset: str) -> tuple[dict[str, Any], ModelConfig]:
    with initialize_config_module(config_module="megarec.conf", version_base="1.3"):
        composed = OmegaConf.to_container(compose(overrides=[f"+model={preset}"]), resolve=True)
    assert isinstance(composed, dict)
    return composed["model"], build(Holder, composed).model


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_names_every_setting(preset: str) -> None:
    mapping, config = load(preset)
    assert mapping == plain(config)  # so that each can be set on the command line
    assert preset.startswith(config.name)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds(preset: str) -> None:
    _, config = load(preset)
    with torch.device("meta"):
        model = build_model(config, shape_for(config), local_parts())
    assert len(model.blocks) == config.num_layers


@pytest.mark.parametrize(("preset", "published"), [("argus_mini", 3.15e6), ("argus_small", 18.87e6)])
def test_published_sizes(preset: str, published: float) -> None:
    _, config = load(preset)
    with torch.device("meta"):
        blocks = build_model(config, shape_for(config), local_parts()).blocks
    matrices = sum(p.numel() for p in blocks.parameters() if p.dim() == 2)
    assert matrices == pytest.approx(published, rel=2e-3)


def test_hstu_of_the_public_table() -> None:
    _, config = load("hstu_ml1m")
    assert isinstance(config, HstuConfig)
    model = build_model(config, shape_for(config), local_parts())
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "position.weight": (211, 50),
        **{
            f"blocks.{layer}.{name}": shape
            for layer in range(2)
            for name, shape in {
                "uvqk.weight": (200, 50),
                "position_bias": (211,),
                "time_bias": (129,),
                "out.weight": (50, 50),
                "out.bias": (50,),
            }.items()
        },
    }
    assert float(model.inverse_temperature()) == pytest.approx(20.0)
