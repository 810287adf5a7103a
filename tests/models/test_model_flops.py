from dataclasses import replace
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import yaml
from test_model_twins import CASES, make_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megarec.base.config import build
from megarec.layers.config import HeadsConfig, HstuBlockConfig
from megarec.models.argus.config import ArgusConfig
from megarec.models.flops import count_pairs
from megarec.models.hstu.config import HstuConfig
from megarec.models.hstu.flops import block_flops
from megarec.models.registry import pack_flops
from megarec.parallel.parts import Attention
from tests.models.small_log import SmallLog, lay_out, make_lookup, make_table, shape_for


def takes_v(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands for attention."""
    return v


def all_flops(config: Any, *args: Any, **settings: Any) -> int:
    return pack_flops(config, *args, **settings).total(config.num_layers)


def test_argus_by_hand() -> None:
    config = ArgusConfig(
        width=8,
        table_width=4,
        num_layers=3,
        heads=HeadsConfig(query_width=5, hidden_width=6),
        feedback_heads=("ratio",),
    )
    shape = shape_for(config)
    # histories of 2 and 3 events: 5 tokens; 3 + 6 pairs
    block = 5 * 8 * (3 * 8 + 8 + 32 + 32) + 9 * (8 + 8)
    input_map = 5 * 4 * 8
    query = 5 * ((8 + 4) * 6 + 6 * 5)
    items, scores = 7 * 4 * 5, 35 * 5
    feedback = 5 * ((8 + 4 + 4) * 6 + 6 * 5)
    expected = 6 * (3 * block + input_map + query + items + scores + feedback)
    assert all_flops(config, shape, np.array([0, 2, 2, 5]), num_item_vectors=7, num_scores=35) == expected


def test_hstu_by_hand() -> None:
    config = HstuConfig(
        width=8,
        table_width=8,
        num_layers=2,
        token_layout="item_action",
        block=HstuBlockConfig(num_heads=2, qk_head_width=3, v_head_width=4, concat="u_and_norm"),
        heads=HeadsConfig(query_context=False, query_width=8, item_tower="none"),
        feedback_heads=(),
    )
    # histories of 2 and 3 events are 4 and 6 tokens; 10 + 21 pairs
    block = 10 * 8 * (2 * 2 * (3 + 4)) + 10 * (3 * 2 * 4) * 8 + 31 * 2 * (3 + 4)
    expected = 6 * (2 * block + 11 * 8)
    assert all_flops(config, shape_for(config), np.array([0, 2, 5]), num_item_vectors=9, num_scores=11) == expected


def test_pairs_of_candidates_by_hand() -> None:
    """Two events and two candidates of two tokens: 10 pairs in the history, each candidate has 2 * 4 + 3."""
    assert count_pairs(np.array([8, 3]), np.array([2, 1]), per_event=2) == (10 + 2 * 11) + (1 + 2 + 3)
    assert count_pairs(np.array([4, 0]), np.array([0, 0]), per_event=3) == 10


def test_mlperf_ranker_is_its_published_count() -> None:
    """MLPerf "dlrmv4" counts 315.7 GFLOP a sample of 4,096 tokens: 77.3 (UVQK) + 58.0 (out) + 180.4 (attention).

    It counts attention 3.5 times where we count 3 (the recomputed scores), and S^2 / 2 pairs where we count
    S (S + 1) / 2. It counts whole windows, of which .508 is filled on average; we count what is there.
    """
    preset = files("megarec.conf").joinpath("model", "hstu", "mlperf.yaml").read_text()
    config = build(HstuConfig, yaml.safe_load(preset))

    def published(tokens: int) -> list[int]:
        """UVQK `L 3 2 S D N (2 Hqk + 2 Hv)`, out `L 3 2 S (3 N Hv) D`, attention `L 3.5 2 S^2/2 N (Hqk + Hv)`."""
        return [3 * 3 * 2 * tokens * 512 * 2048, 3 * 3 * 2 * tokens * 1536 * 512, 21 * tokens**2 // 2 * 4 * 256]

    assert [round(part / 1e9, 1) for part in published(4096)] == [77.3, 58.0, 180.4]
    assert round(sum(published(4096)) / 1e9, 1) == 315.7
    for tokens in (4096, round(0.508 * 4096)):
        uvqk, out, attention = published(tokens)
        ours = config.num_layers * block_flops(config, num_tokens=tokens, num_pairs=tokens * (tokens + 1) // 2)
        assert ours == pytest.approx(uvqk + out + attention * (3 / 3.5) * (tokens + 1) / tokens, rel=1e-7)


@pytest.mark.parametrize(
    "name",
    [
        "argus",
        "hstu",
        "argus_item_mlp",
        "hstu_item_action",
        "hstu_u_and_norm",
        "hstu_one_head",
        "hstu_prefix",
        "hstu_product",
        "hstu_product_item_action",
    ],
)
def test_linear_maps_are_those_that_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, log = CASES[name], SmallLog()
    shape = shape_for(config)
    model, lookup = make_model(config, shape), make_lookup(make_table(shape, config))
    for block in model.blocks.values():
        of_both = isinstance(block.attention, Attention)
        monkeypatch.setattr(
            block, "attention", replace(block.attention, hstu=takes_v, softmax=takes_v) if of_both else takes_v
        )
    events = lay_out(log, shape, config, dead=0).events
    with FlopCounterMode(display=False) as counter:
        states = model.encode(events, lookup)
        query = model.next_item_query(states, events, lookup)
        model.feedback_logits(states, events, lookup)
        tower = events.item_rows if shape.item == shape.item_tower else events.item_rows[:, :1]
        _ = query @ model.item_vectors(tower, lookup).T
    num_events = len(events.position)
    total = all_flops(config, shape, events.cu_seqlens.numpy(), num_item_vectors=num_events, num_scores=num_events**2)
    lengths = np.diff(events.cu_seqlens.numpy()) * config.tokens_per_event + len(config.prefix_fields)
    pairs = [n * (n + 1) // 2 for n in lengths]
    channels = 24 if config.name == "argus" else 2 * (3 + 5)
    attention = 6 * config.num_layers * sum(pairs) * channels
    assert total - attention == 3 * counter.get_total_flops()
