"""A prefix stands before every history, is seen by all of it, and sees none of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megarec.base.errors import UserError
from megarec.data.packs import PackRule
from megarec.data.pools import fill_pool
from megarec.data.stream import StreamConfig
from megarec.layers.tokens import place_prefixes
from megarec.models.choice import ModelConfig
from tests.data.test_pools import windows_of_lengths
from tests.models.small_log import SmallLog, lay_out, make_lookup, make_table, randomness, shape_for
from tests.models.test_model_twins import ARGUS, HSTU, make_model

PREFIXED = {"argus": replace(ARGUS, prefix_fields=("device",)), "hstu": replace(HSTU, prefix_fields=("device",))}


def test_tokens_stand_where_stated() -> None:
    """Histories of two events and one, two tokens an event, a prefix of three, and a dead tail of two events."""
    places = place_prefixes(torch.tensor([0, 2, 3]), per_event=2, num_prefix=3, num_events=5)
    assert places.cu_seqlens.tolist() == [0, 7, 12]
    assert places.prefix.tolist() == [0, 1, 2, 7, 8, 9]
    assert places.event.tolist() == [3, 4, 5, 6, 10, 11]
    assert places.num_tokens == 12  # the tail of four tokens has room for four of six
    rows = torch.arange(10.0).view(10, 1)
    merged = places.merge(-torch.ones(6, 1), rows)
    assert merged.flatten().tolist() == [-1, -1, -1, 0, 1, 2, 3, -1, -1, -1, 4, 5]
    assert places.events_of(merged).flatten().tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0, 0]


@pytest.mark.parametrize("config", PREFIXED.values(), ids=list(PREFIXED))
def test_the_history_sees_its_prefix_and_nothing_later(config: ModelConfig) -> None:
    log, shape = SmallLog(), shape_for(config)
    model, lookup = make_model(config, shape), make_lookup(make_table(shape, config))
    events = lay_out(log, shape, config).events
    states = model.encode(events, lookup)
    changed = events.prefix_rows.clone()
    first = int(events.cu_seqlens[2])  # the history of nine events
    changed[first] = shape.tables["item"] - 1
    moved = (model.encode(replace(events, prefix_rows=changed), lookup) != states).any(dim=1).nonzero().flatten()
    assert moved.tolist() == list(range(first, int(events.cu_seqlens[3])))
    changed = events.prefix_rows.clone()
    changed[first + 1 : int(events.cu_seqlens[3])] = 0  # only that of the first event counts
    assert torch.equal(model.encode(replace(events, prefix_rows=changed), lookup), states)
    for event in range(first, int(events.cu_seqlens[3])):
        later = events.item_rows.clone()
        later[event] = (later[event] + 1) % 5
        moved = (model.encode(replace(events, item_rows=later), lookup) != states).any(dim=1).nonzero().flatten()
        assert moved.min() == event and moved.max() < int(events.cu_seqlens[3])


def test_dropout_falls_on_every_token_by_its_number() -> None:
    config = replace(PREFIXED["hstu"], dropout=0.3)
    shape = shape_for(config)
    model, lookup = make_model(config, shape), make_lookup(make_table(shape, config))
    events = lay_out(SmallLog(), shape, config).events
    one, again, other = (
        model.encode(replace(events, randomness=randomness(len(events.position), key)), lookup) for key in (7, 7, 8)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("per_event", "num_prefix", "room"), [(1, 2, 2), (2, 1, 1), (3, 4, 2)])
def test_packs_leave_room_for_prefixes(per_event: int, num_prefix: int, room: int) -> None:
    config = StreamConfig(
        tokens_per_pack=100 * per_event, tokens_per_event=per_event, prefix_tokens=num_prefix, max_history_events=40
    )
    rule: PackRule = config.pack_rule
    assert rule.prefix_events == room
    lengths = np.random.default_rng(0).integers(1, 40, 200)
    pool = fill_pool([windows_of_lengths(lengths, block=0)], carried=None, rule=rule, key=3)
    for pack in pool.packs:
        tokens = pool.windows.num_targets[pack].sum() * per_event + len(pack) * num_prefix
        assert 0.8 * config.tokens_per_pack < tokens <= config.tokens_per_pack
    with pytest.raises(UserError, match="for the prefix"):
        StreamConfig(tokens_per_pack=64, max_history_events=63, prefix_tokens=2)


def test_a_field_that_stands_there_twice_is_refused() -> None:
    with pytest.raises(UserError, match="prefix_fields: a field stands there twice"):
        replace(ARGUS, prefix_fields=("device", "device"))


@pytest.mark.parametrize("field", ["item", "like", "devise"])
def test_a_field_that_cannot_stand_there_is_refused(field: str) -> None:
    with pytest.raises(UserError, match=r"model.prefix_fields: .*Allowed: device, organic|Did you mean 'device'"):
        shape_for(replace(ARGUS, prefix_fields=(field,)))
