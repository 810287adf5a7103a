"""Recommendations: histories in raw values in, raw items with scores out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from megarec.base.jagged import lengths_to_offsets
from megarec.inference.bundle import Bundle
from megarec.inference.histories import Histories, Targets
from megarec.inference.model import LocalModel, Weights
from megarec.inference.ranking import hide_items, top_items
from megarec.inference.requests import RawReader, Request
from megarec.models.shape import input_shape


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The items for one request, best first.

    Attributes:
        user: as the request gave it.
        source: `model`, or `popularity` for a user without a single event.
        items: raw items.
        scores: of these items; of popularity, train events.
        feedback: by field, for each of the items, the probability of a flag, or of each value or bin by its name.
    """

    user: Any
    source: str
    items: list[Any]
    scores: list[float]
    feedback: dict[str, list[Any]] = field(default_factory=dict)


class Recommender:
    """Answers requests from a bundle.

    Args:
        bundle: the model and its catalog.
        device: where the model runs.
    """

    def __init__(self, bundle: Bundle, *, device: str = "cpu") -> None:
        self.reader = RawReader(bundle.catalog)
        self.model = LocalModel(
            bundle.config.model,
            input_shape(bundle.config.fields, bundle.config.model),
            Weights(dense=bundle.dense, tables=bundle.tables),
            item_side=bundle.catalog.item_side(),
            device=device,
        )
        self._raw = bundle.catalog.item_raw()
        self._popularity = torch.from_numpy(bundle.catalog.item_counts().astype(np.float64)).to(device)
        self._max_history_events = bundle.config.max_history_events

    def answer(
        self, requests: Sequence[Request], *, k: int, filter_seen: bool = False, feedback: bool = False
    ) -> list[Answer]:
        """The best `k` items of each request, or all of its own `items` in order of their scores.

        Args:
            requests: at most a few hundred, for each needs a score per item of the catalog.
            k: how many items.
            filter_seen: leaves out the items of the request's events.
            feedback: adds the predicted feedback to each item.
        """
        candidates = [None if r.items is None else self.reader.item_ids(r.items) for r in requests]
        histories, users = self.reader.read(requests), [request.user for request in requests]
        return self.answer_histories(
            histories, users=users, candidates=candidates, k=k, filter_seen=filter_seen, feedback=feedback
        )

    def answer_histories(
        self,
        histories: Histories,
        *,
        users: Sequence[Any],
        k: int,
        candidates: Sequence[Sequence[int] | None] | None = None,
        filter_seen: bool = False,
        feedback: bool = False,
    ) -> list[Answer]:
        """As `answer`, of histories and candidates in ids; `users` are given back with the answers."""
        chosen = self._choose(histories, candidates or [None] * len(users), k=k, filter_seen=filter_seen)
        known = np.diff(histories.cu_seqlens) > 0
        predicted = self._feedback(histories, chosen) if feedback else {}
        return [
            Answer(
                user=user,
                source="model" if known[row] else "popularity",
                items=[self._raw[item] for item, _ in chosen[row]],
                scores=[score for _, score in chosen[row]],
                feedback={name: values[row] for name, values in predicted.items() if known[row]},
            )
            for row, user in enumerate(users)
        ]

    def _choose(
        self, histories: Histories, candidates: Sequence[Sequence[int] | None], *, k: int, filter_seen: bool
    ) -> list[list[tuple[int, float]]]:
        """The best item ids of each history with their scores; of its candidates, when it has any."""
        scores = self._scores(histories.newest(self._max_history_events))
        seen_user, seen_item = np.zeros(0, np.int64), np.zeros(0, np.int64)
        if filter_seen:
            seen_user, seen_item = histories.user_of_event(), histories.fields["item"].astype(np.int64)
        device = scores.device
        hide_items(scores, torch.from_numpy(seen_user).to(device), torch.from_numpy(seen_item).to(device))
        for row, items in enumerate(candidates):
            if items is not None:
                others = torch.ones(scores.shape[1], dtype=torch.bool, device=device)
                others[torch.tensor(items, device=device)] = False
                scores[row, others] = -torch.inf
        longest = max([k, *(len(items) for items in candidates if items is not None)])
        ids, best = (values.cpu().tolist() for values in top_items(scores, longest))
        return [
            [(i, s) for i, s in zip(ids[row], best[row], strict=True) if i][: k if items is None else None]
            for row, items in enumerate(candidates)
        ]

    def _scores(self, histories: Histories) -> torch.Tensor:
        """Model scores of users with a history, popularity for the others, `[B, V]`."""
        known = np.flatnonzero(np.diff(histories.cu_seqlens))
        scores = self._popularity.repeat(len(histories.user), 1)
        if len(known):
            asked = Histories(
                user=histories.user[known],
                cu_seqlens=lengths_to_offsets(np.diff(histories.cu_seqlens)[known]),
                timestamp=histories.timestamp,
                fields=histories.fields,
                query_time=histories.query_time[known],
                query_fields={name: column[known] for name, column in histories.query_fields.items()},
            )
            scores[torch.from_numpy(known).to(scores.device)] = self.model.scores(asked).to(scores.dtype)
        return scores

    def _feedback(self, histories: Histories, chosen: list[list[tuple[int, float]]]) -> dict[str, list[list[Any]]]:
        """Probabilities of each chosen item's feedback at the time and in the context of the question."""
        known = np.diff(histories.cu_seqlens) > 0
        lengths = np.array([len(items) if known[row] else 0 for row, items in enumerate(chosen)], dtype=np.int64)
        row = np.repeat(np.arange(len(chosen)), lengths)
        item = np.array([i for r, items in enumerate(chosen) if known[r] for i, _ in items], dtype=np.int64)
        targets = Targets(
            offsets=lengths_to_offsets(lengths),
            timestamp=histories.query_time[row],
            fields={"item": item, **{name: column[row] for name, column in histories.query_fields.items()}},
        )
        logits = self.model.feedback_logits(histories.newest(self._max_history_events), targets)
        outcomes = {}
        for name, values in logits.items():
            if values.shape[1] == 1:
                answers: list[Any] = torch.sigmoid(values[:, 0]).tolist()
            else:
                outcome = self.reader.outcome_names(name)
                answers = [dict(zip(outcome, row, strict=True)) for row in torch.softmax(values, dim=1).tolist()]
            outcomes[name] = [answers[first:last] for first, last in pairwise(targets.offsets.tolist())]
        return outcomes
