"""Both models against plain code written from the equations: forward and all gradients, every switch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megarec.layers.config import HeadsConfig, HstuBlockConfig, TransformerBlockConfig
from megarec.models.argus.config import ArgusConfig
from megarec.models.choice import ModelConfig
from megarec.models.hstu.config import HstuConfig
from megarec.models.model import RecModel
from megarec.models.registry import build_model
from megarec.models.shape import InputShape
from megarec.parallel.parts import local_parts
from megarec.parallel.placement import initialize, placements
from tests.models.small_log import SmallLog, lay_out, make_lookup, make_table, shape_for
from tests.models.twins import Twin

HEADS = HeadsConfig(query_width=10, hidden_width=11)
PRODUCT = replace(HEADS, feedback_head="product_swish")
BLOCK = HstuBlockConfig(num_heads=2, qk_head_width=3, v_head_width=5, num_time_buckets=30, scaling_events=7.0)
ARGUS = ArgusConfig(width=12, table_width=6, max_positions=16, heads=HEADS, block=TransformerBlockConfig(num_heads=3))
HSTU = HstuConfig(width=12, table_width=6, max_positions=16, heads=HEADS, block=BLOCK)

SHARED_SWITCHES = {
    "item_action": {"token_layout": "item_action"},
    "context_item_feedback": {"token_layout": "context_item_feedback"},
    "same_widths": {"table_width": 12},
    "prefix": {"prefix_fields": ("device",)},
    "prefix_of_two": {"prefix_fields": ("organic", "device"), "table_width": 12},
    "prefix_item_action": {"prefix_fields": ("organic",), "token_layout": "item_action"},
    "no_position": {"position_embedding": False},
    "time_gap": {"time_gap_buckets": 12},
    "items_only": {"input_fields": ("item",), "item_fields": ("item",), "feedback_heads": ()},
    "one_head": {"feedback_heads": ("ratio",)},
    "feedback_in_only": {"input_fields": ("item", "like"), "feedback_heads": ("ratio", "like")},
    "one_layer": {"num_layers": 1},
    "query_residual": {"heads": replace(HEADS, query_residual=True, query_width=12)},
    "state_is_query": {"heads": replace(HEADS, query_context=False, query_width=12)},
    "row_is_item": {"heads": replace(HEADS, item_tower="none", query_width=6)},
    "item_mlp": {"heads": replace(HEADS, item_tower="mlp")},
    "not_normalized": {"heads": replace(HEADS, normalize=False)},
    "product": {"heads": PRODUCT},
    "product_same_widths": {"table_width": 12, "heads": PRODUCT},
    "product_item_action": {"token_layout": "item_action", "heads": PRODUCT},
    "product_no_context": {"input_fields": ("item", "like"), "heads": PRODUCT},
    "fixed_temperature": {"heads": replace(HEADS, learn_temperature=False, temperature=0.2)},
}
BLOCK_SWITCHES = {
    "silu_on_u": {"silu_on": "u"},
    "scaled": {"scale": "inverse_sqrt_width"},
    "no_position_bias": {"position_bias": False},
    "no_time_bias": {"num_time_buckets": 0},
    "few_buckets": {"num_time_buckets": 20},
    "per_head_norm": {"output_norm": "per_head"},
    "affine": {"input_norm_affine": True, "output_norm_affine": True},
    "affine_per_head": {"output_norm": "per_head", "output_norm_affine": True},
    "u_and_norm": {"concat": "u_and_norm"},
    "u_and_attention": {"concat": "u_and_attention"},
    "uvqk_bias": {"uvqk_bias": True},
    "no_output_bias": {"output_bias": False},
}
CASES: dict[str, ModelConfig] = {
    "argus": ARGUS,
    "argus_no_bias": replace(ARGUS, block=replace(ARGUS.block, bias=False, feed_forward_multiple=2)),
    "hstu": HSTU,
    "hstu_unscaled_input": replace(HSTU, scale_input=False),
    **{f"argus_{name}": replace(ARGUS, **switch) for name, switch in SHARED_SWITCHES.items()},
    **{f"hstu_{name}": replace(HSTU, **switch) for name, switch in SHARED_SWITCHES.items()},
    **{f"hstu_{name}": replace(HSTU, block=replace(BLOCK, **switch)) for name, switch in BLOCK_SWITCHES.items()},
}


def make_model(config: ModelConfig, shape: InputShape) -> RecModel:
    """An fp64 model whose every parameter differs from every other, biases and scales too."""
    model = build_model(config, shape, local_parts()).double()
    initialize(model, 3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model


def twin_outputs(twin: Twin, asked: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    states = {user: twin.states(user) for _, user, _ in asked}
    queries = torch.stack([twin.query(states[u], u, e) for _, u, e in asked])
    items = torch.stack([twin.item(u, e + 1) for _, u, e in asked])
    if not twin.shape.feedback_heads:
        return queries, items, torch.zeros(len(asked), 0, dtype=torch.float64)
    return queries, items, torch.stack([twin.feedback(states[u], u, e) for _, u, e in asked])


def weigh(outputs: tuple[Tensor, ...], inverse_temperature: Tensor) -> Tensor:
    """A number that depends on every output, through scores too."""
    generator = torch.Generator().manual_seed(9)
    queries, items, logits = outputs
    total = (torch.tanh(queries @ items.T * inverse_temperature)).sum()
    for value in (queries, items, logits):
        total = total + (value * torch.randn(value.shape, generator=generator, dtype=torch.float64)).sum()
    return total


@pytest.mark.parametrize("name", CASES)
def test_model_equals_its_equations(name: str) -> None:
    config, log = CASES[name], SmallLog()
    shape = shape_for(config)
    model, table = make_model(config, shape), make_table(shape, config)
    lookup, laid = make_lookup(table), lay_out(log, shape, config)
    rows = [row for row, _, _ in laid.asked]
    states = model.encode(laid.events, lookup)
    assert states.shape == (len(laid.events.position) * config.tokens_per_event, config.width)
    tower = [[r for f in shape.item_tower for r in log.rows(f.name, u, e + 1, shape)] for _, u, e in laid.asked]
    logits = model.feedback_logits(states, laid.events, lookup)
    assert set(logits) == set(shape.feedback_heads)
    together = torch.cat([logits[name][rows] for name in shape.feedback_heads], dim=1) if logits else None
    outputs = (
        model.next_item_query(states, laid.events, lookup)[rows],
        model.item_vectors(torch.tensor(tower), lookup),
        torch.zeros(len(rows), 0, dtype=torch.float64) if together is None else together,
    )
    twin = Twin(config, shape, log, dict(model.named_parameters()), table)
    expected = twin_outputs(twin, laid.asked)
    for value, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-11)
    weigh(outputs, model.inverse_temperature()).backward()
    weigh(expected, twin.inverse_temperature()).backward()
    torch.testing.assert_close(table.grad, twin.table.grad, rtol=1e-9, atol=1e-10)
    for parameter_name, parameter in model.named_parameters():
        wanted_grad = twin.p[parameter_name].grad
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wanted_grad = torch.zeros_like(parameter) if wanted_grad is None else wanted_grad
        torch.testing.assert_close(
            grad, wanted_grad, rtol=1e-9, atol=1e-10, msg=lambda m, n=parameter_name: f"{n}: {m}"
        )


@pytest.mark.parametrize("config", [ARGUS, HSTU], ids=["argus", "hstu"])
def test_a_changed_equation_is_noticed(config: ModelConfig) -> None:
    log = SmallLog()
    shape = shape_for(config)
    model, table = make_model(config, shape), make_table(shape, config)
    laid = lay_out(log, shape, config)
    twin = Twin(config, shape, log, dict(model.named_parameters()), table)
    wrong = Twin(replace(config, num_layers=1), shape, log, dict(model.named_parameters()), table)
    right, planted = (twin_outputs(t, laid.asked)[0] for t in (twin, wrong))
    assert (right - planted).abs().max() > 1e-3


@pytest.mark.parametrize("config", list(CASES.values()), ids=list(CASES))
def test_every_parameter_is_placed_and_named(config: ModelConfig) -> None:
    model = build_model(config, shape_for(config), local_parts())
    named = dict(model.named_parameters())
    assert [p.global_name for _, p in placements(model)] == list(named)
    assert all(tuple(parameter.shape) == p.global_shape for parameter, p in placements(model))
