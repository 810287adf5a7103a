"""What a model must beat: popularity, decayed popularity, item neighbours, transitions. Fitted on train events only.

Every baseline answers like a model, so its row goes through the same ranking, filter and metrics.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megarec.base.jagged import Int64, gather_indices, lengths_to_offsets
from megarec.data.block import Block
from megarec.inference.baselines.config import BaselineConfig
from megarec.inference.histories import Histories, Prediction, Targets
from megarec.inference.ranking import top_items

DAY_SECONDS = 86_400
MAX_CELLS = 1 << 25  # of a dense piece of the item-item matrix


@dataclass(frozen=True, kw_only=True)
class TrainEvents:
    """The items of all train histories end to end.

    Attributes:
        offsets: where each user's events begin, `[users + 1]`.
        item: item ids, `[T]`.
        timestamp: seconds, `[T]`.
        num_items: item ids are smaller than this.
    """

    offsets: Int64
    item: npt.NDArray[np.int32]
    timestamp: Int64
    num_items: int

    @classmethod
    def gather(cls, blocks: Iterable[Block], *, num_items: int) -> "TrainEvents":
        """Collects them from the blocks of a dataset's train split: 12 bytes per event."""
        lengths, items, times = [], [], []
        for block in blocks:
            lengths.append(np.diff(block.offsets))
            items.append(block.columns["item"].astype(np.int32))
            times.append(block.columns["timestamp"])
        empty = [np.zeros(0, np.int64)]
        return cls(
            offsets=lengths_to_offsets(np.concatenate(lengths or empty)),
            item=np.concatenate(items or empty).astype(np.int32),
            timestamp=np.concatenate(times or empty),
            num_items=num_items,
        )

    def counts(self) -> Int64:
        """Events of each item, `[V]`."""
        return np.bincount(self.item, minlength=self.num_items).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Popularity:
    """One score per item, the same for everybody.

    Attributes:
        name: the row's name.
        weight: `[V]`.
    """

    name: str
    weight: Tensor

    @classmethod
    def most_popular(cls, events: TrainEvents) -> "Popularity":
        """MostPop: how often an item occurs."""
        return cls(name="MostPop", weight=torch.from_numpy(events.counts().astype(np.float64)))

    @classmethod
    def decayed(cls, events: TrainEvents, *, half_life_days: float) -> "Popularity":
        """DecayPop: occurrences weighted by `2^(-age / half life)`, the age counted from the newest train event."""
        newest = events.timestamp.max() if len(events.timestamp) else 0
        age_days = (newest - events.timestamp) / DAY_SECONDS
        weight = np.bincount(events.item, weights=np.exp2(-age_days / half_life_days), minlength=events.num_items)
        return cls(name="DecayPop", weight=torch.from_numpy(weight))

    def predict(self, histories: Histories, targets: Targets) -> Prediction:
        """The same scores in every row."""
        return Prediction(scores=self.weight.repeat(len(histories.user), 1))


@dataclass(frozen=True, kw_only=True)
class ItemNeighbours:
    """ItemKNN: an item's score is the sum of its cosines to the distinct items of the history.

    `cosine(i, j) = |U_i and U_j| / sqrt(|U_i| |U_j|)` over the sets of users that have each item; an item keeps its
    `num_neighbours` nearest, equal ones by lower id, and is no neighbour of its own.

    Attributes:
        neighbour: item ids, `[V, num_neighbours]`.
        cosine: of each neighbour; 0 where an item has fewer.
        name: the row's name.
    """

    neighbour: Int64
    cosine: npt.NDArray[np.float64]
    name: str = "ItemKNN"

    @classmethod
    def fit(cls, events: TrainEvents, config: BaselineConfig) -> "ItemNeighbours":
        """Counts shared users with sparse products of a few item rows at a time."""
        size, num_users = events.num_items, len(events.offsets) - 1
        user, item = _newest_distinct(events, config.max_user_items)
        users_of_item = torch.from_numpy(np.bincount(item, minlength=size)).clamp(min=1).double()
        per_user = _incidence(user, item, (num_users, size))
        order = np.argsort(item, kind="stable")
        item, user = item[order], user[order]
        neighbours, cosines = [], []
        rows = max(1, MAX_CELLS // size)
        for first in range(0, size, rows):
            last = min(first + rows, size)
            part = slice(*np.searchsorted(item, [first, last]))
            per_item = _incidence(item[part] - first, user[part], (last - first, num_users))
            cosine = _multiply(per_item, per_user)
            cosine /= torch.sqrt(users_of_item[first:last, None] * users_of_item)
            cosine[torch.arange(last - first), torch.arange(first, last)] = 0.0
            nearest, value = top_items(cosine, config.num_neighbours)
            neighbours.append(nearest.numpy())
            cosines.append(value.numpy())
        return cls(neighbour=np.concatenate(neighbours), cosine=np.concatenate(cosines))

    def predict(self, histories: Histories, targets: Targets) -> Prediction:
        """Sums over the neighbours of each distinct item of a history."""
        size = len(self.neighbour)
        pair = np.unique(histories.user_of_event() * size + histories.fields["item"])
        user, item = pair // size, pair % size
        cell = user[:, None] * size + self.neighbour[item]
        scores = np.bincount(cell.reshape(-1), self.cosine[item].reshape(-1), minlength=len(histories.user) * size)
        return Prediction(scores=torch.from_numpy(scores.reshape(len(histories.user), size)))


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """A first-order Markov chain: how often an item followed the last one, backed off to popularity.

    `P(j | i) = (count(i, j) + prior p(j)) / (count(i) + prior)`; an empty history gets `p(j)`.

    Attributes:
        offsets: where each item's followers begin, `[V + 1]`.
        follower: item ids, end to end.
        count: how often each followed.
        popularity: `p`, `[V]`.
        prior_events: the weight of `p` in events.
        name: the row's name.
    """

    offsets: Int64
    follower: Int64
    count: Int64
    popularity: npt.NDArray[np.float64]
    prior_events: float
    name: str = "Markov"

    @classmethod
    def fit(cls, events: TrainEvents, config: BaselineConfig) -> "Transitions":
        """Counts neighbouring pairs inside each history."""
        size = events.num_items
        follows = np.ones(len(events.item), dtype=bool)
        follows[events.offsets[:-1][np.diff(events.offsets) > 0]] = False
        later = np.flatnonzero(follows)
        pair, count = np.unique(events.item[later - 1].astype(np.int64) * size + events.item[later], return_counts=True)
        counts = events.counts()
        return cls(
            offsets=np.searchsorted(pair, np.arange(size + 1, dtype=np.int64) * size),
            follower=pair % size,
            count=count,
            popularity=counts / max(1, counts.sum()),
            prior_events=config.prior_events,
        )

    def predict(self, histories: Histories, targets: Targets) -> Prediction:
        """`P(j | last item)` of every item."""
        num_users = len(histories.user)
        scores = np.tile(self.popularity, (num_users, 1))
        known = np.flatnonzero(np.diff(histories.cu_seqlens))
        last = histories.fields["item"][histories.cu_seqlens[known + 1] - 1].astype(np.int64)
        lengths = self.offsets[last + 1] - self.offsets[last]
        index = gather_indices(self.offsets[last], lengths)
        total = np.bincount(np.repeat(known, lengths), weights=self.count[index], minlength=num_users)
        scores *= (self.prior_events / (total + self.prior_events))[:, None]
        row = np.repeat(known, lengths)
        scores[row, self.follower[index]] += self.count[index] / (total + self.prior_events)[row]
        return Prediction(scores=torch.from_numpy(scores))


def _newest_distinct(events: TrainEvents, limit: int) -> tuple[Int64, Int64]:
    """Pairs (user, item), each once, of the `limit` newest distinct items of each user."""
    lengths = np.diff(events.offsets)
    user = np.repeat(np.arange(len(lengths)), lengths)
    backwards = np.arange(len(user))[::-1]
    pair, first = np.unique((user * events.num_items + events.item)[backwards], return_index=True)
    user, item, at = pair // events.num_items, pair % events.num_items, backwards[first]
    order = np.lexsort((-at, user))
    start = np.searchsorted(user[order], np.arange(len(lengths) + 1))
    kept = np.sort(order[np.arange(len(order)) - start[user[order]] < limit])
    return user[kept], item[kept]


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """The dense float64 product of two sparse matrices."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse.mm(left, right).to_dense().double()


def _incidence(row: Int64, column: Int64, shape: tuple[int, int]) -> Tensor:
    """The sparse matrix with a one at each (row, column)."""
    index = torch.from_numpy(np.stack([row, column]))
    return torch.sparse_coo_tensor(index, torch.ones(len(row)), shape, check_invariants=False).coalesce()
