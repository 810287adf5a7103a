"""What each prediction may depend on, and that it does: change one value of one event and see what moves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_model_twins import ARGUS, HSTU, make_model
from torch import Tensor

from megarec.models.choice import ModelConfig
from megarec.models.model import RecModel
from megarec.models.shape import InputShape
from tests.models.small_log import FIELDS, SmallLog, lay_out, make_lookup, make_table, shape_for

LAYOUTS = ("fused", "item_action", "context_item_feedback")
CASES: dict[str, ModelConfig] = {
    f"{name}_{layout}": replace(config, token_layout=layout)
    for name, config in (("argus", ARGUS), ("argus_gap", replace(ARGUS, time_gap_buckets=20)), ("hstu", HSTU))
    for layout in LAYOUTS
}
USER = 2  # of 9 events


def predict(model: RecModel, log: SmallLog, shape: InputShape, table: Tensor) -> dict[str, Tensor]:
    """Queries and logits of every event that has a next one."""
    laid, lookup = lay_out(log, shape, model.config), make_lookup(table)
    rows = [row for row, _, _ in laid.asked]
    states = model.encode(laid.events, lookup)
    logits = model.feedback_logits(states, laid.events, lookup)
    query = model.next_item_query(states, laid.events, lookup)
    return {"query": query[rows], **{name: value[rows] for name, value in logits.items()}}


def moved(before: Tensor, after: Tensor, asked: list[tuple[int, int, int]]) -> set[tuple[int, int]]:
    """The (user, event) rows that differ; nothing may differ a little."""
    difference = (before - after).abs().amax(dim=1)
    assert bool(((difference == 0) | (difference > 1e-9)).all())
    return {(user, event) for (_, user, event), d in zip(asked, difference, strict=True) if d > 0}


def change(log: SmallLog, name: str, event: int) -> None:
    """Another value, or a time shifted by an amount that moves every bucket."""
    if name == "time":
        log.time[USER][event] += 40_000_000
        return
    column = log.columns[name][USER]
    if column.ndim == 2:
        column[event, 0] = (column[event, 0] + 1) % FIELDS[name].num_ids
    else:
        column[event] = (column[event] + 1) % FIELDS[name].num_ids


def first_row_that_may_move(name: str, output: str, event: int) -> int:
    """The earliest t whose prediction of event t + 1 knows the value of `name` at `event`.

    Context and time of event t + 1 are known to both; its item to the feedback heads; its feedback to nobody.
    """
    role = "context" if name == "time" else FIELDS[name].role
    known_before = role == "context" or (role in ("item", "item_side") and output != "query")
    return event - 1 if known_before else event


@pytest.mark.parametrize("case", CASES)
def test_predictions_know_the_past_and_nothing_else(case: str) -> None:
    config = CASES[case]
    shape = shape_for(config)
    model, table = make_model(config, shape), make_table(shape, config)
    length = SmallLog().lengths[USER]
    asked = lay_out(SmallLog(), shape, config).asked
    with torch.no_grad():
        before = predict(model, SmallLog(), shape, table)
        for name in (*FIELDS, "time"):
            sees_it = name != "time" or config.time_gap_buckets or config.name == "hstu"
            for event in range(length):
                log = SmallLog()
                change(log, name, event)
                after = predict(model, log, shape, table)
                for output, value in before.items():
                    first = max(first_row_that_may_move(name, output, event), 0)
                    expected = {(USER, t) for t in range(first, length - 1)} if sees_it else set()
                    assert moved(value, after[output], asked) == expected, (name, event, output)


@pytest.mark.parametrize("case", CASES)
def test_dead_tail_never_leaks(case: str) -> None:
    config, log = CASES[case], SmallLog()
    shape = shape_for(config)
    model, table = make_model(config, shape), make_table(shape, config)
    results = []
    for dead, garbage in ((0, -1), (5, -1), (5, 3)):
        laid = lay_out(log, shape, config, dead=dead, garbage=garbage)
        rows = [row for row, _, _ in laid.asked]
        leaf = table.detach().clone().requires_grad_()
        lookup = make_lookup(leaf)
        states = model.encode(laid.events, lookup)
        logits = model.feedback_logits(states, laid.events, lookup)
        outputs = [model.next_item_query(states, laid.events, lookup)[rows], *(v[rows] for v in logits.values())]
        sum(value.square().sum() + value.sum() for value in outputs).backward()
        results.append([*outputs, leaf.grad])
    for other in results[1:]:
        for value, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_last_event_reads_no_other_user(layout: str) -> None:
    config = replace(ARGUS, token_layout=layout)
    shape = shape_for(config)
    model, table = make_model(config, shape), make_table(shape, config)
    log, changed = SmallLog(), SmallLog()
    for name, column in changed.columns.items():
        column[2] = (column[2] + 1) % FIELDS[name].num_ids
    last = log.lengths[0] - 1
    logits = []
    for each in (log, changed):
        events, lookup = lay_out(each, shape, config).events, make_lookup(table)
        states = model.encode(events, lookup)
        logits.append(model.feedback_logits(states, events, lookup)["ratio"][: last + 1 + log.lengths[1]])
    assert torch.equal(*logits)


def test_the_order_of_users_does_not_matter() -> None:
    for config in (ARGUS, HSTU):
        shape = shape_for(config)
        model, table = make_model(config, shape), make_table(shape, config)
        log, reversed_log = SmallLog(), SmallLog()
        reversed_log.lengths = log.lengths[::-1]
        reversed_log.time.reverse()
        for column in reversed_log.columns.values():
            column.reverse()
        forward, backward = predict(model, log, shape, table), predict(model, reversed_log, shape, table)
        counts = [max(n - 1, 0) for n in reversed_log.lengths]
        pieces = torch.split(backward["query"], counts)
        torch.testing.assert_close(torch.cat(pieces[::-1]), forward["query"], rtol=1e-12, atol=1e-13)
        assert np.sum(counts) == len(forward["query"])


def test_a_planted_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CASES["argus_item_action"]
    shape = shape_for(config)
    model, table = make_model(config, shape), make_table(shape, config)
    asked = lay_out(SmallLog(), shape, config).asked
    monkeypatch.setattr("megarec.models.model.token_of_event", lambda states, k, _: states.view(-1, k, 12)[:, k - 1])
    log = SmallLog()
    change(log, "like", 4)
    with torch.no_grad():
        before, after = (predict(model, each, shape, table)["like"] for each in (SmallLog(), log))
    assert (USER, 3) in moved(before, after, asked)
