"""The plan covers every token once and wastes little."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megarec_kernels.tiles import MAX_PAIRS, MAX_WASTED_PAIRS, ROWS_PER_BLOCK, plan_tiles

LENGTHS = st.lists(st.integers(0, 700), max_size=60)


@settings(max_examples=60, deadline=None)
@given(LENGTHS)
def test_every_live_token_is_in_one_real_row(lengths: list[int]) -> None:
    plan = plan_tiles(torch.tensor([0, *lengths]).cumsum(0))
    real = [tile.token[tile.real] for tile in plan.tiles]
    found = torch.cat([torch.empty(0, dtype=torch.int64), *real]).sort()[0]
    assert torch.equal(found, torch.arange(sum(lengths)))
    assert plan.max_length == max(lengths, default=0)


@settings(max_examples=60, deadline=None)
@given(LENGTHS)
def test_tiles_are_small_and_padding_is_bounded(lengths: list[int]) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    user = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    for tile in plan_tiles(bounds).tiles:
        real_lengths = torch.bincount(user[tile.token[tile.real]])
        padded_pairs = tile.num_users * tile.length**2
        assert padded_pairs - int((real_lengths**2).sum()) <= MAX_WASTED_PAIRS
        assert tile.num_users == 1 or tile.num_users * tile.length * min(tile.length, ROWS_PER_BLOCK) <= MAX_PAIRS
        assert len(tile.real) + len(tile.padding) == tile.num_users * tile.length
        own = user[tile.token].view(tile.num_users, tile.length)
        assert bool((own == own[:, :1]).all())


def test_blocks_of_rows_cover_a_history_once() -> None:
    (tile,) = plan_tiles(torch.tensor([0, 300])).tiles
    assert list(tile.row_blocks()) == [(0, 128, 128), (128, 256, 256), (256, 300, 300)]
