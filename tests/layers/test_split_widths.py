"""The widths by which a run is checked are those of the maps that its blocks are made of."""

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from megarec.layers.config import HstuBlockConfig, SasrecBlockConfig, TransformerBlockConfig
from megarec.layers.hstu_block import HstuBlock
from megarec.layers.sasrec_block import SasrecBlock
from megarec.layers.transformer_block import TransformerBlock
from megarec.parallel.parts import Linear, local_parts

WIDTH = 24


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (HstuBlock, HstuBlockConfig(num_heads=2, qk_head_width=5, v_head_width=7)),
        (HstuBlock, HstuBlockConfig(num_heads=2, qk_head_width=5, v_head_width=7, concat="u_and_norm")),
        (SasrecBlock, SasrecBlockConfig(num_heads=2, feed_forward_width=52)),
        (TransformerBlock, TransformerBlockConfig(num_heads=2, feed_forward_multiple=3)),
    ],
)
def test_every_split_side_is_a_multiple_of_a_named_width(make: Any, config: Any) -> None:
    split, whole = set(), set()

    def column(in_width: int, out_width: int, **settings: Any) -> nn.Module:
        split.add(out_width), whole.add(in_width)
        return Linear(in_width, out_width, **settings)

    def row(in_width: int, out_width: int, **settings: Any) -> nn.Module:
        split.add(in_width), whole.add(out_width)
        return Linear(in_width, out_width, **settings)

    parts = replace(local_parts(), column_linear=column, row_linear=row)
    more = {"num_layers": 1} if make is TransformerBlock else {"max_tokens": 8}
    make(config, width=WIDTH, layer=0, dropout=0.0, parts=parts, **more)
    named = set(config.split_widths(WIDTH).values())
    assert whole == {WIDTH}
    assert named <= split
    assert {width for width in split if not any(width % one == 0 for one in named)} == set()
