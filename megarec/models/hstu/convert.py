"""Weights of HSTU blocks that the published code trained, by the names of ours."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megarec.base.errors import UserError
from megarec.layers.config import HstuBlockConfig


def block_from_published(weights: Mapping[str, Tensor], config: HstuBlockConfig) -> dict[str, Tensor]:
    """The weights of one block by our names; differentiable.

    The published code lays the channels of the first map out as [(U, V, Q, K), head, channel] and those that the output
    map reads as [gate, head, channel]; ours come head by head, so that a tensor-parallel shard is a slice. A published
    position bias has an entry for every j - i, the future included, which nobody reads.

    Args:
        weights: of one layer, by the names of the research code (`_uvqk`, `_o.weight`, `_o.bias`,
            `_rel_attn_bias._pos_w`, `_rel_attn_bias._ts_w`) or of the production code (`_uvqk_weight`, `_uvqk_beta`,
            `_input_norm_weight`, `_input_norm_bias`, `_output_weight`, `_output_norm_weight`, `_output_norm_bias`).
        config: the settings of the block.

    Raises:
        UserError: `weights` holds something else.
    """
    num_gates = 1 if config.concat == "none" else 3
    rows = _by_head(config.num_heads, [config.v_head_width] * 2 + [config.qk_head_width] * 2)
    columns = _by_head(config.num_heads, [config.v_head_width] * num_gates)
    converted = {}
    for name, value in weights.items():
        if name in ("_uvqk", "_uvqk_weight"):
            converted["uvqk.weight"] = value.T[rows]
        elif name == "_uvqk_beta":
            converted["uvqk.bias"] = value[rows]
        elif name == "_o.weight":
            converted["out.weight"] = value[:, columns]
        elif name == "_output_weight":
            converted["out.weight"] = value.T[:, columns]
        elif name == "_rel_attn_bias._pos_w":
            converted["position_bias"] = value[: (len(value) + 1) // 2].flip(0)
        elif name in _SAME:
            converted[_SAME[name]] = value
        else:
            raise UserError(
                f"'{name}' is no weight of a published layer", fix="Name the weights as the public code does"
            )
    return converted


_SAME = {
    "_o.bias": "out.bias",
    "_rel_attn_bias._ts_w": "time_bias",
    "_input_norm_weight": "norm.scale",
    "_input_norm_bias": "norm.shift",
    "_output_norm_weight": "output_norm.scale",
    "_output_norm_bias": "output_norm.shift",
}


def _by_head(num_heads: int, widths: list[int]) -> Tensor:
    """Where the channels [head, group, channel] lie among [group, head, channel], for groups of `widths`."""
    starts = torch.tensor([0, *widths]).cumsum(0) * num_heads
    places = [
        starts[group] + head * width + torch.arange(width)
        for head in range(num_heads)
        for group, width in enumerate(widths)
    ]
    return torch.cat(places)
