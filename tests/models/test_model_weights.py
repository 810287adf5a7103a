"""First weights, refusals of shards, dropout and low precision of whole models."""

from dataclasses import replace

import pytest
import torch
from test_model_twins import ARGUS, HSTU, make_model
from torch import Tensor

from megarec.layers.config import HstuBlockConfig
from megarec.models.choice import ModelConfig
from megarec.models.hstu.config import HstuConfig
from megarec.models.registry import build_model
from megarec.parallel.parts import local_parts
from megarec.parallel.placement import initialize
from tests.models.small_log import SmallLog, lay_out, make_lookup, make_table, randomness, shape_for


def weights(config: ModelConfig, seed: int = 1) -> dict[str, Tensor]:
    model = build_model(config, shape_for(config), local_parts())
    initialize(model, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", [ARGUS, HSTU], ids=["argus", "hstu"])
def test_weights_do_not_depend_on_what_else_is_built(config: ModelConfig) -> None:
    torch.manual_seed(0)
    small = weights(config)
    torch.manual_seed(1)
    large = weights(replace(config, num_layers=4, feedback_heads=(), position_embedding=False))
    for name in small.keys() & large.keys():
        if not name.endswith((".attention_out.weight", ".down.weight")):  # their std falls with depth
            assert torch.equal(small[name], large[name]), name
    assert not torch.equal(small["query.mlp.out.weight"], weights(config, seed=2)["query.mlp.out.weight"])


def test_first_weights_have_the_published_spread() -> None:
    argus = weights(replace(ARGUS, width=192, num_layers=8))
    assert argus["blocks.3.qkv.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert argus["blocks.3.attention_out.weight"].std() == pytest.approx(0.005, rel=0.03)
    assert argus["blocks.3.down.weight"].std() == pytest.approx(0.005, rel=0.03)
    assert argus["blocks.3.attention_norm.scale"].unique().tolist() == [1.0]
    block = HstuBlockConfig(num_heads=4, qk_head_width=32, v_head_width=32, num_time_buckets=128)
    hstu = weights(HstuConfig(width=128, table_width=128, block=block))
    assert hstu["blocks.1.uvqk.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert hstu["blocks.1.out.weight"].std() == pytest.approx((2 / 256) ** 0.5, rel=0.03)
    bias = hstu["blocks.1.out.bias"]
    assert bias.abs().max() < 128**-0.5
    assert bias.std() == pytest.approx((3 * 128) ** -0.5, rel=0.15)  # 128 numbers
    assert hstu["position.weight"].std() == pytest.approx((2 / (512 + 128)) ** 0.5, rel=0.03)
    assert hstu["temperature.log_inverse"].exp().item() == pytest.approx(20.0)


@pytest.mark.parametrize("layout", ["fused", "context_item_feedback"])
@pytest.mark.parametrize("base", [ARGUS, HSTU], ids=["argus", "hstu"])
def test_dropout_follows_the_numbers_of_the_tokens(base: ModelConfig, layout: str) -> None:
    config = replace(base, dropout=0.3, token_layout=layout)
    shape = shape_for(config)
    model, lookup = make_model(config, shape), make_lookup(make_table(shape, config))
    laid = lay_out(SmallLog(), shape, config)
    num = len(laid.events.position)
    quiet = model.encode(laid.events, lookup)
    one, again, other = (
        model.encode(replace(laid.events, randomness=randomness(num, key)), lookup) for key in (7, 7, 8)
    )
    assert torch.equal(one, again)
    assert not torch.allclose(one, quiet) and not torch.allclose(one, other)
    alone = SmallLog(lengths=(4,))
    source = SmallLog()
    alone.time = source.time[:1]
    alone.columns = {name: column[:1] for name, column in source.columns.items()}
    first = lay_out(alone, shape, config, dead=0).events
    shorter = model.encode(replace(first, randomness=randomness(len(first.position))), lookup)
    torch.testing.assert_close(one[: len(shorter)], shorter, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [ARGUS, HSTU], ids=["argus", "hstu"])
def test_bf16_weights_with_fp32_tables(config: ModelConfig) -> None:
    shape = shape_for(config)
    exact, table = make_model(config, shape), make_table(shape, config)
    rounded = make_model(config, shape).bfloat16()
    laid = lay_out(SmallLog(), shape, config)
    rows = [row for row, _, _ in laid.asked]
    queries = []
    for model, matrix in ((exact, table), (rounded, table.float())):
        lookup = make_lookup(matrix)
        query = model.next_item_query(model.encode(laid.events, lookup), laid.events, lookup)
        queries.append(query[rows])
    assert queries[1].dtype == torch.float32
    assert model.inverse_temperature().dtype == torch.float32
    torch.testing.assert_close(queries[1].double(), queries[0], rtol=0, atol=0.05)
    torch.testing.assert_close(queries[1].norm(dim=1), torch.ones(len(rows)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [ARGUS, HSTU], ids=["argus", "hstu"])
def test_no_events_at_all(config: ModelConfig) -> None:
    shape = shape_for(config)
    model, table = make_model(config, shape), make_table(shape, config)
    for lengths, dead in (((), 4), ((1, 1), 4)):
        events, lookup = lay_out(SmallLog(lengths=lengths), shape, config, dead=dead).events, make_lookup(table)
        states = model.encode(events, lookup)
        outputs = [
            model.next_item_query(states, events, lookup),
            *model.feedback_logits(states, events, lookup).values(),
        ]
        assert all(len(value) == dead and bool(value.isfinite().all()) for value in outputs)
