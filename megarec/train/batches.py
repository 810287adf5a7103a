"""From packs of events to what a step needs: table rows, targets, negatives. Runs in the reader's thread."""

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from megarec.base.jagged import Int64, gather_indices, stable_order
from megarec.base.random import derive_key, integers_numpy
from megarec.data.packs import Bool, Pack
from megarec.data.prefetch import Prefetcher
from megarec.data.stream import TrainStream
from megarec.models.rows import RowMap
from megarec.parallel.slices import Slices
from megarec.train.config import ObjectiveConfig

WHOLE_CATALOG_DRAWS = 16  # draws per item: e^-16 of the items would be missing


@dataclass(frozen=True, kw_only=True)
class PackBatch:
    """One pack as tensors, in event units: `T` events, `Q` of them with a next item, `C` candidates.

    Attributes:
        key: of everything random in this pack.
        columns: `cu_seqlens` `[B + 1]`, `position`, `timestamp`, `next_timestamp` `[T]`, `target_event` `[Q]` (which
            events have a next item), `target` `[Q]` (its place among the candidates), `candidate_id` `[C]`,
            `log_q` `[C]`, and `feedback/<field>` `[T]` (the next event's value, 0 where it is unknown or not asked).
            Where windows end with candidates, `num_candidates` `[B]`. With negatives per position, `slots`
            `[Q, 1 + K]` (the places of each target and its draws among the candidates) and `order` `[Q (1 + K)]`
            (their stable order).
        rows: for each of `EVENT_PARTS` and for the `candidates` the table rows `[*, S]`, -1 for nothing.
    """

    key: int
    columns: dict[str, Tensor]
    rows: dict[str, Tensor]

    def slice(self, slices: Slices) -> "PackBatch":
        """What of the pack is this rank's: rows, targets and feedback of its slice of the events and of the candidates.

        Prefixes and all that speaks of places and times stay whole: attention sees every event. The targets of the
        whole pack are kept as `all_target_event` and `all_target`.
        """
        if slices.count == 1:
            return self
        columns, rows = dict(self.columns), dict(self.rows)
        own = slices.rows_of(len(columns["position"]))
        columns |= {f"all_{name}": columns[name] for name in ("target_event", "target")}
        mine = (columns["target_event"] >= own.start) & (columns["target_event"] < own.stop)
        columns["target_event"] = columns["target_event"][mine] - own.start
        columns["target"] = columns["target"][mine]
        if "slots" in columns:
            columns["slots"] = columns["slots"][mine]
            columns["order"] = torch.sort(columns["slots"].flatten(), stable=True).indices
        for name in columns:
            if name.startswith("feedback/"):
                columns[name] = columns[name][own]
        for name, row in rows.items():
            if name == "candidates":  # as many on every rank; behind the last one stand empty rows
                row = F.pad(row, (0, 0, 0, -len(row) % slices.count), value=-1)
            rows[name] = row if name == "prefix" else slices.own(row)
        return replace(self, columns=columns, rows=rows)

    def only(self, row_parts: Set[str]) -> "PackBatch":
        """The same with these rows alone."""
        return replace(self, rows={part: rows for part, rows in self.rows.items() if part in row_parts})

    @property
    def num_events(self) -> int:
        """Living events."""
        return int(self.columns["cu_seqlens"][-1])

    @property
    def num_windows(self) -> int:
        """Windows of histories."""
        return len(self.columns["cu_seqlens"]) - 1


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The packs of this rank in one step and where the stream stands after them.

    Attributes:
        packs: the packs.
        position: of each lane, from which a stream goes on.
        epochs: how often the lanes were read, summed over them.
    """

    packs: list[PackBatch]
    position: dict[str, Any]
    epochs: float

    def share(self, slices: Slices, row_parts: Set[str]) -> "StepBatch":
        """What of the packs is this rank's, where ranks share them: its slices, and the rows that its stage reads."""
        packs = [pack.slice(slices) for pack in self.packs]
        return replace(self, packs=[pack.only(row_parts) for pack in packs])

    def all_rows(self) -> Tensor:
        """The rows of all packs end to end, `[n]`, for one exchange."""
        none = torch.empty(0, dtype=torch.int64)
        return torch.cat([none, *(rows.reshape(-1) for pack in self.packs for rows in pack.rows.values())])

    def work(self, index: Tensor) -> list["PackWork"]:
        """The packs with `index` `[n]`, one entry per row of `all_rows`, in the place of their rows."""
        shapes = [rows.shape for pack in self.packs for rows in pack.rows.values()]
        pieces = iter(torch.split(index, [shape.numel() for shape in shapes]))
        return [
            PackWork(pack=pack, rows={part: next(pieces).view(rows.shape) for part, rows in pack.rows.items()})
            for pack in self.packs
        ]


@dataclass(frozen=True, kw_only=True)
class PackWork:
    """A pack whose rows were fetched.

    Attributes:
        pack: the pack.
        rows: for each part of its rows what `lookup` takes, in the same shape.
    """

    pack: PackBatch
    rows: dict[str, Tensor]


class BatchMaker:
    """Turns packs into `PackBatch`es.

    Args:
        row_map: where the rows of a field id are.
        item_counts: train count of every item id, `[num_items + 1]`.
        objective: which negatives are drawn.
        seed: of the draws.
    """

    def __init__(
        self, row_map: RowMap, item_counts: npt.NDArray[np.integer], objective: ObjectiveConfig, *, seed: int
    ) -> None:
        self._row_map = row_map
        self._objective = objective
        self._seed = seed
        self._num_items = len(item_counts) - 1
        self._heads = tuple(row_map.shape.feedback_heads)
        self._popularity = _popularity(item_counts)

    def make(self, pack: Pack) -> PackBatch:
        """The tensors of one pack; a function of the pack and the seed alone."""
        key = derive_key(self._seed, "pack", pack.lane, pack.number)
        is_candidate, before = _find_candidates(pack)
        asked = np.where(pack.has_target, pack.next_fields["item"], -1).astype(np.int64)
        rows = self._row_map.events(
            pack.fields,
            next_fields=pack.next_fields,
            next_item=asked,
            gap_seconds=np.where(pack.position == 0, -1, pack.timestamp - pack.timestamp[before]),
            next_gap_seconds=np.where(pack.has_target, pack.next_timestamp - pack.timestamp, -1),
        )
        targets, columns = self._next_item_columns(np.where(is_candidate, -1, asked), key)
        rows["candidates"] = self._row_map.item_tower(targets)
        columns.update(
            cu_seqlens=pack.cu_seqlens,
            position=pack.position.astype(np.int64),
            timestamp=pack.timestamp,
            next_timestamp=pack.next_timestamp,
        )
        graded = pack.has_target
        if pack.num_candidates.any():
            columns["num_candidates"] = pack.num_candidates
            graded = graded & np.append(is_candidate[1:], False)
        for head in self._heads:
            columns[f"feedback/{head}"] = np.where(graded, pack.next_fields[head], 0).astype(np.int64)
        return PackBatch(
            key=key,
            columns={name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()},
            rows={name: torch.from_numpy(row) for name, row in rows.items()},
        )

    def _next_item_columns(self, asked: Int64, key: int) -> tuple[Int64, dict[str, npt.NDArray[Any]]]:
        """The candidates of a pack and where each target is among them; targets nobody knows (id 0) have no loss."""
        wanted = asked > 0 if self._objective.next_item != "none" else np.zeros(len(asked), dtype=bool)
        target_event = np.flatnonzero(wanted)
        target = asked[target_event]
        draws_per_row = self._objective.num_uniform_negatives
        columns: dict[str, npt.NDArray[Any]] = {"target_event": target_event}
        num_in_pack = 0
        if self._objective.next_item == "full":
            candidates, place = np.arange(1, self._num_items + 1, dtype=np.int64), target - 1
        elif self._objective.negatives == "per_position":
            counters = target_event[:, None] * draws_per_row + np.arange(draws_per_row)
            draws = 1 + integers_numpy(derive_key(key, "negatives"), counters, self._num_items)
            candidates, slots = _number_distinct(np.concatenate([target[:, None], draws], axis=1), self._num_items)
            columns |= {"slots": slots, "order": stable_order(slots.ravel(), len(candidates))}
            place = slots[:, 0].astype(np.int64)
        else:
            distinct, place = np.unique(target, return_inverse=True)
            draws = 1 + integers_numpy(derive_key(key, "negatives"), np.arange(draws_per_row), self._num_items)
            candidates, num_in_pack = np.concatenate([distinct, draws]), len(distinct)
        columns |= {
            "target": place,
            "candidate_id": candidates,
            "log_q": self._log_expected_share(candidates, num_in_pack),
        }
        return candidates, columns

    def _log_expected_share(self, candidates: Int64, num_in_pack: int) -> npt.NDArray[np.float32]:
        """log Q(i): the expected share of candidate i among the negatives, `[C]`.

        In-pack negatives come in proportion to train counts, uniform draws come evenly:
        `Q(i) = (n_b popularity_i + n_u / V) / (n_b + n_u)` with `n_b` in-pack negatives and `n_u` draws.
        """
        uniform = self._objective.num_uniform_negatives
        if num_in_pack + uniform == 0:
            return np.zeros(len(candidates), dtype=np.float32)
        share = num_in_pack * self._popularity[candidates] + uniform / max(self._num_items, 1)
        return np.log(share / (num_in_pack + uniform)).astype(np.float32)


class PackFeed:
    """The reader's side of training: steps of packs, made ahead of time by a thread.

    Args:
        stream: where packs come from.
        maker: turns them into tensors.
        depth: steps made ahead.
    """

    def __init__(self, stream: TrainStream, maker: BatchMaker, *, depth: int) -> None:
        self._stream = stream
        self._maker = maker
        self._prefetcher = Prefetcher(self._make_step, depth)

    def take(self) -> StepBatch:
        """The next step; waits when the thread is behind."""
        return self._prefetcher.take()

    def close(self) -> None:
        """Stops the thread."""
        self._prefetcher.close()

    def _make_step(self) -> StepBatch:
        packs = [self._maker.make(pack) for pack in self._stream.next_step()]
        return StepBatch(packs=packs, position=self._stream.state(), epochs=self._stream.epochs())


def _find_candidates(pack: Pack) -> tuple[Bool, Int64]:
    """Which events of a pack are candidates, and the event before each: of a candidate, the last of its history."""
    before = np.maximum(np.arange(len(pack.position)) - 1, 0)
    is_candidate = np.zeros(len(before), dtype=np.bool_)
    first = pack.cu_seqlens[1:] - pack.num_candidates
    is_candidate[gather_indices(first, pack.num_candidates)] = True
    before[is_candidate] = np.repeat(first - 1, pack.num_candidates)
    return is_candidate, before


def _popularity(item_counts: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Share of each item id in the train events; items never seen count as seen once, so that its log exists."""
    counts = np.maximum(item_counts.astype(np.float64), 1.0)
    counts[0] = 0.0
    return counts / counts.sum()


def _number_distinct(ids: Int64, num_items: int) -> tuple[Int64, npt.NDArray[np.int32]]:
    """Distinct items that hold all `ids`, ascending, and for each id its number among them.

    A catalog that is drawn from many times over comes whole: hardly an item would be missing.
    """
    if ids.size >= WHOLE_CATALOG_DRAWS * num_items:
        return np.arange(1, num_items + 1, dtype=np.int64), (ids - 1).astype(np.int32)
    marks = np.zeros(num_items + 1, dtype=np.int32)
    marks[ids] = 1
    return np.flatnonzero(marks), (np.cumsum(marks, dtype=np.int32) - 1)[ids]
