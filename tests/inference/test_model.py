"""The local model against a twin that builds each user's events by hand, for every model and token layout."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from megarec.base.errors import UserError
from megarec.data.dataset import Dataset
from megarec.data.evaluation import evaluation_batches
from megarec.inference.evaluate import ask
from megarec.inference.histories import Histories, Targets
from megarec.inference.model import LocalModel, Weights
from megarec.metrics.protocol import Protocol
from megarec.models.choice import ModelConfig
from megarec.models.inputs import Events
from megarec.models.registry import build_model
from megarec.models.shape import FieldSlots, input_shape
from megarec.parallel.parts import local_parts
from tests.inference.synthetic import CONFIGS, FIELDS, MAX_EVENTS, make_model, random_weights, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_world(tmp_path_factory.mktemp("world") / "data", num_targets=3)


def questions(world: Dataset) -> tuple[Histories, Targets]:
    batch = next(iter(evaluation_batches(world, max_history_events=MAX_EVENTS, users_per_batch=8)))
    users = np.flatnonzero(np.diff(batch.cu_seqlens))
    return ask(batch, Protocol(max_history_events=MAX_EVENTS), users, context=["device"])


class Twin:
    """One user at a time, one field at a time, rows in Python lists."""

    def __init__(self, config: ModelConfig, side: dict[str, np.ndarray]) -> None:
        self.config, self.side, self.weights = config, side, random_weights(config)
        self.shape = input_shape(FIELDS, config)
        self.model = build_model(config, self.shape, local_parts()).double()
        self.model.load_state_dict(dict(self.weights.dense), strict=False)
        self.first, self.table = {}, torch.cat(list(self.weights.tables.values()))
        for name, table in self.weights.tables.items():
            self.first[name] = sum(len(t) for t in list(self.weights.tables.values())[: len(self.first)])
            assert torch.equal(self.table[self.first[name] : self.first[name] + len(table)], table)

    def lookup(self, rows: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([self.table, torch.zeros(1, self.table.shape[1], dtype=self.table.dtype)])
        return padded[rows].sum(-2)  # row -1 is the zeros at the end

    def rows(self, slots: tuple[FieldSlots, ...], event: dict[str, object], gap: int) -> list[int]:
        out: list[int] = []
        for field in slots:
            if field.name == "time_gap":
                ids = [0 if gap < 0 else min(max(gap, 1).bit_length(), field.num_ids - 1)]
            elif field.name in self.side:
                ids = (
                    np.atleast_1d(self.side[field.name][event["item"]]).tolist()
                    if event["item"] >= 0
                    else [-1] * field.slots
                )  # type: ignore[operator, index]
            else:
                ids = np.atleast_1d(event[field.name]).tolist()
            out += [-1 if i < 0 else self.first[field.name] + i for i in ids]
        return out

    def events(self, history: list[dict[str, object]], asked: dict[str, object]) -> Events:
        """`asked` is the next event: its item is -1 when only the question is known."""
        time = [int(e["timestamp"]) for e in [*history, asked]]  # type: ignore[call-overload]
        gaps = [-1, *(b - a for a, b in itertools.pairwise(time))]
        both = [*history, asked]
        shape, size = self.shape, len(history)

        def table(slots: tuple[FieldSlots, ...], shift: int) -> torch.Tensor:
            rows = [self.rows(slots, both[i + shift], gaps[i + shift]) for i in range(size)]
            return torch.tensor(rows, dtype=torch.int64).view(size, -1)

        return Events(
            cu_seqlens=torch.tensor([0, size]),
            position=torch.arange(size),
            timestamp=torch.tensor(time[:-1]),
            next_timestamp=torch.tensor(time[1:]),
            prefix_rows=table(shape.prefix, 0),
            context_rows=table(shape.context, 0),
            item_rows=table(shape.item, 0),
            feedback_rows=table(shape.feedback, 0),
            next_context_rows=table(shape.context, 1),
            next_item_rows=table(shape.item, 1),
        )


def one_history(histories: Histories, user: int) -> list[dict[str, object]]:
    span = range(int(histories.cu_seqlens[user]), int(histories.cu_seqlens[user + 1]))
    return [{**{n: c[i] for n, c in histories.fields.items()}, "timestamp": int(histories.timestamp[i])} for i in span]


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_and_feedback_equal_the_twin(name: str, world: Dataset) -> None:
    config = CONFIGS[name]
    histories, targets = questions(world)
    twin = Twin(config, world.item_side())
    model = make_model(config, world, max_events=15)
    prediction = model.predict(histories, targets)
    assert prediction.scores is not None and prediction.scores.shape == (len(histories.user), model.num_ids)
    limit = MAX_EVENTS - int(config.keep_last_event)
    nothing = {"item": -1, "listened": 0, "ratio": 0}
    tower = torch.tensor([twin.rows(twin.shape.item_tower, {"item": i}, 0) for i in range(model.num_ids)])
    items = twin.model.item_vectors(tower, twin.lookup)
    for user in range(len(histories.user)):
        past = one_history(histories, user)[-limit:]
        question = {
            **nothing,
            "device": histories.query_fields["device"][user],
            "timestamp": histories.query_time[user],
        }
        events = twin.events(past, question)
        query = twin.model.next_item_query(twin.model.encode(events, twin.lookup), events, twin.lookup)[-1]
        expected = items @ query * twin.model.inverse_temperature()
        torch.testing.assert_close(prediction.scores[user], expected, rtol=0, atol=1e-10)
        for target in range(int(targets.offsets[user]), int(targets.offsets[user + 1])):
            next_event = {n: c[target] for n, c in targets.fields.items()} | {
                "timestamp": int(targets.timestamp[target]), "listened": 0, "ratio": 0,
            }  # fmt: skip
            asked = [*past, next_event] if config.keep_last_event else past
            events = twin.events(
                asked, {**nothing, "device": 0, "timestamp": 0} if config.keep_last_event else next_event
            )
            logits = twin.model.feedback_logits(twin.model.encode(events, twin.lookup), events, twin.lookup)
            for field, values in logits.items():
                torch.testing.assert_close(
                    prediction.feedback[field][target], values[len(past) - 1], rtol=0, atol=1e-10
                )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_targets_feedback_is_never_read(name: str, world: Dataset) -> None:
    histories, targets = questions(world)
    model = make_model(CONFIGS[name], world)
    leaked = {n: np.zeros_like(targets.fields[n]) for n in ("listened", "ratio")}
    blind = replace(targets, fields={**targets.fields, **leaked})
    seen, unseen = model.predict(histories, targets), model.predict(histories, blind)
    assert torch.equal(seen.scores, unseen.scores)  # type: ignore[arg-type]
    for field in seen.feedback:
        assert torch.equal(seen.feedback[field], unseen.feedback[field])


def test_the_context_of_the_question_matters_and_may_be_missing(world: Dataset) -> None:
    histories, _ = questions(world)
    model = make_model(CONFIGS["argus"], world)
    without = model.scores(replace(histories, query_fields={}))
    zero = model.scores(replace(histories, query_fields={"device": np.zeros(len(histories.user), np.int64)}))
    assert torch.equal(without, zero)
    assert not torch.equal(model.scores(histories), without)


def test_items_may_be_known_by_their_side_fields_alone(world: Dataset) -> None:
    config = replace(CONFIGS["argus"], item_fields=("artist",), input_fields=("artist", "device", "listened"))
    histories, _ = questions(world)
    model = make_model(config, world)
    assert model.num_ids == FIELDS["item"].num_ids
    scores = model.scores(histories)
    artist = world.item_side()["artist"]
    same = [i for i in range(2, 31) if artist[i] == artist[1]]
    # a matrix product may add the same D products up in another order from column to column
    longest = model.queries(histories).norm(dim=1).max() * model.item_vectors().norm(dim=1).max()
    bound = 2 * config.heads.query_width * torch.finfo(scores.dtype).eps * float(longest) / config.heads.temperature
    torch.testing.assert_close(scores[:, same], scores[:, [1] * len(same)], rtol=0, atol=bound)


def test_the_piece_size_changes_nothing(world: Dataset) -> None:
    histories, targets = questions(world)
    whole = make_model(CONFIGS["hstu"], world).predict(histories, targets)
    small = make_model(CONFIGS["hstu"], world, max_events=1).predict(histories, targets)
    torch.testing.assert_close(whole.scores, small.scores, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.feedback, small.feedback, rtol=0, atol=1e-12)


def test_weights_that_do_not_fit_are_refused(world: Dataset) -> None:
    config = CONFIGS["argus"]
    shape, good = input_shape(FIELDS, config), random_weights(config)

    def load(dense: dict[str, torch.Tensor], tables: dict[str, torch.Tensor]) -> None:
        LocalModel(config, shape, Weights(dense=dense, tables=tables), item_side=world.item_side())

    name = next(iter(good.dense))
    load(dict(good.dense), dict(good.tables))
    with pytest.raises(UserError, match=f"'{name}' is missing"):
        load({n: w for n, w in good.dense.items() if n != name}, dict(good.tables))
    with pytest.raises(UserError, match="'extra' is not of this model"):
        load({**good.dense, "extra": torch.zeros(1)}, dict(good.tables))
    with pytest.raises(UserError, match=f"'{name}' has shape"):
        load({**good.dense, name: torch.zeros(1, 1)}, dict(good.tables))
    with pytest.raises(UserError, match="table 'device' is missing"):
        load(dict(good.dense), {n: t for n, t in good.tables.items() if n != "device"})
    with pytest.raises(UserError, match="table 'item' has shape"):
        load(dict(good.dense), {**good.tables, "item": good.tables["item"][:-1]})
