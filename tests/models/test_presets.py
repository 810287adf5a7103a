"""Every preset composes with hydra, names every setting, and builds."""

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from megarec.base.config import build, plain
from megarec.models.choice import ModelConfig
from megarec.models.hstu.config import HstuConfig
from megarec.models.registry import build_model
from megarec.models.sasrec.config import SasrecConfig
from megarec.parallel.parts import local_parts
from tests.models.small_log import shape_for

PRESETS = sorted(
    f"{folder.name}/{file.name.removesuffix('.yaml')}"
    for folder in files("megarec.conf").joinpath("model").iterdir()
    for file in folder.iterdir()
)

# meta-recsys/generative-recommenders, configs/*/*-final.gin, and the defaults of train_fn
PUBLIC = {
    "hstu/ml1m": {"layers": 2, "heads": 1, "qk": 50, "v": 50, "width": 50, "dropout": 0.2, "longest": 200},
    "hstu/ml1m_large": {"layers": 8, "heads": 2, "qk": 25, "v": 25, "width": 50, "dropout": 0.2, "longest": 200},
    "hstu/ml20m": {"layers": 4, "heads": 4, "qk": 64, "v": 64, "width": 256, "dropout": 0.2, "longest": 200},
    "hstu/ml20m_large": {"layers": 16, "heads": 8, "qk": 32, "v": 32, "width": 256, "dropout": 0.2, "longest": 200},
    "hstu/books": {"layers": 4, "heads": 4, "qk": 16, "v": 16, "width": 64, "dropout": 0.5, "longest": 50},
    "hstu/books_large": {"layers": 16, "heads": 8, "qk": 8, "v": 8, "width": 64, "dropout": 0.5, "longest": 50},
    "sasrec/ml1m": {"layers": 2, "heads": 1, "ffn": 50, "width": 50, "dropout": 0.2, "longest": 200},
    "sasrec/ml20m": {"layers": 4, "heads": 4, "ffn": 256, "width": 256, "dropout": 0.2, "longest": 200},
    "sasrec/books": {"layers": 4, "heads": 4, "ffn": 64, "width": 64, "dropout": 0.5, "longest": 50},
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
    assert preset.partition("/")[0] == config.name


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds(preset: str) -> None:
    _, config = load(preset)
    with torch.device("meta"):
        model = build_model(config, shape_for(config), local_parts())
    assert len(model.blocks) == config.num_layers


@pytest.mark.parametrize(
    ("preset", "published"),
    [("argus/mini", 3.15e6), ("argus/small", 18.87e6), ("argus/medium", 126.0e6), ("argus/large", 1.007e9)],
)
def test_published_sizes(preset: str, published: float) -> None:
    _, config = load(preset)
    with torch.device("meta"):
        blocks = build_model(config, shape_for(config), local_parts()).blocks
    matrices = sum(p.numel() for p in blocks.parameters() if p.dim() == 2)
    assert matrices == pytest.approx(published, rel=2e-3)


def test_every_public_preset_is_in_the_table() -> None:
    ours = {"hstu/tiny", "sasrec/tiny"}
    assert {p for p in PRESETS if p.startswith(("hstu/", "sasrec/"))} - ours == set(PUBLIC)


@pytest.mark.parametrize("preset", PUBLIC)
def test_settings_of_the_public_tables(preset: str) -> None:
    _, config = load(preset)
    found = {"layers": config.num_layers, "heads": config.block.num_heads, "width": config.width}
    if isinstance(config, HstuConfig):
        found |= {"qk": config.block.qk_head_width, "v": config.block.v_head_width}
        assert config.block.scaling_events == config.max_positions  # the padded length divides the attention
        assert (config.block.silu_on, config.block.scale, config.block.concat) == ("uvqk", "one", "none")
        assert (config.block.position_bias, config.block.num_time_buckets, config.scale_input) == (True, 128, True)
    else:
        assert isinstance(config, SasrecConfig)
        found |= {"ffn": config.block.feed_forward_width}
        assert config.block.activation == "relu"
    # the published arrays have room for ten more events and the next one
    assert {**found, "dropout": config.dropout, "longest": config.max_positions - 10 - 1} == PUBLIC[preset]
    assert config.table_width == config.heads.query_width == config.width
    assert (config.input_fields, config.item_fields, config.feedback_heads) == (("item",), ("item",), ())
    assert (config.heads.query_context, config.heads.item_tower, config.tie_item_tables) == (False, "none", True)
    assert (config.heads.temperature, config.heads.learn_temperature, config.heads.normalize) == (0.05, False, True)


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
