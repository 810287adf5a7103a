"""Every published variant of the HSTU block against the equations of its own source, in the weights of that source.

The references are dense and padded, as the sources are, and know nothing of the package but the settings of a row.
Each takes what dropout leaves of the output map's input, `keep`, and multiplies by it where its source drops.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megarec_kernels.dropout import DropoutMask
from megarec_kernels.hstu_attention import bucket_times
from torch import Tensor, nn
from torch.func import functional_call

from megarec.base.errors import UserError
from megarec.layers.config import HstuBlockConfig
from megarec.layers.dropout import Randomness
from megarec.layers.hstu_block import HstuBlock
from megarec.layers.tokens import Tokens, split_events
from megarec.models.hstu.convert import block_from_published
from megarec.parallel.parts import local_parts

WIDTH, PADDED, NUM_BUCKETS = 10, 9, 128
LENGTHS, DEAD = (1, 9, 4), 3
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0)
NUM_TOKENS = sum(LENGTHS) + DEAD
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """Sizes of a published layer."""

    heads: int = 2
    dqk: int = 3
    dv: int = 5
    concat: bool = False  # three gates
    group_norm: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def pad(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, 0, 0, PADDED - len(rows)))


def split_heads(values: Tensor, heads: int) -> Tensor:
    """`[n, heads * d]` to `[heads, n, d]`."""
    return values.view(len(values), heads, -1).transpose(0, 1)


def research(layer: Layer, w: Weights, x: Tensor, keep: Tensor, times: tuple[Tensor, Tensor]) -> Tensor:
    """generative_recommenders/research/modeling/sequential/hstu.py, SequentialTransductionUnitJagged."""
    n, mm = len(x), F.layer_norm(x, (WIDTH,), eps=1e-6) @ w["_uvqk"]
    if layer.extra.get("activation", "silu") == "silu":
        mm = F.silu(mm)
    u, v, q, k = mm.split([layer.heads * d for d in (layer.dv, layer.dv, layer.dqk, layer.dqk)], dim=1)
    q, k, v = (split_heads(pad(t), layer.heads) for t in (q, k, v))
    qk = q @ k.transpose(1, 2)
    if "_rel_attn_bias._pos_w" in w:
        place = torch.arange(PADDED)
        pos = w["_rel_attn_bias._pos_w"][PADDED - 1 + place[None, :] - place[:, None]]
        asked, happened = (torch.zeros(PADDED, dtype=torch.int64) for _ in range(2))
        happened[:n], asked[:n] = times
        seconds = (asked[:, None] - happened[None, :]).abs().clamp(min=1)
        qk = qk + pos + w["_rel_attn_bias._ts_w"][(seconds.double().log() / 0.301).long().clamp(0, NUM_BUCKETS)]
    weight = F.silu(qk) / PADDED * torch.ones(PADDED, PADDED).tril()
    attention = (weight @ v).transpose(0, 1).reshape(PADDED, -1)[:n]
    a = F.layer_norm(attention, (layer.heads * layer.dv,), eps=1e-6)
    out = torch.cat([u, a, u * a], dim=1) if layer.concat else u * a
    return F.linear(out * keep, w["_o.weight"], w["_o.bias"]) + x


def production(layer: Layer, w: Weights, x: Tensor, keep: Tensor, times: tuple[Tensor, Tensor]) -> Tensor:
    """generative_recommenders/modules/stu.py, ops/hstu_compute.py, ops/pytorch/pt_hstu_{linear,attention}.py."""
    n = len(x)
    normed = F.layer_norm(x, (WIDTH,), w["_input_norm_weight"], w["_input_norm_bias"], eps=1e-6)
    uvqk = torch.addmm(w["_uvqk_beta"], normed, w["_uvqk_weight"])
    u, v, q, k = uvqk.split([layer.heads * d for d in (layer.dv, layer.dv, layer.dqk, layer.dqk)], dim=1)
    u = F.silu(u)
    q, k, v = (split_heads(pad(t), layer.heads) for t in (q, k, v))
    weight = F.silu(q @ k.transpose(1, 2) * layer.dqk**-0.5) / PADDED * torch.ones(PADDED, PADDED).tril()
    attention = (weight @ v).transpose(0, 1).reshape(PADDED, -1)[:n]
    scale, shift = w["_output_norm_weight"], w["_output_norm_bias"]
    if layer.group_norm:
        grouped = F.group_norm(attention.view(n, layer.heads, layer.dv), layer.heads, scale, shift, eps=1e-6)
        y = u * grouped.reshape(n, -1)
    else:
        y = u * F.layer_norm(attention, (layer.heads * layer.dv,), scale, shift, eps=1e-6)
    return torch.addmm(x, torch.cat([u, attention, y], dim=1) * keep, w["_output_weight"])


def nvidia(layer: Layer, w: Weights, x: Tensor, keep: Tensor, times: tuple[Tensor, Tensor]) -> Tensor:
    """NVIDIA recsys-examples, examples/hstu/modules/native_hstu_layer.py, HSTULayer; eps of configs/hstu_config.py."""
    n = len(x)
    input_norm = (w["_input_norm_weight"], w["_input_norm_bias"]) if "_input_norm_weight" in w else (None, None)
    mixed = F.silu(F.layer_norm(x, (WIDTH,), *input_norm, eps=1e-5) @ w["_uvqk_weight"] + w["_uvqk_beta"])
    u, v, q, k = mixed.split([layer.heads * layer.dv] * 4, dim=1)
    q, k, v = (split_heads(pad(t), layer.heads) for t in (q, k, v))
    weight = F.silu(q @ k.transpose(1, 2) * layer.dv**-0.5) / PADDED * torch.ones(PADDED, PADDED).tril()
    attention = (weight @ v).transpose(0, 1).reshape(PADDED, -1)[:n]
    normed = F.layer_norm(attention, attention.shape[1:], w["_output_norm_weight"], w["_output_norm_bias"], eps=1e-5)
    out = (u * normed * keep) @ w["_output_weight"]
    return out + x if layer.extra["residual"] else out


def softmax_ablation(layer: Layer, w: Weights, x: Tensor, keep: Tensor, times: tuple[Tensor, Tensor]) -> Tensor:
    """arXiv 2402.17152, tables 2 and 5, "HSTU (-rab, Softmax)": the research layer with softmax for SiLU.

    Not the research code's `softmax_rel_bias`: its softmax runs over the future and the padding and is masked behind.
    """
    u, v, q, k = F.silu(F.layer_norm(x, (WIDTH,), eps=1e-6) @ w["_uvqk"]).split([layer.heads * layer.dv] * 4, dim=1)
    q, k, v = (split_heads(t, layer.heads) for t in (q, k, v))
    scores = q @ k.transpose(1, 2) * layer.dv**-0.5
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    attention = (scores.masked_fill(future, -torch.inf).softmax(dim=2) @ v).transpose(0, 1).reshape(len(x), -1)
    out = u * F.layer_norm(attention, attention.shape[1:], eps=1e-6)
    return F.linear(out * keep, w["_o.weight"], w["_o.bias"]) + x


Reference = Callable[[Layer, Weights, Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]
RESEARCH: dict[str, Any] = {"position_bias": True, "num_time_buckets": NUM_BUCKETS}
PRODUCTION: dict[str, Any] = {
    "silu_on": "u",
    "scale": "inverse_sqrt_width",
    "position_bias": False,
    "input_norm_affine": True,
    "output_norm_affine": True,
    "concat": "u_and_attention",
    "uvqk_bias": True,
    "output_bias": False,
}
NVIDIA: dict[str, Any] = {
    "norm_eps": 1e-5,
    "scale": "inverse_sqrt_width",
    "position_bias": False,
    "output_norm_affine": True,
    "uvqk_bias": True,
    "output_bias": False,
}
SOFTMAX: dict[str, Any] = {"weighting": "softmax", "scale": "inverse_sqrt_width", "position_bias": False}

VARIANTS: dict[str, tuple[Reference, Layer, dict[str, Any]]] = {
    "research, public tables": (research, Layer(), RESEARCH),
    "research, one head (ML-1M)": (research, Layer(heads=1, dqk=4, dv=4), RESEARCH),
    "research, concat_ua": (research, Layer(concat=True), RESEARCH | {"concat": "u_and_norm"}),
    # enable_relative_attention_bias=False stops at an assertion of the source; without timestamps it has no bias either
    "research, no timestamps": (research, Layer(extra={"rab": False}), {"position_bias": False}),
    "research, linear_activation=none": (research, Layer(extra={"activation": "none"}), RESEARCH | {"silu_on": "none"}),
    "production": (production, Layer(concat=True), PRODUCTION),
    "production, use_group_norm": (
        production,
        Layer(concat=True, group_norm=True),
        PRODUCTION | {"output_norm": "per_head"},
    ),
    "NVIDIA": (nvidia, Layer(dqk=5, extra={"residual": True}), NVIDIA),
    "NVIDIA, learnable_input_layernorm": (
        nvidia,
        Layer(dqk=5, extra={"residual": True, "input_norm": True}),
        NVIDIA | {"input_norm_affine": True},
    ),
    "NVIDIA, residual=False": (nvidia, Layer(dqk=5, extra={"residual": False}), NVIDIA | {"residual": False}),
    "paper, -rab, softmax": (softmax_ablation, Layer(dqk=5, extra={"rab": False}), SOFTMAX),
}

# Another value for every switch: a block that has it where the source has not must be seen.
OTHER: dict[str, list[Any]] = {
    "silu_on": ["uvqk", "u", "none"],
    "weighting": ["silu", "softmax"],
    "scale": ["one", "inverse_sqrt_width"],
    "scaling_events": [float(PADDED), 2.0 * PADDED],
    "output_norm": ["all_heads", "per_head"],
    "norm_eps": [1e-6, 1e-5],
    "concat": ["u_and_norm", "u_and_attention"],
    "residual": [True, False],
}


def make_config(layer: Layer, changes: dict[str, Any]) -> HstuBlockConfig:
    sizes = {"num_heads": layer.heads, "qk_head_width": layer.dqk, "v_head_width": layer.dv}
    return HstuBlockConfig(**sizes, scaling_events=float(PADDED), **changes)


def make_weights(reference: Reference, layer: Layer) -> Weights:
    """Random weights by the names and in the shapes of the source."""
    inner, value = 2 * layer.heads * (layer.dqk + layer.dv), layer.heads * layer.dv
    gates = 3 * value if layer.concat else value
    if reference in (research, softmax_ablation):
        shapes = {"_uvqk": (WIDTH, inner), "_o.weight": (WIDTH, gates), "_o.bias": (WIDTH,)}
        if layer.extra.get("rab", True):
            shapes |= {"_rel_attn_bias._pos_w": (2 * PADDED - 1,), "_rel_attn_bias._ts_w": (NUM_BUCKETS + 1,)}
    else:
        norm = layer.heads if layer.group_norm else value
        shapes = {"_uvqk_weight": (WIDTH, inner), "_uvqk_beta": (inner,), "_output_weight": (gates, WIDTH)}
        shapes |= {"_output_norm_weight": (norm,), "_output_norm_bias": (norm,)}
        if reference is production or layer.extra.get("input_norm"):
            shapes |= {"_input_norm_weight": (WIDTH,), "_input_norm_bias": (WIDTH,)}
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).mul_(0.7).requires_grad_()
        for name, shape in shapes.items()
    }


@dataclass(frozen=True, kw_only=True)
class GivenMask(DropoutMask):
    given: Tensor

    def keep(self, width: int) -> Tensor:
        assert self.given.shape[1] == width
        return self.given


class Keep(nn.Module):
    """Dropout with a given mask."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.given = keep > 0

    def mask(self, randomness: Randomness | None, width: int) -> DropoutMask:
        token = torch.arange(len(self.given))
        return GivenMask(key=0, token=token, probability=0.3, num_channels=width, given=self.given)


def make_keep(layer: Layer) -> Tensor:
    """What dropout leaves of the output map's input, `[T, gates]`, in the source's order [gate, head, channel]."""
    width = layer.heads * layer.dv * (3 if layer.concat else 1)
    return torch.rand(NUM_TOKENS, width, generator=torch.Generator().manual_seed(5)).gt(0.3).double() / 0.7


def make_events() -> tuple[Tensor, Tokens]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(NUM_TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    time = torch.randint(0, 10**6, (NUM_TOKENS,), generator=generator)
    tokens = split_events(BOUNDS, time, time + 977, randomness=None, per_event=1)
    buckets = bucket_times(tokens.plan, tokens.timestamp, tokens.query_timestamp, num_buckets=NUM_BUCKETS)
    return x, replace(tokens, time_buckets=buckets)


def ours(config: HstuBlockConfig, converted: Weights, keep: Tensor, x: Tensor, tokens: Tokens) -> Tensor:
    block = HstuBlock(config, width=WIDTH, layer=0, max_tokens=PADDED, dropout=0.0, parts=local_parts()).double()
    by_gate = keep.view(NUM_TOKENS, -1, config.num_heads, config.v_head_width)
    block.dropout = Keep(by_gate.transpose(1, 2).flatten(1))  # type: ignore[assignment]
    assert set(converted) == {name for name, _ in block.named_parameters()}
    for name, parameter in block.named_parameters():
        assert parameter.shape == converted[name].shape, name
    return functional_call(block, converted, (x, tokens))[: sum(LENGTHS)]


def results(forward: Callable[[Tensor], Tensor], x: Tensor, weights: Weights) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out = forward(leaf)
    gradients = torch.autograd.grad((out * out.detach().sin()).sum(), [leaf, *weights.values()])
    return [out.detach(), *gradients]


def compare(name: str, *, by_head: bool = True, same_keep: bool = True, **changes: Any) -> None:
    """The block with `changes` against the source; `by_head` off: weights stay in the order of the source."""
    reference, layer, settings = VARIANTS[name]
    weights, keep, (x, tokens) = make_weights(reference, layer), make_keep(layer), make_events()
    config = replace(make_config(layer, settings), **changes)
    one_head = replace(config, num_heads=1, qk_head_width=layer.heads * layer.dqk, v_head_width=layer.heads * layer.dv)
    converted = block_from_published(weights, config if by_head else one_head)
    our_keep = keep if same_keep else keep.flip(1)

    def published(x: Tensor) -> Tensor:
        spans = pairwise(BOUNDS.tolist())
        users = [slice(first, last) for first, last in spans]
        happened, asked = tokens.timestamp, tokens.query_timestamp
        return torch.cat([reference(layer, weights, x[u], keep[u], (happened[u], asked[u])) for u in users])

    found = results(lambda x: ours(config, converted, our_keep, x, tokens), x, weights)
    for mine, theirs in zip(found, results(published, x, weights), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_block_equals_its_source_forward_and_all_gradients(name: str) -> None:
    assert VARIANTS[name][0].__doc__  # says which file of which repository it was written from
    compare(name)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_other_value_of_a_switch_is_seen(name: str) -> None:
    _, layer, settings = VARIANTS[name]
    config = make_config(layer, settings)
    tried = 0
    for switch, values in OTHER.items():
        same = getattr(config, switch)
        for other in values:
            if other == same or (switch == "concat" and config.concat == "none"):
                continue
            if switch == "output_norm" and (layer.heads == 1 or config.output_norm_affine):
                continue  # one head is all heads; with scales the shapes tell
            if config.weighting == "softmax" and switch == "scaling_events":
                continue
            try:
                with pytest.raises(AssertionError):
                    compare(name, **{switch: other})
            except UserError:  # the settings do not go together
                continue
            tried += 1
    assert tried >= 3


@pytest.mark.parametrize("name", [name for name, (_, layer, _) in VARIANTS.items() if layer.heads > 1])
def test_weights_in_the_order_of_the_source_are_seen(name: str) -> None:
    with pytest.raises(AssertionError):
        compare(name, by_head=False)


@pytest.mark.parametrize("name", VARIANTS)
def test_dropout_of_other_channels_is_seen(name: str) -> None:
    with pytest.raises(AssertionError):
        compare(name, same_keep=False)


def test_a_layer_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="_relative"):
        block_from_published({"_relative": torch.zeros(3)}, HstuBlockConfig())


def test_softmax_weights_take_no_bias() -> None:
    with pytest.raises(UserError, match="weighting"):
        HstuBlockConfig(weighting="softmax")
