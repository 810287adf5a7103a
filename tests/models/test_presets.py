"""Every preset composes with hydra, names every setting, and builds."""

from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from megarec.base.config import build, plain
from megarec.layers.config import HstuBlockConfig
from megarec.models.choice import ModelConfig
from megarec.models.hstu.config import HstuConfig
from megarec.models.registry import build_model
from megarec.models.sasrec.config import SasrecConfig
from megarec.parallel.parts import local_parts
from tests.models.small_log import shape_for

FOLDER = Path(str(files("megarec.conf"))) / "model"
PRESETS = sorted(str(file.relative_to(FOLDER).with_suffix("")) for file in FOLDER.rglob("*.yaml"))
# The .gin files of the public tables: blocks, heads, dqk = dv (HSTU) or feed-forward (SASRec), width, dropout, window
PUBLISHED = {
    "hstu/ml1m": (2, 1, 50, 50, 0.2, 200),
    "hstu/ml1m_large": (8, 2, 25, 50, 0.2, 200),
    "hstu/ml20m": (4, 4, 64, 256, 0.2, 200),
    "hstu/ml20m_large": (16, 8, 32, 256, 0.2, 200),
    "hstu/books": (4, 4, 16, 64, 0.5, 50),
    "hstu/books_large": (16, 8, 8, 64, 0.5, 50),
    "sasrec/ml1m": (2, 1, 50, 50, 0.2, 200),
    "sasrec/ml20m": (4, 4, 256, 256, 0.2, 200),
    "sasrec/books": (4, 4, 64, 64, 0.5, 50),
}


@dataclass(kw_only=True)
class Holder:
    model: ModelConfig


def load(preset: str) -> tuple[dict[str, Any], ModelConfig]:
    with initialize_config_module(config_module="megarec.conf", version_base="1.3"):
        composed = OmegaConf.to_container(compose(overrides=[f"+model={preset}"]), resolve=True)
    assert isinstance(composed, dict)
    return composed["model"], build(Holder, composed).model


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_names_every_setting(preset: str) -> None:
    mapping, config = load(preset)
    assert mapping == plain(config)  # so that each can be set on the command line
    assert preset.startswith(f"{config.name}/")


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds(preset: str) -> None:
    _, config = load(preset)
    with torch.device("meta"):
        model = build_model(config, shape_for(config), local_parts())
    assert len(model.blocks) == config.num_layers


@pytest.mark.parametrize(
    ("preset", "published"),
    [("argus/mini", 3.2e6), ("argus/small", 18.9e6), ("argus/medium", 126.0e6), ("argus/large", 1.007e9)],
)
def test_published_sizes(preset: str, published: float) -> None:
    _, config = load(preset)
    with torch.device("meta"):
        blocks = build_model(config, shape_for(config), local_parts()).blocks
    matrices = sum(p.numel() for p in blocks.parameters() if p.dim() == 2)
    assert matrices == 12 * config.num_layers * config.width**2
    assert matrices == pytest.approx(published, rel=2e-2)  # the paper rounds; its 3.2 M are 3.15 M


def test_every_public_preset_is_in_the_table() -> None:
    others = {"hstu/tiny", "hstu/mlperf", "sasrec/tiny"}
    assert {preset for preset in PRESETS if not preset.startswith("argus/")} == {*PUBLISHED, *others}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_settings_of_the_public_tables(preset: str) -> None:
    _, config = load(preset)
    blocks, heads, inner, width, dropout, window = PUBLISHED[preset]
    assert (config.num_layers, config.block.num_heads, config.width, config.dropout) == (blocks, heads, width, dropout)
    assert (config.table_width, config.heads.query_width) == (width, width)
    assert config.max_positions == window + 11  # ten outputs and the padding
    assert (config.heads.normalize, config.heads.temperature, config.heads.learn_temperature) == (True, 0.05, False)
    assert (config.heads.item_tower, config.heads.query_context) == ("none", False)
    assert (config.input_fields, config.item_fields, config.feedback_heads) == (("item",), ("item",), ())
    if isinstance(config, HstuConfig):
        assert (config.block.qk_head_width, config.block.v_head_width) == (inner, inner)
        assert config.block.scaling_events == window + 11
        assert replace(config.block, num_heads=1, qk_head_width=1, v_head_width=1, scaling_events=1) == HstuBlockConfig(
            num_heads=1, qk_head_width=1, v_head_width=1, scaling_events=1, num_time_buckets=128
        )  # research: what HstuBlockConfig starts from, with the time bias
    else:
        assert isinstance(config, SasrecConfig)
        assert (config.block.feed_forward_width, config.block.activation) == (inner, "relu")


def test_hstu_of_the_public_table() -> None:
    _, config = load("hstu/ml1m")
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
