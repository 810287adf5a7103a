"""One HSTU layer as models have it, beside one layer of an SDPA transformer."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megarec_kernels import dropout, gated_norm, layer_norm, silu
from megarec_kernels.hstu_attention import hstu_attention
from megarec_kernels.tiles import TilePlan, plan_tiles
from torch import Tensor, nn
from torch.func import functional_call

from kernels.bench.attention import attention_work, cu_seqlens_of, prepare_padding
from kernels.bench.cases import Case, Draw, Inputs, Method, Work
from kernels.bench.compiled import compiled
from kernels.bench.ops import hstu_attention as hstu
from kernels.bench.ops import softmax_attention as softmax
from megarec.layers.config import HstuBlockConfig, TransformerBlockConfig
from megarec.layers.hstu_block import HstuBlock
from megarec.layers.tokens import Tokens
from megarec.layers.transformer_block import TransformerBlock
from megarec.parallel.parts import Attention, Linear, Parts, plan_all_tokens

Attend = Callable[..., Tensor]
Plan = Callable[[Inputs], Any]
HEAD_WIDTH_OF_TRANSFORMER = 128  # the flash kernels are fastest there


def cases() -> Iterator[Case]:
    """NVIDIA's layer at its lengths, and the comparison of the paper at 8,192 tokens a user.

    With stochastic length 1.6 a history of n events is read as `n^0.8` of them, unless chance, `n^-0.4`, says whole
    (arXiv 2402.17152, section 3.3): of 32 users of 8,192 one is whole, a little more than the 0.87 expected.
    """
    yield _hstu_layer("b2 n16 width32", {"small"}, [16, 16], width=32, heads=2, beside=[16, 16])
    for length in (1024, 2048, 4096, 8192):
        yield _hstu_layer(f"b32 n{length} width1024", {"h200"}, [length] * 32, width=1024, heads=4)
    whole, read = 8192, round(8192**0.8)
    yield _hstu_layer(
        "b16 n8192 width1024 beside a transformer", {"h200"}, [whole] * 16, width=1024, heads=4, beside=[whole] * 16
    )
    yield _hstu_layer(
        "b32 n8192 width1024 stochastic length 1.6 beside a transformer", {"h200"}, [whole] + [read] * 31, width=1024,
        heads=4, beside=[whole] * 32,
    )  # fmt: skip


def _hstu_layer(
    name: str, sets: set[str], lengths: list[int], *, width: int, heads: int, beside: list[int] | None = None
) -> Case:
    config = HstuBlockConfig(
        num_heads=heads, qk_head_width=width // heads, v_head_width=width // heads, scale="inverse_sqrt_width",
        scaling_events=float(max(lengths)), position_bias=False, input_norm_affine=True, output_norm_affine=True,
    )  # fmt: skip

    def layer(attend: Attend, plan: Plan) -> _Layer:
        def make(parts: Parts) -> nn.Module:
            return HstuBlock(config, width=width, layer=0, max_tokens=1, dropout=0.0, parts=parts)

        return _Layer(make, Attention(plan=plan_all_tokens, hstu=attend), plan)

    ours = layer(hstu_attention, _plan)
    eager = layer(_from_inputs(hstu.attend_padded), prepare_padding)
    truth = layer(_from_inputs(hstu.attend_by_history), prepare_padding)
    return Case(
        name=name,
        sets=frozenset(sets),
        make_inputs=_make_inputs(ours, lengths, width),
        truth=_without_kernels(truth),
        ours={"ours": ours},
        baselines={
            "eager padded": _without_kernels(eager),
            "torch.compile padded": _without_kernels(compiled(eager, prepare_padding)),
        },
        gradients=("x", *ours.shapes),
        work=_work(ours, width),
        beside={} if beside is None else {"SDPA transformer layer": _transformer_layer(beside, width=width)},
    )


def _transformer_layer(lengths: list[int], *, width: int) -> Case:
    config = TransformerBlockConfig(num_heads=max(1, width // HEAD_WIDTH_OF_TRANSFORMER))

    def layer(attend: Attend, plan: Plan) -> _Layer:
        def make(parts: Parts) -> nn.Module:
            return TransformerBlock(config, width=width, layer=0, num_layers=1, dropout=0.0, parts=parts)

        return _Layer(make, Attention(plan=plan_all_tokens, softmax=attend), plan)

    def attend_equal(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, scale: float, **_: Any) -> Tensor:
        batch = (x.unflatten(0, (len(cu_seqlens) - 1, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*batch, is_causal=True, scale=scale).transpose(1, 2).flatten(0, 1)

    theirs = layer(attend_equal, lambda inputs: inputs)
    return Case(
        name="SDPA transformer layer",
        sets=frozenset(),
        make_inputs=_make_inputs(theirs, lengths, width),
        truth=_without_kernels(layer(_from_inputs(softmax.attend_by_history), prepare_padding)),
        ours={"SDPA transformer layer": _without_kernels(theirs)},
        gradients=("x", *theirs.shapes),
        work=_work(theirs, width),
    )


class _Layer:
    """A block as a method: its weights are inputs, by their names.

    Args:
        make: the block with these parts.
        attention: how its tokens attend.
        plan: what is handed to the attention as plan, from the inputs.
    """

    def __init__(self, make: Callable[[Parts], nn.Module], attention: Attention, plan: Plan) -> None:
        with torch.device("meta"):
            self.block = make(Parts(linear=Linear, column_linear=Linear, row_linear=Linear, attention=attention))
        self.shapes = {name: weight.shape for name, weight in self.block.named_parameters()}
        self.plan = plan

    def __call__(self, inputs: Inputs) -> Tensor:
        tokens = Tokens(
            cu_seqlens=inputs["cu_seqlens"], timestamp=inputs["cu_seqlens"], query_timestamp=inputs["cu_seqlens"],
            randomness=None, inner_randomness=None, outer_randomness=None, plan=self.plan(inputs),
        )  # fmt: skip
        return functional_call(self.block, {name: inputs[name] for name in self.shapes}, (inputs["x"], tokens))


def _without_kernels(method: Method) -> Method:
    """The method with the plain torch of the ops of a block, whatever the device."""

    def plain(inputs: Inputs) -> Any:
        with ExitStack() as stack:
            for op in (dropout, gated_norm, layer_norm, silu):
                stack.enter_context(mock.patch.object(op, "has_kernel", lambda *_: False))
            return method(inputs)

    return plain


def _plan(inputs: Inputs) -> TilePlan:
    return inputs.get("plan") or inputs.setdefault("plan", plan_tiles(inputs["cu_seqlens"]))


def _from_inputs(method: Method) -> Attend:
    """A method on inputs as attention of a block, which hands it the inputs of the layer as plan."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, _: Tensor, *, plan: Inputs, scale: float, divisor: float = 1.0, **__: Any
    ) -> Any:
        biases = dict.fromkeys(("position_bias", "time_bias", "timestamp", "query_timestamp"))
        return method(plan | biases | {"q": q, "k": k, "v": v, "scale": scale, "divisor": divisor})

    return attend


def _make_inputs(layer: _Layer, lengths: list[int], width: int) -> Callable[[Draw], Inputs]:
    def make_inputs(draw: Draw) -> Inputs:
        weights = {name: draw.normal(*shape, scale=0.02) for name, shape in layer.shapes.items()}
        for name in weights:
            if name.endswith("norm.scale"):
                weights[name] += 1
        inputs: Inputs = {"x": draw.normal(sum(lengths), width)}
        return inputs | weights | {"cu_seqlens": cu_seqlens_of(lengths, draw.device), "max_length": max(lengths)}

    return make_inputs


def _work(layer: _Layer, width: int) -> Callable[[Inputs], tuple[Work, Work]]:
    """Two operations for each token and number of a linear map, twice that backward, and the attention's.

    `x`, its gradient, the result and the weights are read or written once: what a layer in one kernel would move.
    """

    def work(inputs: Inputs) -> tuple[Work, Work]:
        x = inputs["x"]
        in_maps = sum(shape.numel() for shape in layer.shapes.values() if len(shape) == 2)
        heads = x.unsqueeze(1)  # channels of all heads together: the work is the same
        attention_forward, attention_backward = attention_work(heads, heads, inputs["cu_seqlens"])
        maps, moved = 2.0 * len(x) * in_maps, 2.0 * x.nbytes + in_maps * x.element_size()
        return (
            Work(flops=maps + attention_forward.flops, bytes=moved),
            Work(flops=2 * maps + attention_backward.flops, bytes=1.5 * moved),
        )

    return work
