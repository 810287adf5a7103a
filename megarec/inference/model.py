"""A trained model on one device, in plain torch: histories in, scores and feedback logits out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from megarec.base.errors import UserError
from megarec.base.jagged import Int64, gather_indices, lengths_to_offsets, segment_positions
from megarec.inference.histories import Array, Histories, Prediction, Targets
from megarec.models.choice import ModelConfig
from megarec.models.inputs import EVENT_PARTS, Events
from megarec.models.registry import build_model
from megarec.models.rows import RowMap
from megarec.models.shape import TIME_GAP, FieldSlots, InputShape
from megarec.parallel.parts import local_parts

ITEMS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The numbers of a model.

    Attributes:
        dense: by global name.
        tables: `[num_ids, table_width]` by field.
    """

    dense: Mapping[str, Tensor]
    tables: Mapping[str, Tensor]


class LocalModel:
    """A model with all of its weights in this process.

    Args:
        config: the settings of the model.
        shape: what it reads and predicts.
        weights: its numbers; dense ones in less than fp32 are widened to it.
        item_side: item-side ids by item id, as `Dataset.item_side` gives them.
        name: what its row in a table is called.
        device: where it runs.
        max_events: events encoded at one time; a longer history goes alone.
        max_candidates: targets of a user that are answered in one pass over the history.

    Raises:
        UserError: a weight is missing, left over or of another shape.
    """

    def __init__(
        self,
        config: ModelConfig,
        shape: InputShape,
        weights: Weights,
        *,
        item_side: Mapping[str, npt.NDArray[np.int32]],
        name: str = "model",
        device: str | torch.device = "cpu",
        max_events: int = 16_384,
        max_candidates: int = 256,
    ) -> None:
        self.name = name
        self.shape = shape
        # a model may know items by their side fields alone
        own = [f.num_ids for f in (*shape.item_tower, *shape.item) if f.name == "item"]
        self.num_ids = [*own, *(len(ids) for ids in item_side.values())][0]
        self._interleaved = config.keep_last_event
        # a target that follows its history needs a position too
        self._max_history = config.max_positions - int(self._interleaved)
        self._events_at_once = max_events
        self._max_candidates = max_candidates
        self._device = torch.device(device)
        tables = [_table_of(weights, f, n) for f, n in shape.tables.items()]
        # the last row is what an empty slot gives
        self._table = torch.cat([*tables, tables[0].new_zeros(1, config.table_width)]).to(self._device)
        starts = lengths_to_offsets(np.array(list(shape.tables.values())))[:-1].tolist()
        self._rows = RowMap(shape, dict(zip(shape.tables, starts, strict=True)), item_side)
        self._model = build_model(config, shape, local_parts()).to(self._device, _widest(weights.dense))
        _load(self._model, weights.dense)
        self._model.eval()
        self._item_vectors: Tensor | None = None

    @torch.no_grad()
    def predict(self, histories: Histories, targets: Targets) -> Prediction:
        """Scores of every item `[B, V]` and logits of each target's feedback; every history needs an event."""
        return Prediction(scores=self.scores(histories), feedback=self.feedback_logits(histories, targets))

    @torch.no_grad()
    def scores(self, histories: Histories) -> Tensor:
        """A score for every item id, `[B, V]`: query times item vector times inverse temperature."""
        return self.queries(histories) @ self.item_vectors().T * self._model.inverse_temperature()

    @torch.no_grad()
    def queries(self, histories: Histories) -> Tensor:
        """The vector that asks for each user's next item, `[B, Dq]`."""
        pieces = []
        histories = histories.newest(self._max_history)
        for first, last in self._bounds(np.diff(histories.cu_seqlens)):
            piece = histories.slice(first, last)
            events = self._events(piece, next_item=np.full(len(piece.user), -1))
            states = self._model.encode(events, self._lookup)
            queries = self._model.next_item_query(states, events, self._lookup)
            pieces.append(queries[torch.from_numpy(piece.cu_seqlens[1:] - 1).to(self._device)])
        return torch.cat(pieces)

    @torch.no_grad()
    def item_vectors(self) -> Tensor:
        """The vector of every item id, `[V, Dq]`; computed once."""
        if self._item_vectors is None:
            pieces = []
            for first in range(0, self.num_ids, ITEMS_AT_ONCE):
                items = np.arange(first, min(first + ITEMS_AT_ONCE, self.num_ids))
                rows = torch.from_numpy(self._rows.item_tower(items)).to(self._device)
                pieces.append(self._model.item_vectors(rows, self._lookup))
            self._item_vectors = torch.cat(pieces)
        return self._item_vectors

    @torch.no_grad()
    def feedback_logits(self, histories: Histories, targets: Targets) -> dict[str, Tensor]:
        """Logits `[M, n]` of each target's feedback, given its user's history, its item and its context.

        Each target is asked at its own time, as if it came next. All targets of a user, or all at one time where the
        history's state depends on it, are answered in one pass over the history, at most `max_candidates` of them: the
        fused layout reads the history's last state, the others let the targets follow as candidates that do not see
        each other, their feedback missing.

        Source: M-FALCON (arXiv 2402.17152, section 3.4), without its cache across passes.
        """
        if not self.shape.feedback_heads:
            return {}
        questions = _group(targets, max_candidates=self._max_candidates, by_time=self._model.reads_query_time)
        asked = _copy_users(histories.newest(self._max_history), questions.user, query_time=questions.time)
        size = np.diff(asked.cu_seqlens) + (np.diff(questions.offsets) if self._interleaved else 0)
        answer = self._follow if self._interleaved else self._append
        pieces: dict[str, list[Tensor]] = {head: [] for head in self.shape.feedback_heads}
        for first, last in self._bounds(size):
            offsets = questions.offsets[first : last + 1]
            chosen = questions.order[offsets[0] : offsets[-1]]
            candidates = Targets(
                offsets=offsets - offsets[0],
                timestamp=targets.timestamp[chosen],
                fields={name: column[chosen] for name, column in targets.fields.items()},
            )
            for head, values in answer(asked.slice(first, last), candidates).items():
                pieces[head].append(values)
        back = torch.from_numpy(np.argsort(questions.order)).to(self._device)
        return {head: torch.cat(values)[back] for head, values in pieces.items() if values}

    def _append(self, histories: Histories, candidates: Targets) -> dict[str, Tensor]:
        """Logits of candidates that the heads of the fused layout read beside the last state of their history."""
        events = self._events(histories, next_item=np.full(len(histories.user), -1))
        states = self._model.encode(events, self._lookup)
        last = histories.cu_seqlens[1:][candidates.user_of_target()] - 1
        gap_seconds = candidates.timestamp - histories.timestamp[last]
        context = {f.name: _ids(candidates.fields, f, len(last)) for f in self._asked_context()}
        rows = {
            "next_context_rows": self._rows.context(context, gap_seconds=gap_seconds),
            "next_item_rows": self._rows.item(candidates.fields["item"].astype(np.int64)),
        }
        tensors: dict[str, Any] = {name: torch.from_numpy(row).to(self._device) for name, row in rows.items()}
        asked = replace(events, **tensors)
        return self._model.feedback_logits(states[torch.from_numpy(last).to(self._device)], asked, self._lookup)

    def _follow(self, histories: Histories, candidates: Targets) -> dict[str, Tensor]:
        """Logits of candidates that follow their history as events of their own."""
        num_candidates = np.diff(candidates.offsets)
        followed = _with_candidates(histories, candidates, shape=self.shape)
        nothing = np.full(len(histories.user), -1)
        events = self._events(followed, next_item=nothing, num_candidates=num_candidates)
        states = self._model.encode(events, self._lookup)
        logits = self._model.feedback_logits(states, events, self._lookup)
        # a row speaks of the event behind it
        at = gather_indices(followed.cu_seqlens[1:] - num_candidates - 1, num_candidates)
        return {head: values[torch.from_numpy(at).to(self._device)] for head, values in logits.items()}

    def _lookup(self, rows: Tensor) -> Tensor:
        """Rows `[..., S]` to the sum of their vectors `[..., E]`; -1 gives nothing."""
        nothing = len(self._table) - 1
        bags = torch.where(rows < 0, nothing, rows).reshape(-1, rows.shape[-1])
        sums = F.embedding_bag(bags, self._table, mode="sum", padding_idx=nothing)
        return sums.view(*rows.shape[:-1], sums.shape[1])

    def _bounds(self, num_events: Int64) -> Iterator[tuple[int, int]]:
        """Ranges of histories of `num_events` `[B]`: at most `max_events` events, at least one history."""
        ends = lengths_to_offsets(num_events)
        bounds = [0]
        for user in range(1, len(num_events)):
            if ends[user + 1] - ends[bounds[-1]] > self._events_at_once:
                bounds.append(user)
        yield from pairwise([*bounds, len(num_events)] if len(num_events) else [])

    def _events(self, histories: Histories, *, next_item: Int64, num_candidates: Int64 | None = None) -> Events:
        """The tensors of `histories`; the last event of each is followed by `next_item` `[B]` and the question.

        The last `num_candidates` `[B]` events of each history stand at one place, behind the last event before them.
        """
        lengths = np.diff(histories.cu_seqlens)
        last = histories.cu_seqlens[1:] - 1
        num_before = lengths if num_candidates is None else lengths - num_candidates
        position = np.minimum(segment_positions(lengths), np.repeat(num_before, lengths))
        before = np.maximum(np.repeat(histories.cu_seqlens[:-1], lengths) + position - 1, 0)
        fields = histories.fields
        following = {f.name: _shifted(fields[f.name], last, _query_ids(histories, f)) for f in self._asked_context()}
        next_timestamp = _shifted(histories.timestamp, last, histories.query_time)
        rows = self._rows.events(
            fields,
            next_fields=following,
            next_item=_shifted(fields["item"].astype(np.int64), last, next_item),
            gap_seconds=np.where(position == 0, -1, histories.timestamp - histories.timestamp[before]),
            next_gap_seconds=next_timestamp - histories.timestamp,
        )
        columns = {
            "cu_seqlens": histories.cu_seqlens,
            "position": position,
            "timestamp": histories.timestamp,
            "next_timestamp": next_timestamp,
            **{f"{part}_rows": rows[part] for part in EVENT_PARTS},
        }
        if num_candidates is not None:
            columns["num_candidates"] = num_candidates
        tensors: dict[str, Any] = {name: torch.from_numpy(c).to(self._device) for name, c in columns.items()}
        return Events(**tensors)

    def _asked_context(self) -> list[FieldSlots]:
        """The context fields that data brings; `time_gap` is made of times."""
        return [f for f in self.shape.context if f.name != TIME_GAP]


def _shifted(column: Array, last: Int64, after: Array) -> Array:
    """What follows each event: the next row of `column`, and `after` `[B]` behind the rows `last` `[B]`."""
    following = np.roll(column, -1, axis=0)
    following[last] = after
    return following


def _query_ids(histories: Histories, field: FieldSlots) -> Array:
    """The ids of one context field of the question; missing ones are 0, or empty slots."""
    return _ids(histories.query_fields, field, len(histories.user))


def _ids(fields: Mapping[str, Array], field: FieldSlots, count: int) -> Array:
    """The ids of one field, `[count]` or `[count, slots]`; 0, or empty slots, where `fields` lacks it."""
    given = fields.get(field.name)
    if given is not None:
        return given
    return np.full((count,) if field.slots == 1 else (count, field.slots), 0 if field.slots == 1 else -1)


@dataclass(frozen=True, kw_only=True)
class _Questions:
    """Q questions: a user, a time, and the targets that are asked about.

    Attributes:
        user: row of the user among the histories, `[Q]`.
        time: of the first of its targets, seconds, `[Q]`.
        order: the targets, question after question, `[M]`.
        offsets: where each question's targets begin in `order`, `[Q + 1]`.
    """

    user: Int64
    time: Int64
    order: Int64
    offsets: Int64


def _group(targets: Targets, *, max_candidates: int, by_time: bool) -> _Questions:
    """Targets of one user (`by_time`: at one time) become one question, or several of at most `max_candidates`."""
    user = targets.user_of_target()
    order = np.lexsort((targets.timestamp, user))
    key = np.stack([user[order], targets.timestamp[order]])
    first = np.ones(len(order), dtype=np.bool_)
    first[1:] = (key[:, 1:] != key[:, :-1])[: 1 + by_time].any(axis=0)
    group_start = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    first |= (np.arange(len(order)) - group_start) % max_candidates == 0
    starts = np.flatnonzero(first)
    return _Questions(
        user=key[0, starts], time=key[1, starts], order=order, offsets=np.append(starts, len(order)).astype(np.int64)
    )


def _copy_users(histories: Histories, user: Int64, *, query_time: Int64) -> Histories:
    """A copy of the history in each row `user` `[Q]`, asked at `query_time` `[Q]`."""
    lengths = np.diff(histories.cu_seqlens)[user]
    index = gather_indices(histories.cu_seqlens[user], lengths)
    return replace(
        histories,
        user=histories.user[user],
        cu_seqlens=lengths_to_offsets(lengths),
        timestamp=histories.timestamp[index],
        fields={name: column[index] for name, column in histories.fields.items()},
        query_time=query_time,
        query_fields={},
    )


def _with_candidates(histories: Histories, candidates: Targets, *, shape: InputShape) -> Histories:
    """Each history followed by its candidates, whose item and context are known and whose feedback is missing."""
    ends = histories.cu_seqlens[1:][candidates.user_of_target()]
    fields = candidates.fields
    known = {"item": fields["item"], **{f.name: _ids(fields, f, len(ends)) for f in shape.context}}
    slots = {f.name: f for f in (*shape.context, *shape.feedback)}
    columns = {}
    for name, column in histories.fields.items():
        field = slots.get(name, FieldSlots(name=name, num_ids=0, slots=1 if column.ndim == 1 else column.shape[1]))
        columns[name] = np.insert(column.astype(np.int64), ends, _ids(known, field, len(ends)), axis=0)
    return replace(
        histories,
        cu_seqlens=histories.cu_seqlens + candidates.offsets,
        timestamp=np.insert(histories.timestamp, ends, candidates.timestamp),
        fields=columns,
    )


def _widest(dense: Mapping[str, Tensor]) -> torch.dtype:
    """The widest floating type of the weights, fp32 at least."""
    widest = torch.float32
    for weight in dense.values():
        widest = torch.promote_types(widest, weight.dtype)
    return widest


def _table_of(weights: Weights, field: str, num_rows: int) -> Tensor:
    table = weights.tables.get(field)
    if table is None or table.ndim != 2 or len(table) != num_rows:
        found = "is missing" if table is None else f"has shape {tuple(table.shape)}"
        raise UserError(f"table '{field}' {found}, the dataset has {num_rows} ids", fix="It belongs to another dataset")
    return table


def _load(model: torch.nn.Module, dense: Mapping[str, Tensor]) -> None:
    """Fills every parameter by name and refuses what does not fit."""
    parameters = dict(model.named_parameters())
    for name in sorted(set(parameters) ^ set(dense)):
        what = "is missing" if name in parameters else "is not of this model"
        raise UserError(f"the weight '{name}' {what}", fix="The weights and the settings are not of one run")
    for name, parameter in parameters.items():
        if parameter.shape != dense[name].shape:
            raise UserError(
                f"the weight '{name}' has shape {tuple(dense[name].shape)}, the model wants {tuple(parameter.shape)}",
                fix="The weights and the settings are not of one run",
            )
        parameter.data.copy_(dense[name])
