"""Evaluation: one predictor, one protocol, exact ranks over the whole catalog, metrics with their noise.

A model, a baseline and an oracle all go through here, so their rows can stand side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megarec.base.errors import UserError
from megarec.base.jagged import Int64, gather_indices, lengths_to_offsets
from megarec.base.progress import bar
from megarec.data.dataset import Dataset
from megarec.data.evaluation import EvaluationBatch, evaluation_batches
from megarec.inference.feedback_measures import Float64, measure_feedback
from megarec.inference.histories import Histories, Prediction, Predictor, Targets
from megarec.inference.ranking import UNRANKED, hide_items, rank_targets, top_items
from megarec.metrics.estimate import Estimate
from megarec.metrics.protocol import Protocol
from megarec.metrics.ranking import measure_lists, measure_ranks

MAX_SCORES = 1 << 24  # scores that exist at one time: users of a batch times items
MAX_USERS_AT_ONCE = 256
ALL_EVENTS = 1 << 62
TRUE = 2  # the id of a flag that is set


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one predictor earned under one protocol.

    Attributes:
        name: the predictor.
        protocol: the rules.
        split: the rule that made targets, and its numbers.
        counts: users and targets that were measured, those that could not be, and of the ranking `ranked_users` and
            their `ranked_targets`, distinct ones.
        ranking: means over users, such as `ndcg@10` and `mrr`, with their standard errors; empty when no items were
            scored.
        coverage: share of the candidates that was recommended to anybody, such as `coverage@10`.
        feedback: measures of each feedback field, over targets whose feedback is known.
    """

    name: str
    protocol: Protocol
    split: dict[str, Any]
    counts: dict[str, int]
    ranking: dict[str, Estimate] = field(default_factory=dict)
    coverage: dict[str, float] = field(default_factory=dict)
    feedback: dict[str, dict[str, float]] = field(default_factory=dict)

    def reported(self) -> dict[str, Estimate]:
        """The metrics that the protocol names, as far as items were scored, and the AUC of each feedback field."""
        count = self.counts.get("users", 0)
        plain = {name: Estimate(value=v, standard_error=float("nan"), count=count) for name, v in self.flat().items()}
        names = [*self.protocol.metrics, *(name for name in plain if name.endswith("/auc"))]
        return {name: self.ranking.get(name, plain[name]) for name in names if name in plain}

    def flat(self) -> dict[str, float]:
        """Every number by one name: `ndcg@10`, `coverage@10`, `listened/auc`."""
        values = {metric: estimate.value for metric, estimate in self.ranking.items()} | self.coverage
        for name, measures in self.feedback.items():
            values |= {f"{name}/{metric}": value for metric, value in measures.items()}
        return values


@dataclass(kw_only=True)
class Tally:
    """What was seen of every user, before any mean is taken; tallies of several readers join.

    Attributes:
        counts: users and targets.
        top: the best items of each user, `[B, k]`; -1 where a list is shorter.
        best_rank: the rank of each user's target that is ranked first, `[B]`; inf when none can be found.
        num_distinct: distinct targets of each user, `[B]`.
        target: their item ids, user after user.
        logits: by feedback field, of each target.
        outcome: by feedback field, the feedback id of each target.
        owner: by feedback field, the user of each target.
    """

    counts: dict[str, int] = field(default_factory=dict)
    top: list[Int64] = field(default_factory=list)
    best_rank: list[Float64] = field(default_factory=list)
    num_distinct: list[Int64] = field(default_factory=list)
    target: list[Int64] = field(default_factory=list)
    logits: dict[str, list[Float64]] = field(default_factory=dict)
    outcome: dict[str, list[Int64]] = field(default_factory=dict)
    owner: dict[str, list[Int64]] = field(default_factory=dict)

    def join(self, other: "Tally") -> None:
        """Takes over what `other` saw."""
        for name, count in other.counts.items():
            self.add_count(name, count)
        self.top += other.top
        self.best_rank += other.best_rank
        self.num_distinct += other.num_distinct
        self.target += other.target
        for name in other.logits:
            self.logits.setdefault(name, []).extend(other.logits[name])
            self.outcome.setdefault(name, []).extend(other.outcome[name])
            self.owner.setdefault(name, []).extend(other.owner[name])

    def add_count(self, name: str, count: int) -> None:
        """Counts `count` more of `name`."""
        self.counts[name] = self.counts.get(name, 0) + count

    def result(self, name: str, dataset: Dataset, protocol: Protocol) -> Result:
        """The metrics of everything seen.

        Raises:
            UserError: items were scored, and no target is one that the protocol ranks.
        """
        ranking: dict[str, Estimate] = {}
        coverage: dict[str, float] = {}
        if self.top:
            if not self.counts["ranked_users"]:
                what = f"no target has the flag '{protocol.target_flag}'"
                raise UserError(what, where=str(dataset.path), fix="Set protocol.target_flag=null to rank all")
            lists = measure_lists(
                np.concatenate(self.top),
                lengths_to_offsets(np.concatenate(self.num_distinct)),
                np.concatenate(self.target),
                cutoffs=protocol.cutoffs,
                num_items=len(_candidates(dataset, protocol)),
            )
            best_rank = np.concatenate(self.best_rank)
            ranking = {**lists.estimates, **measure_ranks(best_rank, cutoffs=(), mrr_depth=protocol.mrr_depth)}
            coverage = lists.coverage
        feedback = {
            head: measure_feedback(
                np.concatenate(self.logits[head]), np.concatenate(self.outcome[head]), np.concatenate(self.owner[head])
            )
            for head in self.logits
        }
        return Result(
            name=name,
            protocol=protocol,
            split=dataset.split,
            counts=self.counts,
            ranking=ranking,
            coverage=coverage,
            feedback=feedback,
        )


def evaluate(predictor: Predictor, dataset: Dataset, protocol: Protocol, *, max_users: int = 0) -> Result:
    """Measures `predictor` on the split of `dataset` that `protocol` asks about.

    Args:
        predictor: what is measured.
        dataset: where users and targets come from.
        protocol: the rules.
        max_users: at most so many users, the first ones; 0 for all.

    Raises:
        UserError: the dataset cannot serve the protocol, the split has no user that can be measured, or a score is not
            a number.
    """
    protocol.check(dataset)
    seen = tally(predictor, dataset, protocol, max_users=max_users)
    if not seen.counts.get("users"):
        raise UserError(f"no user of the {protocol.split} split has a history and a target", where=str(dataset.path))
    return seen.result(predictor.name, dataset, protocol)


def tally(
    predictor: Predictor, dataset: Dataset, protocol: Protocol, *, max_users: int = 0, rank: int = 0, world: int = 1
) -> Tally:
    """What reader `rank` of `world` sees of its share of the users; joined over all readers it is the whole."""
    seen = Tally()
    candidates = _candidates(dataset, protocol)
    context = [name for name, info in dataset.fields.items() if info.role == "context"]
    users_at_once = max(1, min(MAX_USERS_AT_ONCE, MAX_SCORES // dataset.fields["item"].num_ids))
    batches = evaluation_batches(
        dataset,
        split=protocol.split,
        max_history_events=protocol.max_history_events or ALL_EVENTS,
        users_per_batch=users_at_once,
        max_users=max_users,
        rank=rank,
        world=world,
    )
    with bar(title=f"evaluate {predictor.name}", total=max_users or None, unit="users") as progress:
        for batch in batches:
            empty = np.diff(batch.cu_seqlens) == 0
            seen.add_count("users_without_target", batch.num_users_without_target)
            seen.add_count("users_without_history", int(empty.sum()))
            seen.add_count("dropped_events", batch.num_dropped_events)
            users = np.flatnonzero(~empty)
            if len(users):
                histories, targets = ask(batch, protocol, users, context=context)
                prediction = predictor.predict(histories, targets)
                seen.add_count("users", len(users))
                seen.add_count("targets", len(targets.timestamp))
                if prediction.scores is not None:
                    hidden = _filtered(batch, protocol, users)
                    _hide(prediction.scores, *hidden, candidates=candidates)
                    _add_ranks(seen, prediction.scores, targets, protocol)
                _add_feedback(seen, prediction, histories, targets)
            progress.update(len(users))
    return seen


def ask(
    batch: EvaluationBatch, protocol: Protocol, users: Int64, *, context: Sequence[str]
) -> tuple[Histories, Targets]:
    """The question that `protocol` asks about the users in the rows `users`, and what came next.

    Of a target only the fields `context`, known before the choice, enter the question.
    """
    lengths = np.diff(batch.cu_seqlens)[users]
    events = gather_indices(batch.cu_seqlens[users], lengths)
    num_targets = np.diff(batch.target_offsets)[users]
    rows = gather_indices(batch.target_offsets[users], num_targets)
    targets = Targets(
        offsets=lengths_to_offsets(num_targets),
        timestamp=batch.target_timestamp[rows],
        fields={name: column[rows] for name, column in batch.target_fields.items()},
    )
    cu_seqlens, timestamp = lengths_to_offsets(lengths), batch.timestamp[events]
    query_fields = {
        "target": {name: targets.fields[name][targets.offsets[:-1]] for name in context},
        "last_event": {name: batch.fields[name][events][cu_seqlens[1:] - 1] for name in context},
        "missing": {},
    }[protocol.query_context]
    histories = Histories(
        user=batch.user[users],
        cu_seqlens=cu_seqlens,
        timestamp=timestamp,
        fields={name: column[events] for name, column in batch.fields.items()},
        query_time=batch.query_time[users] if protocol.query_time == "dataset" else timestamp[cu_seqlens[1:] - 1],
        query_fields=query_fields,
    )
    return histories, targets


def _filtered(batch: EvaluationBatch, protocol: Protocol, users: Int64) -> tuple[Int64, Int64]:
    """The pairs (row among `users`, item) that the protocol makes impossible."""
    if protocol.filter_seen == "none":
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    full = protocol.filter_seen == "full"
    offsets, items = (batch.seen_offsets, batch.seen_items) if full else (batch.cu_seqlens, batch.fields["item"])
    lengths = np.diff(offsets)[users]
    return np.repeat(np.arange(len(users)), lengths), items[gather_indices(offsets[users], lengths)].astype(np.int64)


def _candidates(dataset: Dataset, protocol: Protocol) -> Int64:
    """The item ids that may be recommended at all, ascending."""
    if protocol.catalog == "trained":
        return np.flatnonzero(dataset.item_counts())
    return np.arange(1, dataset.num_items + 1)


def _hide(scores: Tensor, user: Int64, item: Int64, *, candidates: Int64) -> None:
    """Makes the pairs of (row `user`, `item`) impossible, and every item that is no candidate, in place."""
    hide_items(scores, torch.from_numpy(user).to(scores.device), torch.from_numpy(item).to(scores.device))
    if len(candidates) < scores.shape[1] - 1:
        others = np.setdiff1d(np.arange(scores.shape[1]), candidates)
        scores[:, torch.from_numpy(others).to(scores.device)] = -torch.inf


def _add_ranks(seen: Tally, scores: Tensor, targets: Targets, protocol: Protocol) -> None:
    """Adds the top items of each user and the rank of the target that stands first."""
    device, num_ids, longest = scores.device, scores.shape[1], max(protocol.cutoffs, default=1)
    flag = protocol.target_flag
    wanted = np.flatnonzero(targets.fields[flag] == TRUE) if flag else np.arange(len(targets.timestamp))
    item = targets.fields["item"][wanted].astype(np.int64)
    # unknown items may all be different ones, so each is a target of its own
    item = np.where(item == 0, num_ids + wanted, item)
    pair = np.unique(targets.user_of_target()[wanted] * (num_ids + len(targets.timestamp)) + item)
    user, item = np.divmod(pair, num_ids + len(targets.timestamp))
    users, user, num_distinct = np.unique(user, return_inverse=True, return_counts=True)
    if len(users) < len(scores):
        scores = scores[torch.from_numpy(users).to(device)]
    known = np.where(item < num_ids, item, 0)
    own = scores[torch.from_numpy(user).to(device), torch.from_numpy(known).to(device)].double().cpu().numpy()
    # sorted by user, then by place in the list: the pairs are in the order of the ids already
    first = np.lexsort((-own, user))[num_distinct.cumsum() - num_distinct]
    rank = rank_targets(scores, torch.from_numpy(known[first]).to(device)).cpu().numpy()
    top = np.full((len(scores), longest), -1)
    ids = top_items(scores, longest)[0].cpu().numpy()
    top[:, : ids.shape[1]] = np.where(ids == 0, -1, ids)
    seen.top.append(top)
    seen.best_rank.append(np.where(rank == UNRANKED, np.inf, rank))
    seen.num_distinct.append(num_distinct)
    seen.target.append(item)
    seen.add_count("ranked_users", len(users))
    seen.add_count("ranked_targets", len(item))
    seen.add_count("unknown_targets", int((known == 0).sum()))
    seen.add_count("impossible_targets", int((np.isneginf(own) & (known > 0)).sum()))


def _add_feedback(seen: Tally, prediction: Prediction, histories: Histories, targets: Targets) -> None:
    owner = histories.user[targets.user_of_target()]
    for name, logits in prediction.feedback.items():
        seen.logits.setdefault(name, []).append(logits.double().cpu().numpy())
        seen.outcome.setdefault(name, []).append(targets.fields[name].astype(np.int64))
        seen.owner.setdefault(name, []).append(owner)
