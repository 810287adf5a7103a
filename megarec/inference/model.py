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
        for piece in self._pieces(histories):
            events = self._events(piece, next_item=np.full(len(piece.user), -1))
            states = self._model.encode(events, self._lookup)
            last = torch.from_numpy(piece.cu_seqlens[1:] - 1).to(self._device)
            queries = self._model.next_item_query(states, events, self._lookup)
            pieces.append(queries[last])
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

        A history is read once per target, at the target's own time: as if the target came next. Layouts with several
        tokens per event read the feedback at the target's item token, so the target follows with its feedback missing.
        """
        if not self.shape.feedback_heads:
            return {}
        pieces: dict[str, list[Tensor]] = {head: [] for head in self.shape.feedback_heads}
        for piece in self._pieces(_ask_each(histories, targets, self.shape.context)):
            item = piece.query_fields["item"].astype(np.int64)
            asked = _with_target(piece, self.shape) if self._interleaved else piece
            events = self._events(asked, next_item=np.full(len(item), -1) if self._interleaved else item)
            states = self._model.encode(events, self._lookup)
            logits = self._model.feedback_logits(states, events, self._lookup)
            # the event before the target: the target itself is the last one of an interleaved history
            at = torch.from_numpy(asked.cu_seqlens[1:] - 1 - int(self._interleaved)).to(self._device)
            for head, values in logits.items():
                pieces[head].append(values[at])
        return {head: torch.cat(values) for head, values in pieces.items() if values}

    def _lookup(self, rows: Tensor) -> Tensor:
        """Rows `[..., S]` to the sum of their vectors `[..., E]`; -1 gives nothing."""
        nothing = len(self._table) - 1
        bags = torch.where(rows < 0, nothing, rows).reshape(-1, rows.shape[-1])
        sums = F.embedding_bag(bags, self._table, mode="sum", padding_idx=nothing)
        return sums.view(*rows.shape[:-1], sums.shape[1])

    def _pieces(self, histories: Histories) -> Iterator[Histories]:
        """The newest events a few users at a time: at most `max_events` events, at least one user."""
        histories = histories.newest(self._max_history)
        ends = histories.cu_seqlens
        bounds = [0]
        for user in range(1, len(histories.user)):
            if ends[user + 1] - ends[bounds[-1]] > self._events_at_once:
                bounds.append(user)
        for first, last in pairwise([*bounds, len(histories.user)]):
            if last > first:
                yield histories.slice(first, last)

    def _events(self, histories: Histories, *, next_item: Int64) -> Events:
        """The tensors of `histories`; the last event of each is followed by `next_item` `[B]` and the question."""
        lengths = np.diff(histories.cu_seqlens)
        last = histories.cu_seqlens[1:] - 1
        position = segment_positions(lengths)
        fields = histories.fields
        following = {f.name: _shifted(fields[f.name], last, _query_ids(histories, f)) for f in self._asked_context()}
        next_timestamp = _shifted(histories.timestamp, last, histories.query_time)
        rows = self._rows.events(
            fields,
            next_fields=following,
            next_item=_shifted(fields["item"].astype(np.int64), last, next_item),
            timestamp=histories.timestamp,
            position=position,
            next_gap_seconds=next_timestamp - histories.timestamp,
        )
        columns = {
            "cu_seqlens": histories.cu_seqlens,
            "position": position,
            "timestamp": histories.timestamp,
            "next_timestamp": next_timestamp,
            **{f"{part}_rows": rows[part] for part in EVENT_PARTS},
        }
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
    given = histories.query_fields.get(field.name)
    if given is not None:
        return given
    shape = (len(histories.user),) if field.slots == 1 else (len(histories.user), field.slots)
    return np.full(shape, 0 if field.slots == 1 else -1)


def _ask_each(histories: Histories, targets: Targets, context: tuple[FieldSlots, ...]) -> Histories:
    """One copy of its user's history per target, that asks at the target's time, in its context, about its item."""
    user = targets.user_of_target()
    lengths = np.diff(histories.cu_seqlens)[user]
    index = gather_indices(histories.cu_seqlens[user], lengths)
    asked = ("item", *(f.name for f in context if f.name in targets.fields))
    return replace(
        histories,
        user=histories.user[user],
        cu_seqlens=lengths_to_offsets(lengths),
        timestamp=histories.timestamp[index],
        fields={name: column[index] for name, column in histories.fields.items()},
        query_time=targets.timestamp,
        query_fields={name: targets.fields[name] for name in asked},
    )


def _with_target(histories: Histories, shape: InputShape) -> Histories:
    """Each history with what it asks about as its last event, feedback missing."""
    ends = histories.cu_seqlens[1:]
    slots = {f.name: f for f in (*shape.context, *shape.feedback)}
    fields = {}
    for name, column in histories.fields.items():
        field = slots.get(name, FieldSlots(name=name, num_ids=0, slots=1 if column.ndim == 1 else column.shape[1]))
        fields[name] = np.insert(column.astype(np.int64), ends, _query_ids(histories, field), axis=0)
    return replace(
        histories,
        cu_seqlens=histories.cu_seqlens + np.arange(len(histories.cu_seqlens)),
        timestamp=np.insert(histories.timestamp, ends, histories.query_time),
        fields=fields,
        query_fields={},
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
